"""What each kind of server is sent, and how it is made to go on with half a word."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faulty import STREAM, Faulty, chunk, event, listing, page, tokenize, word
from tiny import write_tokenizer

from midfill.completion.answer import Trigger
from midfill.completion.completer import Completer
from midfill.engine.api import Request
from midfill.engine.remote.client.circuit_breaker import CircuitBreaker
from midfill.engine.remote.client.credentials import find_key
from midfill.engine.remote.client.dialects import DIALECTS, InvalidResponseError, StreamParser
from midfill.engine.remote.client.endpoint import RemoteSpec
from midfill.engine.remote.client.fallback import FallbackEngine
from midfill.engine.remote.client.remote import RemoteEngine
from midfill.engine.remote.client.text_tokenizer import TextTokenizer
from midfill.engine.scripted import Rule, Script, ScriptedEngine
from midfill.errors import EngineUnavailableError, ModelError, SettingsError
from midfill.fim.probing import identify
from midfill.fim.templates import FAMILIES
from midfill.models.store import LocalModel
from midfill.models.tokenizer import load_tokenizer
from midfill.settings import Settings
from midfill.text.documents import Document, Point, Snapshot

PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"


@pytest.fixture
def model(tmp_path):
    write_tokenizer(tmp_path)
    return LocalModel("qwen2.5-coder-0.5b", tmp_path, "qwen2.5-coder", "a test")


async def started(server, **spec):
    engine = RemoteEngine(RemoteSpec((server.url,), **spec))
    await engine.start(lambda _message, _share: None)
    return engine


async def text_of(engine, request):
    return "".join([token.text async for token in engine.generate(request)])


async def test_a_vocabulary_that_agrees_is_used_and_ids_are_sent(model):
    tokenizer = load_tokenizer(model.path)
    ids = tuple(tokenizer.encode("return a"))

    def script(body):
        assert body["prompt"] == list(ids)
        assert body["stop_token_ids"] == [tokenizer.token_id("<|endoftext|>")]
        plus, end = tokenizer.encode("+")[0], tokenizer.token_id("<|endoftext|>")
        tokens = {"tokens": [f"token_id:{plus}", f"token_id:{end}"], "token_logprobs": [-0.5, -0.1]}
        choice = {"text": "+", "logprobs": tokens, "finish_reason": "stop"}
        return [STREAM, chunk(event({"choices": [choice]})), chunk(event(b"[DONE]")), b"0\r\n\r\n"]

    async with Faulty(models=listing("vllm", max_model_len=900), script=script) as server:
        server.pages["/tokenize"] = tokenize(tokenizer, "prompt")
        engine = await started(server, candidates=(model,))
        assert (engine.model.proven, engine.model.context) == (True, 900)
        assert engine.model.family == "qwen2.5-coder"
        request = Request(ids, 8, frozenset({tokenizer.token_id("<|endoftext|>")}))
        tokens = [token async for token in engine.generate(request)]
        assert [(token.text, token.logprob) for token in tokens] == [("+", -0.5)]
        await engine.close()


@pytest.mark.parametrize("change", [lambda ids: ids[:-1], lambda ids: [*ids, 3], lambda _ids: None])
async def test_a_vocabulary_that_differs_is_not_used(model, change):
    real = tokenize(load_tokenizer(model.path), "content")
    async with Faulty(models=listing("llamacpp")) as server:
        server.pages["/tokenize"] = lambda body: {"tokens": change(real(body)["tokens"])}
        server.pages["/props"] = lambda _body: {"default_generation_settings": {"n_ctx": 512}}
        engine = await started(server, candidates=(model,))
        assert isinstance(engine.model.tokenizer, TextTokenizer)
        assert (engine.model.proven, engine.model.context) == (False, 512)
        await engine.close()


async def test_vllm_writes_half_a_word_anew_token_by_token(model):
    """The server may choose among the tokens that agree only; then it is free."""
    tokenizer = load_tokenizer(model.path)
    pieces = tokenizer.vocab_bytes()
    lo, ads = tokenizer.encode("lo"), tokenizer.encode("ads")
    assert len(lo) == 2  # the little vocabulary has no "lo"

    def script(body):
        allowed = body.get("allowed_token_ids")
        written = body["prompt"][1:]
        if allowed is not None:
            rest = b"lo"[len(b"".join(pieces[token] for token in written)) :]
            assert all(rest.startswith(pieces[i]) or pieces[i].startswith(rest) for i in allowed)
            ids = [lo[len(written)]]
            assert ids[0] in allowed
            assert body["max_tokens"] == 1
        else:
            assert written == lo
            ids = ads
        tokens = {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": [-0.1] * len(ids)}
        choice = {"text": "?", "logprobs": tokens, "finish_reason": "length"}
        return [STREAM, chunk(event({"choices": [choice]})), b"0\r\n\r\n"]

    async with Faulty(models=listing("vllm"), script=script) as server:
        server.pages["/tokenize"] = tokenize(tokenizer, "prompt")
        engine = await started(server, candidates=(model,))
        assert await text_of(engine, Request((7,), 8, forced_prefix="lo")) == "loads"
        assert len(server.completions) == 3
        await engine.close()


ANSWERS = {
    "llama.cpp": [
        STREAM,
        chunk(event({"content": ' "lo', "stop": False})),
        chunk(event({"content": "ads", "stop": True})),
    ],
    "sglang": [STREAM, chunk(word(' "lo')), chunk(word("ads", finish="stop"))],
    "openai": [STREAM, chunk(word("ads", finish="stop"))],
    "ollama": [
        STREAM.replace(b"text/event-stream", b"application/x-ndjson"),
        chunk(json.dumps({"response": "ads", "done": True}).encode() + b"\n"),
    ],
    "mistral": [STREAM, chunk(event({"choices": [{"delta": {"content": "ads"}, "finish_reason": "stop"}]}))],
}
OWNERS = {
    "llama.cpp": "llamacpp",
    "sglang": "sglang",
    "openai": "me",
    "ollama": "library",
    "mistral": "mistralai",
}


@pytest.mark.parametrize("kind", ANSWERS)
async def test_text_is_sent_where_the_vocabulary_is_not_known(kind):
    """With `load("lo` before the cursor, of which ` "lo` is demanded back."""
    async with Faulty(models=listing(OWNERS[kind]), script=ANSWERS[kind]) as server:
        engine = await started(server)
        tokenizer = engine.model.tokenizer
        family = FAMILIES[engine.model.family]
        pieces = {"head": "load(", "typed": "", "tail": ")\nend"}
        ids = []
        for part, name in family.parts(family.layouts[0]):
            ids += [tokenizer.token_id(name)] if part == "sentinel" else tokenizer.encode(pieces[name])
        stop = tokenizer.token_id(family.stops[0])
        assert (
            await text_of(engine, Request(tuple(ids), 8, frozenset({stop}), forced_prefix=' "lo'))
            == ' "loads'
        )
        (body,) = server.completions
        prompt = body["prompt"]
        if kind == "mistral":
            assert (prompt, body["suffix"]) == ('load( "lo', ")\nend")
        else:
            end = "" if DIALECTS[kind].healing in {"grammar", "regex"} else ' "lo'
            assert prompt == f"{PREFIX}{SUFFIX})\nend{MIDDLE}load({end}"
        if kind == "llama.cpp":
            assert body["grammar"] == 'root ::= " \\"lo" [^\\x00]*'
        elif kind == "sglang":
            assert body["regex"] == ' "lo[\\s\\S]*'
        await engine.close()


def test_text_never_becomes_a_sentinel_where_text_is_sent():
    tokenizer = TextTokenizer()
    for text in (
        "a <|fim_middle|> b",
        "<fim_prefix>",
        "[SUFFIX]",
        "</s>",
        "<s>",
        "<\uff5cfim▁hole\uff5c>",
        "<[fim-suffix]>",
    ):
        sent = tokenizer.render(tokenizer.encode(text), bos=True)
        assert sent != text
        assert sent.replace(" ", "") == text.replace(" ", "")
    for text in ("if a < b and c[D]:\n\tx = '<div>' + \"[a]\"", "größe 合計 🙂 ²\r\n\0", " \t _x12__ "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("\ud800")) == "\ufffd"


async def test_a_model_that_does_not_fill_in_is_refused_with_the_remedy():
    """It has the name of a family, but the text after the cursor does not help it."""
    finish = {"finish_reason": "stop"}

    def script(body):
        match = body["regex"].removesuffix("[\\s\\S]*").replace("\\", "")
        tokens = {"tokens": [match], "token_logprobs": [-len(match) * 2.0]}
        return [STREAM, chunk(event({"choices": [{"text": match, "logprobs": tokens} | finish]}))]

    async with Faulty(models=listing("sglang", "my-qwen2.5-coder-chat"), script=script) as server:
        engine = await started(server)
        with pytest.raises(ModelError, match=r"does not fill in the middle.*`family =") as error:
            await identify(engine)
        assert "my-qwen2.5-coder-chat" in str(error.value)
        await engine.close()


async def test_a_model_whose_family_cannot_be_told_is_refused_with_the_list():
    async with Faulty(models=listing("sglang", "blue-whale-7b")) as server:
        engine = await started(server)
        with pytest.raises(ModelError, match=r"blue-whale-7b.*starcoder2"):
            await identify(engine)
        await engine.close()


async def test_a_page_that_is_no_model_server_is_told():
    async with Faulty(models=None) as server:
        with pytest.raises(EngineUnavailableError, match=r"no /v1/models"):
            await started(server)
        server.pages["/v1/models"] = lambda _body: {"data": []}
        server.pages["/api/tags"] = lambda _body: {"models": []}
        with pytest.raises(EngineUnavailableError, match="serves no model yet"):
            await started(server)


async def test_the_key_is_sent_and_never_told(monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("TEAM_KEY", "sk-secret-123")
    async with Faulty(script=[page("401 Unauthorized")]) as server:
        engine = await started(server, key="env:TEAM_KEY")
        with pytest.raises(EngineUnavailableError) as error:
            await text_of(engine, Request((1,), 4))
        assert {headers["authorization"] for _, headers, _ in server.asked} == {"Bearer sk-secret-123"}
        await engine.close()
    assert "sk-secret" not in caplog.text + str(error.value)


def test_where_a_key_comes_from(monkeypatch):
    monkeypatch.setenv("TEAM_KEY", " abc ")
    assert find_key("env:TEAM_KEY") == "abc"
    assert find_key("env:TEAM_KEY_TOO") is None
    say = "print('from-a-program'); print('second line')"
    assert find_key(f'command:"{sys.executable}" -c "{say}"') == "from-a-program"
    # PowerShell begins what it prints with a byte order mark, where it is told UTF-8.
    say = "import sys; sys.stdout.buffer.write(bytes([239, 187, 191]) + b'from-a-program' + bytes([13, 10]))"
    assert find_key(f'command:"{sys.executable}" -c "{say}"') == "from-a-program"
    with pytest.raises(SettingsError, match="not UTF-8"):
        find_key(
            f'command:"{sys.executable}" -c "import sys; sys.stdout.buffer.write(bytes([255, 254, 97, 0]))"'
        )
    for wrong in (
        "sk-123",
        "env:",
        "file:/etc/key",
        "command:/nowhere/program",
        f'command:"{sys.executable}" -c 1/0',
    ):
        with pytest.raises(SettingsError):
            find_key(wrong)
    monkeypatch.setenv("TEAM_KEY", "two\nlines")
    with pytest.raises(SettingsError):
        find_key("env:TEAM_KEY")


def test_the_command_of_a_key_runs_nothing_of_the_current_folder(monkeypatch, tmp_path):
    marker = tmp_path / "was-run"
    for name in ("keys.py", "json.py"):
        (tmp_path / name).write_text(f"open({str(marker)!r}, 'w')\n")
    program = tmp_path / "key"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([".", str(Path(sys.executable).parent), os.environ["PATH"]]))
    python = Path(sys.executable).name
    # What -c imports is looked for in the current folder first.
    assert find_key(f"command:{python} -c \"import json; print('key')\"") == "key"
    for wrong in (f"command:{python} -m keys", "command:key", "command:./key", "command: "):
        with pytest.raises(SettingsError):
            find_key(wrong)
    assert not marker.exists()


def test_a_breaker_opens_and_lets_one_through_to_see():
    breaker = CircuitBreaker()
    for _ in range(3):
        assert breaker.allows(0.0)
        breaker.begin()
        breaker.fail(0.0, "down")
    assert not breaker.allows(0.4)
    assert breaker.allows(0.5)
    breaker.begin()
    assert not breaker.allows(0.6), "one request is out to see"
    breaker.fail(0.6, "down")
    assert not breaker.allows(1.5)
    assert breaker.allows(1.6)
    breaker.begin()
    breaker.abandon()
    assert breaker.allows(1.7), "it was taken back; the next one sees"
    breaker.begin()
    breaker.succeed()
    assert breaker.allows(1.7)
    assert breaker.why == ""


def test_lines_are_bounded_and_may_be_cut_anywhere():
    whole = b': comment\r\nevent: x\r\ndata: {"a": 1}\r\n\r\ndata:{"b": 2}\n\ndata: [DONE]\n{"c": 3}'
    for size in (1, 3, len(whole)):
        lines = StreamParser()
        found = [one for at in range(0, len(whole), size) for one in lines.take(whole[at : at + size])]
        assert [*found, *lines.take(None)] == [{"a": 1}, {"b": 2}, {}, {"c": 3}]
    with pytest.raises(InvalidResponseError):
        StreamParser(limit=10).take(b"x" * 11)


async def test_the_model_here_takes_over_where_the_user_wants_that(model):
    """The scripted engine's vocabulary is not that of the server, so it may only serve alone."""
    here = ScriptedEngine(Script(rules=[Rule(text="1")]))
    async with Faulty() as server:
        pass
    engine = FallbackEngine(RemoteEngine(RemoteSpec((server.url,))), lambda: here)
    await engine.start(lambda _message, _share: None)
    completer = Completer(Settings(eagerness="always", prefetch=False))
    completer.use(engine, ("qwen2.5-coder", FAMILIES["qwen2.5-coder"]))
    where = Snapshot(Document.open("file:///a.py", "python", 1, "x = "), Point(0, 4))
    assert (await completer.complete(where, Trigger.INVOKED)).text == "1"
    await engine.close()


def test_a_served_engine_needs_no_torch():
    code = "import sys, midfill.lsp.server\n"
    code += "import midfill.engine.remote.client.remote, midfill.engine.remote.client.fallback\n"
    code += "print(sorted({'torch', 'transformers', 'peft', 'openvino'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
