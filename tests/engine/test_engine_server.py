"""The engine as a service: over a real socket, with a scripted model."""

import asyncio
import itertools
import json
import os
import stat
import time
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import httpx2
import pytest
import trustme
from clock import in_its_own_time
from prometheus_client import generate_latest
from serving import TOKEN, hosted, team, until

from midfill.engine.api import AdapterSource, Request
from midfill.engine.remote.client.endpoint import RemoteSpec
from midfill.engine.remote.client.remote import RemoteEngine
from midfill.engine.remote.client.text_tokenizer import TextTokenizer
from midfill.engine.remote.server.guard import _Bucket
from midfill.engine.remote.server.listen import ListenSpec, read_tokens, serve
from midfill.engine.remote.server.model_host import ModelHost
from midfill.engine.scripted import Script, ScriptedEngine
from midfill.errors import (
    AdapterError,
    EngineError,
    EngineOverloadedError,
    EngineUnavailableError,
    SettingsError,
)


@asynccontextmanager
async def client_of(path):
    transport = httpx2.AsyncHTTPTransport(uds=str(path))
    async with httpx2.AsyncClient(transport=transport, base_url="http://midfill") as client:
        yield client


@asynccontextmanager
async def engine_of(path):
    engine = RemoteEngine(RemoteSpec(("http://midfill",), socket=path))
    await engine.start(lambda _message, _share: None)
    yield engine
    await engine.close()


def request(engine, text, num=100, **options):
    return Request(tuple(engine.model.tokenizer.encode(text)), num, **options)


def log_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def test_a_socket_is_its_owners_alone_and_goes_with_the_service(tmp_path):
    path = tmp_path / "s.sock"
    async with hosted(ListenSpec(socket=path)) as (_, address):
        assert address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


async def test_completions_in_openais_form(tmp_path):
    path = tmp_path / "s.sock"
    async with hosted(ListenSpec(socket=path)), client_of(path) as client:
        body = {"prompt": "a = ", "max_tokens": 3, "logprobs": 1}
        answer = (await client.post("/v1/completions", json=body)).json()
        assert answer["choices"][0]["text"] == "hel"
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-0.25] * 3
        assert answer["usage"]["completion_tokens"] == 3
        ids = await client.post("/v1/completions", json={"prompt": [97], "max_tokens": 9, "stream": True})
        events = [line.removeprefix("data: ") for line in ids.text.splitlines() if line]
        assert events[-1] == "[DONE]"
        texts = [json.loads(event)["choices"][0] for event in events[:-1]]
        assert "".join(choice["text"] for choice in texts) == "hello"
        assert texts[-1]["finish_reason"] == "stop"
        models = (await client.get("/v1/models")).json()
        assert models["data"][0]["owned_by"] == "midfill"
        assert (await client.get("/health")).json()["loaded"] is True
        metrics = (await client.get("/metrics")).text
        assert 'midfill_requests_total{end="finished"} 2.0' in metrics
        assert 'midfill_tokens_total{kind="generated"} 8.0' in metrics


