"""OpenAI's parameters as its clients send them: each works, or is refused by its name."""

import asyncio
import json
import sys
from contextlib import asynccontextmanager

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import TOKEN, hosted, team

from midfill.engine.api import ModelInfo
from midfill.engine.remote.server import guard, request_params
from midfill.engine.remote.server.stop_strings import StopMatcher
from midfill.engine.scripted import CharTokenizer, Rule, Script
from midfill.errors import ModelError
from midfill.fim.templates import FAMILIES, infill
from profiles import examples

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
FIM = "<|fim_prefix|>{}<|fim_suffix|>{}<|fim_middle|>"
SCRIPT = Script(
    rules=[
        Rule(after=FIM.format("def add(a, b):\n    return ", "\n"), text="a + b", logprob=-0.5),
        Rule(after=FIM.format("x = ", ""), text="1"),
        Rule(text="hello", logprob=-0.25),
    ]
)


def infilling(model, before, after):
    return infill(model, None, before, after)


@asynccontextmanager
async def asking(listen, **options):
    """A service, and a client of it who has a token."""
    async with (
        hosted(listen, **options) as (host, url),
        httpx2.AsyncClient(base_url=url, headers=HEADERS) as client,
    ):
        yield host, client


@pytest.fixture(autouse=True)
def _without_limits_of_rate(monkeypatch):
    monkeypatch.setattr(guard, "_BURST", 1e9)
    monkeypatch.setattr(guard, "_REFUSAL_DELAY_S", 0.0)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, "hello"),
        ({"temperature": 0}, "hello"),
        ({"temperature": 0.0, "top_p": 1, "n": 1, "best_of": 1, "echo": False}, "hello"),
        ({"top_p": 0.1, "seed": 7, "user": "ada", "logit_bias": {}}, "hello"),
        ({"presence_penalty": 0, "frequency_penalty": 0.0, "suffix": None, "stop": None}, "hello"),
        ({"max_tokens": None, "stream": None, "logprobs": None, "stream_options": None}, "hello"),
        ({"stop": "l"}, "he"),
        ({"stop": ["x", "o"]}, "hell"),
        ({"stop": []}, "hello"),
        ({"max_tokens": 2}, "he"),
        ({"prompt": [97]}, "hello"),
        ({"prompt": ["a"]}, "hello"),
        ({"prompt": [[97, 98]]}, "hello"),
        ({"prompt": "def add(a, b):\n    return ", "suffix": "\n"}, "a + b"),
        ({"prompt": "x = ", "suffix": ""}, "1"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_it_works(more, text, stream):
    async with asking(team(), script=SCRIPT, infill=infilling) as (_, client):
        answer = await client.post("/v1/completions", json={"prompt": "a", "stream": stream} | more)
        assert answer.status_code == 200, answer.text
        if more.get("stream", stream):
            lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
            events = [json.loads(line) for line in lines[:-1]]
            assert "".join(event["choices"][0]["text"] for event in events) == text
        else:
            assert answer.json()["choices"][0]["text"] == text


REFUSED = {
    "temperature": (0.7, -1, 3, "hot", True, 1e400, [0]),
    "top_p": (2, -0.1, "all"),
    "n": (2, 0, 1.5, True, "1"),
    "best_of": (3, 0, "one"),
    "echo": (True, 1, "no"),
    "logprobs": (5, -1, True, "yes"),
    "presence_penalty": (0.5, -2, "x", False),
    "frequency_penalty": (1, [], {}),
    "logit_bias": ({"50256": -100}, [1], 5),
    "seed": ("x", 1.5, 10**30),
    "user": (5, "x" * 1001, ["ada"]),
    "suffix": (5, ["x"], "x" * (request_params.MAX_TOKENS * 16 + 1)),
    "stop": (["x"] * 9, "x" * 101, [5], {"a": 1}, ["a", None], 7),
    "max_tokens": (-1, 65_537, 1.5, "9", True, 10**30),
    "prompt": (None, 5, {}, ["a", "b"], [[1], [2]], [1, "a"], [True], [1.5], [-1], [2**40], "", [], [[]]),
    "stream": ("yes", 1, [True]),
    "stream_options": ({"include_usage": True}, {"what": 1}, 5, {"include_obfuscation": True}),
    "stop_token_ids": ([1] * 101, [-1], ["a"], 5),
    "model": (5, "x" * 1001, ["a"]),
    "midfill": (5, [], {"starts_with": "x" * 1001}, {"id": "x" * 65}, {"idle": 1}, {"adapter": "x" * 201}),
    # Of other servers, and what nobody knows.
    "top_k": (40, 1),
    "min_p": (0.1,),
    "repetition_penalty": (1.1,),
    "max_completion_tokens": (5,),
    "messages": ([],),
    "response_format": ({"type": "text"},),
    "guided_regex": ("x*",),
    "allowed_token_ids": ([1],),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_it_is_refused_by_name(name):
    async with asking(team(), script=SCRIPT) as (_, client):
        for value in REFUSED[name]:
            body = json.dumps({"prompt": "a", name: value})
            answer = await client.post("/v1/completions", content=body)
            assert answer.status_code == 400, (value, answer.text)
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            # Infinity is no JSON.
            if "Infinity" not in body:
                assert error["param"].split(".")[0] == name, error
                assert error["message"].startswith(name)
            assert len(answer.text) < 500


async def test_the_limit_is_in_the_message():
    async with asking(team(), script=SCRIPT) as (_, client):
        for more, limit in (
            ({"stop": ["x"] * 9}, "8"),
            ({"stop": "x" * 101}, "100"),
            ({"max_tokens": 99_999}, "65536"),
            ({"max_tokens": 65_536, "prompt": "x" * 50_000}, "100000"),
            ({"midfill": {"starts_with": "x" * 2000}}, "1000"),
            ({"prompt": [1] * 65_537}, "65536"),
            ({"prompt": "x" * 1_048_577}, "1048576"),
            ({"stop_token_ids": [1] * 200}, "100"),
            ({"temperature": 0.5}, "--any-temperature"),
        ):
            answer = await client.post("/v1/completions", json={"prompt": "a"} | more)
            assert answer.status_code == 400
            assert limit in answer.json()["error"]["message"], more


async def test_any_temperature_is_taken_where_the_server_was_told_so():
    async with asking(team(any_temperature=True), script=SCRIPT) as (_, client):
        for temperature in (0.2, 1, 2.0):
            body = {"prompt": "a", "temperature": temperature}
            assert (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"] == "hello"
        answer = await client.post("/v1/completions", json={"prompt": "a", "temperature": 2.1})
        assert answer.status_code == 400


async def test_a_text_that_is_too_long_is_refused_before_it_is_encoded(monkeypatch):
    async def never(*_):
        raise AssertionError("it was encoded")

    async with asking(team(), script=SCRIPT, infill=infilling) as (host, client):
        assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200
        object.__setattr__(host.engine.model, "context", 1000)
        monkeypatch.setattr(asyncio, "to_thread", never)
        for more in ({"prompt": "x" * 16_001}, {"prompt": "x" * 9000, "suffix": "y" * 9000}):
            answer = await client.post("/v1/completions", json=more)
            assert answer.status_code == 400
            assert "16000" in answer.json()["error"]["message"]


async def test_one_user_encodes_one_text_at_a_time(monkeypatch):
    """So sixteen long ones of one user do not take all threads."""
    running = {"ada": 0, "bob": 0}
    begun, go_on = asyncio.Event(), asyncio.Event()
    most = dict(running)

    async def in_thread(function, tokenizer, text):
        running[text] += 1
        most[text] = max(most[text], running[text])
        if text == "ada":
            begun.set()
            await go_on.wait()
        running[text] -= 1
        return function(tokenizer, text)

    async with hosted(team(), script=SCRIPT) as (_, url), httpx2.AsyncClient(base_url=url) as client:
        assert (await client.get("/v1/models", headers=HEADERS)).status_code == 200
        monkeypatch.setattr(asyncio, "to_thread", in_thread)
        tasks = [
            asyncio.create_task(client.post("/v1/completions", json={"prompt": "ada"}, headers=HEADERS))
            for _ in range(5)
        ]
        await begun.wait()
        bob = {"Authorization": f"Bearer {TOKEN}2"}
        assert (await client.post("/v1/completions", json={"prompt": "bob"}, headers=bob)).status_code == 200
        go_on.set()
        assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * 5
    assert most == {"ada": 1, "bob": 1}


async def test_a_suffix_needs_a_model_that_fills_in():
    def cannot(*_):
        raise ModelError("The FIM family of this one is not known.")

    for options, words in (({}, "does not support fill-in-the-middle"), ({"infill": cannot}, "is not known")):
        async with asking(team(), script=SCRIPT, **options) as (_, client):
            answer = await client.post("/v1/completions", json={"prompt": "a", "suffix": "b"})
            assert answer.status_code == 400
            assert words in answer.json()["error"]["message"]
            answer = await client.post("/v1/completions", json={"prompt": [1], "suffix": "b"})
            assert answer.json()["error"]["param"] == "suffix"


class Vocabulary(CharTokenizer):
    """All sentinels of all families, each a control token."""

    names = sorted({name for family in FAMILIES.values() for name in (*family.sentinels, *family.stops)})

    def token_id(self, name):
        return 0x110000 + self.names.index(name) if name in self.names else super().token_id(name)

    @property
    def control_ids(self):
        return frozenset(range(0x110000, 0x110000 + len(self.names)))

    def decode(self, ids):
        return "".join(self.names[id_ - 0x110000] if id_ >= 0x110000 else chr(id_) for id_ in ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_gets_its_own_order_and_a_file_places_no_sentinel(name):
    family, tokenizer = FAMILIES[name], Vocabulary()
    model = ModelInfo("x", name, "x", 1000, tokenizer, "cpu", "x")
    before, after = f"a{family.prefix}", f"b{family.suffix}"
    ids, stops = infill(model, None, before, after)
    sentinels = [id_ for id_ in ids if id_ in tokenizer.control_ids]
    assert sorted(tokenizer.decode([id_]) for id_ in sentinels) == sorted(family.sentinels)
    text = tokenizer.decode(ids)
    assert before in text
    assert after in text
    assert tokenizer.token_id(family.stops[0]) in stops
    # The middle follows: nothing stands after what says so.
    assert text.endswith(family.middle or before)
    alone, _ = infill(model, None, before, "")
    assert (family.suffix in tokenizer.decode(alone)) is not family.needs_suffix


async def test_the_form_of_an_answer_is_openais():
    async with asking(team(), script=SCRIPT) as (_, client):
        whole = (await client.post("/v1/completions", json={"prompt": "a"})).json()
        assert whole["object"] == "text_completion"
        assert whole["id"].startswith("cmpl-")
        assert whole["model"] == "scripted"
        assert isinstance(whole["created"], int)
        body = {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}}
        answer = await client.post("/v1/completions", json=body)
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        *events, last = [json.loads(line) for line in lines[:-1]]
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 5
        assert {event["usage"] for event in events} == {None}
        assert len({event["id"] for event in [*events, last]}) == 1
        for path, method, status in (
            ("/v1/chat/completions", "POST", 404),
            ("/v1/completions", "GET", 405),
        ):
            error = await client.request(method, path)
            assert error.status_code == status
            assert error.json()["error"]["type"] == "invalid_request_error"


async def test_openais_own_client_is_served():
    openai = pytest.importorskip("openai", reason="pip install openai")
    async with (
        hosted(team(), script=SCRIPT, infill=infilling) as (_, url),
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client,
    ):
        ask = client.completions.create
        plain = await ask(model="scripted", prompt="a", temperature=0, top_p=1, n=1, max_tokens=9)
        assert (plain.choices[0].text, plain.choices[0].finish_reason) == ("hello", "stop")
        assert plain.usage.completion_tokens == 5
        filled = await ask(
            model="scripted", prompt="def add(a, b):\n    return ", suffix="\n", logprobs=1, seed=1
        )
        assert filled.choices[0].text == "a + b"
        assert filled.choices[0].logprobs.token_logprobs == [-0.5] * 5
        stream = await ask(
            model="scripted", prompt="a", stream=True, stream_options={"include_usage": True}, stop=["o"]
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "hell"
        assert chunks[-1].usage.total_tokens > 0
        for name, value in (("temperature", 0.7), ("n", 2), ("best_of", 2), ("echo", True)):
            with pytest.raises(openai.BadRequestError) as error:
                await ask(model="scripted", prompt="a", **{name: value})
            assert error.value.param == name
        assert [model.id async for model in client.models.list()] == ["scripted"]


def naive(texts, pieces):
    """What the automaton must give: (end, held) after each piece, by looking at the whole text each time."""
    text, found = "", []
    for piece in pieces:
        text += piece
        ends = [at for one in texts if one and (at := text.find(one)) >= 0]
        held = max(
            (n for one in texts for n in range(1, len(one)) if text.endswith(one[:n])),
            default=0,
        )
        found.append((min(ends, default=None), held))
        if ends:
            break
    return found


@settings(max_examples=examples())
@given(
    st.lists(st.text("ab", max_size=6), max_size=8),
    st.lists(st.text("abc", max_size=4), max_size=30),
)
def test_stops_are_found_as_by_looking_at_the_whole_text(texts, pieces):
    stops, found = StopMatcher(texts), []
    for piece in pieces:
        stops.push(piece)
        found.append((stops.end, stops.num_held))
        if stops.end is not None:
            break
    expected = naive(texts, pieces)
    assert [end for end, _ in found] == [end for end, _ in expected]
    assert [held for end, held in found if end is None] == [held for end, held in expected if end is None]


def test_the_time_for_a_stop_grows_with_the_text_alone():
    """Characters read and steps back, not seconds: at most two steps for each character and text."""
    text = "a" * 20_000
    stops = StopMatcher(["a" * 99 + "b"] * 8)
    steps = 0

    def count(frame, event, _argument):
        nonlocal steps
        steps += event == "line"
        return count

    for size in (5_000, 20_000):
        stops, steps = StopMatcher(["a" * 99 + "b"] * 8), 0
        before = sys.gettrace()
        sys.settrace(count)
        try:
            for char in text[:size]:
                stops.push(char)
        finally:
            sys.settrace(before)
        print(f"{size} characters: {steps / size / 8:.1f} lines for each character and text")
        assert steps < 40 * size * 8
        assert stops.num_held == 99