async def test_sentinels_in_a_prompt_that_is_text_are_sentinels(tmp_path):
    """Who has not the vocabulary spells them out, and breaks up what looks like one in a file's text."""
    path = tmp_path / "s.sock"
    async with hosted(ListenSpec(socket=path)), client_of(path) as client:
        for prompt, num in (("<|fim_prefix|>a<|fim_suffix|><|fim_middle|>", 4), ("< |fim_prefix|>", 15)):
            answer = (await client.post("/v1/completions", json={"prompt": prompt})).json()
            assert answer["usage"]["prompt_tokens"] == num
    async with hosted(ListenSpec(socket=path)), engine_of(path) as engine:
        tokenizer = engine.model.tokenizer
        assert isinstance(tokenizer, TextTokenizer)
        ids = (tokenizer.token_id("<|fim_prefix|>"), *tokenizer.encode("a <|fim_prefix|>"))
        asked = Request(ids, 3)
        assert "".join([token.text async for token in engine.generate(asked)]) == "hel"
        assert asked.stats.num_reused + asked.stats.num_computed == 1 + len("a < |fim_prefix|>")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text", "why"),
    [
        ("l", "he", "stop"),
        (["x", "lo"], "hel", "stop"),
        (["low", "lox"], "hello", "stop"),
        ([], "hello", "stop"),
    ],
)
async def test_an_answer_ends_before_a_stop(tmp_path, stream, stop, text, why):
    path = tmp_path / "s.sock"
    async with hosted(ListenSpec(socket=path)), client_of(path) as client:
        body = {"prompt": "a", "max_tokens": 9, "stop": stop, "stream": stream, "logprobs": 1}
        answer = await client.post("/v1/completions", json=body)
        if stream:
            lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
            choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
        else:
            choices = answer.json()["choices"]
        assert "".join(choice["text"] for choice in choices) == text
        assert choices[-1]["finish_reason"] == why


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b'{"prompt": 5}', 400),
        (b'{"prompt": ""}', 400),
        (b'{"prompt": "a", "max_tokens": -1}', 400),
        (b'{"prompt": "a", "max_tokens": 99999999}', 400),
        (b'{"prompt": "a", "temperature": 0.7}', 400),
        (b'{"prompt": [-1]}', 400),
        (b'{"prompt": [99999999]}', 400),
        (b'{"prompt": "secret text", "model": "other"}', 404),
        (b'{"prompt": "' + b"a" * 3_000_000 + b'"}', 413),
    ],
)
async def test_a_bad_request_is_refused_without_quoting_it(tmp_path, body, status):
    path = tmp_path / "s.sock"
    async with hosted(ListenSpec(socket=path)), client_of(path) as client:
        answer = await client.post("/v1/completions", content=body)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
        assert "secret" not in answer.text
        assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200


async def test_a_body_of_unknown_length_is_limited_too(tmp_path):
    async def parts():
        for _ in range(40):
            yield b" " * 100_000

    path = tmp_path / "s.sock"
    async with hosted(ListenSpec(socket=path)), client_of(path) as client:
        assert (await client.post("/v1/completions", content=parts())).status_code == 413
        assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200


async def test_what_is_demanded_idle_and_reused_crosses(tmp_path):
    path, log = tmp_path / "s.sock", tmp_path / "log"
    async with hosted(ListenSpec(socket=path), log=str(log)), engine_of(path) as engine:
        found = request(engine, "x", forced_prefix="<>")
        assert "".join([token.text async for token in engine.generate(found)]) == "<>hello"
        assert found.stats.num_computed > 0
        idle = request(engine, "slow", idle=True)
        async with aclosing(engine.generate(idle)) as tokens:
            await anext(tokens)
        await until(lambda: len(log_of(log)) == 2)
        assert [row["idle"] for row in log_of(log)] == [False, True]
        engine.prewarm(idle.tokens)
        await until(lambda: len(log_of(log)) == 3)
        assert log_of(log)[2]["outcome"] == "prewarmed"


async def test_adapters_of_several_windows_are_in_the_model_together(tmp_path):
    path = tmp_path / "s.sock"
    async with hosted(ListenSpec(socket=path), unload_s=0.2) as (host, _), client_of(path) as client:

        async def want(window, *keys, pid=None):
            adapters = [{"key": key, "name": key, "path": "/nowhere"} for key in keys]
            body = {"client": window, "pid": pid or os.getpid(), "adapters": adapters}
            return (await client.post("/midfill/adapters", json=body)).status_code

        assert [await want("one", "a", "b"), await want("two", "b", "c")] == [204, 204]
        assert set(host.engine._adapters) == {"a", "b", "c"}
        assert await want("three", "d", "e") == 409
        assert set(host.engine._adapters) == {"a", "b", "c"}
        assert await want("one") == 204
        assert set(host.engine._adapters) == {"b", "c"}
        # A window that was killed could not take its own back; they leave when there is no room.
        killed = await asyncio.create_subprocess_exec("true")
        await killed.wait()
        assert await want("four", "x", "y", pid=killed.pid) == 204
        assert set(host.engine._adapters) == {"b", "c", "x", "y"}
        assert await want("five", "z") == 204
        assert set(host.engine._adapters) == {"b", "c", "z"}
        assert await want("five") == 204
        await until(lambda: host.engine is None)
        body = {"prompt": "x", "max_tokens": 1, "midfill": {"adapter": "c"}}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert set(host.engine._adapters) == {"b", "c"}
    async with hosted(team()) as (_, url), httpx2.AsyncClient(base_url=url) as client:
        answer = await client.post("/midfill/adapters", headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == 404


async def test_an_idle_request_goes_first_once_somebody_waits_for_it(tmp_path):
    path = tmp_path / "s.sock"
    async with hosted(ListenSpec(socket=path)), engine_of(path) as engine, engine_of(path) as other:
        idle, loud = request(engine, "slow", idle=True), request(other, "slow")
        async with aclosing(other.generate(loud)) as first, aclosing(engine.generate(idle)) as second:
            await anext(first)
            waiting = asyncio.ensure_future(anext(second))
            # The other one has the device; as soon as it leaves, and not before, this one goes on.
            await anext(first)
            assert not waiting.done()
            idle.set_idle(False)
            await first.aclose()
            assert (await asyncio.wait_for(waiting, 60)).text == "x"


@in_its_own_time
async def test_a_request_that_waits_for_its_turn_is_not_taken_for_dead(tmp_path):
    path = tmp_path / "s.sock"
    async with hosted(ListenSpec(socket=path)), engine_of(path) as engine, engine_of(path) as other:
        came = asyncio.Event()

        async def read_all():
            tokens = []
            async for token in engine.generate(request(engine, "slow", 150, idle=True)):
                tokens.append(token)
                came.set()
            return tokens

        patient = asyncio.ensure_future(read_all())
        await came.wait()
        begun = time.monotonic()
        async with aclosing(other.generate(request(other, "long", 500))) as tokens:
            # Meanwhile the first one, which is idle, stands aside, for longer than a stream may be silent.
            async for _ in tokens:
                if time.monotonic() - begun > 8:
                    break
        assert not patient.done()
        assert len(await patient) == 150
        assert engine.endpoints[0].breaker.failures == 0


@in_its_own_time
async def test_a_service_that_has_too_much_to_do_is_busy_and_not_away(tmp_path):
    path = tmp_path / "s.sock"
    async with hosted(ListenSpec(socket=path)), engine_of(path) as engine, engine_of(path) as other:
        async with aclosing(other.generate(request(other, "long", 500))) as tokens:
            await anext(tokens)
            for _ in range(2):
                begun = time.monotonic()
                with pytest.raises(EngineOverloadedError, match=r"^The shared engine is busy: no first"):
                    await anext(engine.generate(request(engine, "good", idle=True)))
                assert time.monotonic() - begun == pytest.approx(10.0, abs=0.1)
        assert engine.endpoints[0].breaker.failures == 0
        assert [token.text async for token in engine.generate(request(engine, "good"))] == list("hello")


async def test_leaving_the_stream_frees_the_device_at_once(tmp_path):
    path, log = tmp_path / "s.sock", tmp_path / "log"
    async with hosted(ListenSpec(socket=path), log=str(log)) as (host, _), engine_of(path) as engine:
        async with aclosing(engine.generate(request(engine, "slow", 500))) as tokens:
            for _ in range(3):
                await anext(tokens)
        await until(lambda: log_of(log))
        (row,) = log_of(log)
        assert row["outcome"] == "cancelled"
        assert row["steps"] < 40
        assert b"midfill_requests_running 0.0" in metrics_of(host)


def metrics_of(host):
    return generate_latest(host.metrics.registry)


async def test_what_the_model_says_of_its_fault_arrives(tmp_path):
    path = tmp_path / "s.sock"
    async with hosted(ListenSpec(socket=path)), engine_of(path) as engine:
        with pytest.raises(EngineError, match=r"^out of memory$"):
            async for _ in engine.generate(request(engine, "bad")):
                pass
        assert [token.text async for token in engine.generate(request(engine, "good"))] == list("hello")


async def test_a_model_leaves_memory_and_comes_back_and_the_process_ends(tmp_path):
    path = tmp_path / "s.sock"
    async with hosted(ListenSpec(socket=path), unload_s=0.1) as (host, _), engine_of(path) as engine:
        assert [token.text async for token in engine.generate(request(engine, "good"))]
        await until(lambda: host.engine is None)
        assert [token.text async for token in engine.generate(request(engine, "good"))]
    ends = asyncio.get_running_loop().create_task(
        serve(
            ModelHost(lambda: ScriptedEngine(Script()), exit_s=0.1, vocabulary="x"),
            ListenSpec(socket=path),
            lambda _address: None,
        )
    )
    await asyncio.wait_for(ends, 60)


async def test_what_was_loaded_in_part_is_closed():
    engine = Held()
    engine.may_close.set()
    host = ModelHost(lambda: engine, vocabulary="x", adapters=(AdapterSource("k", "n", Path("/nowhere")),))
    with pytest.raises(AdapterError, match="no such adapter"):
        await host.load()
    assert engine.closed.is_set()
    await host.close()


async def host_that_unloads():
    """A host whose model has begun to leave memory, and the engines that it has made."""
    engines = []
    host = ModelHost(lambda: Held(engines), unload_s=0.01, vocabulary="x")
    await host.load()
    await until(lambda: host.engine is None)
    return host, engines


async def test_there_is_never_a_second_model_in_memory():
    host, engines = await host_that_unloads()
    [first] = engines
    again = asyncio.ensure_future(host.load())
    # While the first one is being closed nothing else is loaded, whatever the loop does.
    for _ in range(50):
        await asyncio.sleep(0)
    assert engines == [first]
    first.may_close.set()
    second = await again
    assert engines == [first, second]
    second.may_close.set()
    await host.close()
    assert all(engine.closed.is_set() for engine in engines)


async def test_ending_waits_for_a_model_that_leaves_though_another_is_wanted():
    host, engines = await host_that_unloads()
    [first] = engines
    again = asyncio.ensure_future(host.load())
    await asyncio.sleep(0)
    ending = asyncio.ensure_future(host.close())
    await asyncio.wait([again])
    assert again.cancelled()
    assert not ending.done()
    first.may_close.set()
    await ending
    assert first.closed.is_set()
    assert engines == [first]


async def test_ending_while_the_model_is_loaded_closes_it():
    engine = Held()
    engine.may_load.clear()
    host = ModelHost(lambda: engine, vocabulary="x")
    loading = asyncio.ensure_future(host.load())
    await until(engine.starting.is_set)
    ending = asyncio.ensure_future(host.close())
    await until(engine.leaving.is_set)
    assert not ending.done()
    engine.may_close.set()
    await ending
    assert engine.closed.is_set()
    assert host.engine is None
    await asyncio.wait([loading])
    assert loading.cancelled()


async def test_no_report_of_loading_is_missed():
    host = ModelHost(lambda: ScriptedEngine(Script(load_delay_s=30)), vocabulary="x")
    async with aclosing(host.progress()) as reports:
        await anext(reports)
        # It comes while the one before is being sent.
        host._tell("half of it", 0.5)
        async with asyncio.timeout(60):
            assert await anext(reports) == {"message": "half of it", "share": 0.5}
    await host.close()


async def test_who_hangs_up_while_the_model_is_loaded_leaves_nothing_and_it_is_loaded_all_the_same():
    engine = Held()
    engine.may_load.clear()
    host = ModelHost(lambda: engine, vocabulary="x")
    others = asyncio.all_tasks()
    reports = host.progress()
    await anext(reports)
    await until(engine.starting.is_set)
    loading = host._loading
    await reports.aclose()
    await until(lambda: asyncio.all_tasks() - others == {loading})
    engine.may_load.set()
    assert await loading is engine
    assert host.engine is engine
    engine.may_close.set()
    await host.close()


@in_its_own_time
async def test_a_model_stays_in_memory_while_adapters_are_put_into_it():
    class Slow(ScriptedEngine):
        async def set_adapters(self, adapters):
            await asyncio.sleep(100)
            await super().set_adapters(adapters)

    host = ModelHost(lambda: Slow(Script()), unload_s=60, vocabulary="x")
    await host.want("one", [AdapterSource("k", "n", Path("/nowhere"))])
    assert set(host.engine._adapters) == {"k"}
    await asyncio.sleep(61)
    assert host.engine is None
    await host.close()


class Held(ScriptedEngine):
    """One that leaves when it may, and loads too; whose adapters cannot be used. It adds itself to a list."""

    def __init__(self, engines=None):
        super().__init__(Script())
        self.starting, self.may_load = asyncio.Event(), asyncio.Event()
        self.leaving, self.may_close, self.closed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.may_load.set()
        if engines is not None:
            engines.append(self)

    async def start(self, progress):
        self.starting.set()
        await self.may_load.wait()
        await super().start(progress)

    async def set_adapters(self, adapters):
        raise AdapterError(f"no such adapter: {adapters[0].name}")

    async def close(self):
        self.leaving.set()
        await self.may_close.wait()
        await super().close()
        self.closed.set()


async def test_a_team_is_asked_for_tokens_and_browsers_are_refused():
    async with hosted(team(names=("gpu-box",))) as (_, url), httpx2.AsyncClient(base_url=url) as client:
        good = {"Authorization": f"Bearer {TOKEN}"}
        for status, headers in (
            (200, good),
            (200, good | {"Host": "gpu-box:1"}),
            (401, {}),
            (401, {"Authorization": "Bearer"}),
            (401, {"Authorization": f"Bearer {TOKEN}3"}),
            (403, good | {"Origin": "http://evil.example"}),
            (421, good | {"Host": "evil.example"}),
        ):
            assert (await client.get("/v1/models", headers=headers)).status_code == status, headers


async def test_one_user_cannot_fill_the_queue():
    async with hosted(team()) as (_, url), httpx2.AsyncClient(base_url=url, timeout=60) as client:
        ada, bob = ({"Authorization": f"Bearer {token}"} for token in (TOKEN, TOKEN + "2"))
        body = {"prompt": "slow", "max_tokens": 500}
        many = [client.post("/v1/completions", json=body, headers=ada) for _ in range(20)]
        tasks = [asyncio.create_task(one) for one in many]
        for done in itertools.islice(asyncio.as_completed(tasks), 4):
            assert (await done).status_code == 429
        assert (await client.get("/health", headers=bob)).status_code == 200
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_a_user_has_so_many_requests_a_second():
    bucket = _Bucket(at=0.0)
    assert [bucket.take(0.0) for _ in range(61)] == [True] * 60 + [False]
    assert [bucket.take(0.1) for _ in range(3)] == [True, True, False]


async def test_a_team_is_served_with_tls_and_an_authority_of_its_own(tmp_path, monkeypatch):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(tmp_path / "box.key")
    (tmp_path / "box.key").chmod(0o600)
    with (tmp_path / "box.pem").open("wb") as file:
        file.writelines(part.bytes() for part in issued.cert_chain_pems)
    monkeypatch.setenv("TEAM_TOKEN", TOKEN)
    listen = team(tls_cert=tmp_path / "box.pem", tls_key=tmp_path / "box.key")
    async with hosted(listen) as (_, url):
        assert url.startswith("https://")
        place = (url.replace("127.0.0.1", "localhost"),)
        with pytest.raises(EngineUnavailableError, match="certificate that this machine does not trust"):
            await RemoteEngine(RemoteSpec(place, key="env:TEAM_TOKEN")).start(lambda *_: None)
        engine = RemoteEngine(RemoteSpec(place, key="env:TEAM_TOKEN", ca=tmp_path / "ca.pem"))
        await engine.start(lambda *_: None)
        assert [token.text async for token in engine.generate(request(engine, "x"))] == list("hello")
        await engine.close()


@pytest.mark.parametrize(
    ("listen", "remedy"),
    [
        (ListenSpec(), "--tokens"),
        (ListenSpec(tokens={"short": "ada"}), "fewer than 16"),
        (team(host="0.0.0.0"), "--tls-cert"),
        (team(host="gpu-box"), "--tls-cert"),
    ],
)
async def test_nothing_is_open_to_others_by_mistake(listen, remedy):
    with pytest.raises(SettingsError, match=remedy):
        listen.check()
    team(host="gpu-box", behind_proxy=True).check()


def test_tokens_are_read_from_a_file_that_nobody_else_can_read(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"ada {TOKEN}\n\nbob {TOKEN}2\n")
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        read_tokens(path)
    path.chmod(0o600)
    assert read_tokens(path) == {TOKEN: "ada", TOKEN + "2": "bob"}
    path.write_bytes(b"\xef\xbb\xbf" + f"ada {TOKEN}\r\nbob {TOKEN}2\r\n".encode())
    assert read_tokens(path) == {TOKEN: "ada", TOKEN + "2": "bob"}
    path.write_bytes(f"ada {TOKEN}\r\n".encode("utf-16"))
    with pytest.raises(SettingsError, match=r"tokens: it is in UTF-16\. Save it as UTF-8\.$"):
        read_tokens(path)
    path.write_text("one-word\n")
    with pytest.raises(SettingsError, match="user token"):
        read_tokens(path)
    assert os.name == "posix"
