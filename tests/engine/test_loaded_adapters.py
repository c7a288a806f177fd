"""Adapters come and go while requests run: none fails, none mixes two of them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import adapters
import pytest
import tiny
from safetensors.torch import load_file, save_file

from midfill.engine.api import AdapterSource, EngineSpec, Request
from midfill.engine.local import LocalEngine
from midfill.engine.supervisor import Supervisor
from midfill.errors import AdapterError, EngineError, EngineUnavailableError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RUNNERS = ("torch", "openvino", "llamacpp")
PROMPT = list(range(70))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model("qwen2", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    """llama.cpp's form of adapters is kept there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIDFILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def of(runner, model):
    """The model in the form that a runner takes."""
    return tiny.as_gguf(model) if runner == "llamacpp" else model


@pytest.fixture(scope="module")
def sources(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    targets = [["q_proj", "v_proj", "down_proj"], adapters.TARGETS["qwen2"], ["o_proj", "up_proj"]]
    return [
        adapters.source(
            adapters.write_adapter(model.path, folder / str(seed), targets[seed], seed=seed, r=4 + 8 * seed)
        )
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def oracles(model, sources):
    """What each adapter, and the base, writes alone, after any prompt."""
    models = {source.key: adapters.peft_model(model.path, source.path) for source in sources}
    models["base"] = tiny.reference(model.path)
    known = {}

    def tokens(key, prompt, num_tokens, control):
        place = (key, tuple(prompt))
        if place not in known or len(known[place]) < num_tokens:
            known[place] = tiny.oracle(models[key], prompt, num_tokens, control)
        return known[place][:num_tokens]

    return tokens


async def ids(engine, key, prompt=PROMPT, num_tokens=12):
    return [token.id for token in await tiny.collect(engine, prompt, num_tokens, adapter=key)]


@pytest.mark.parametrize("runner", RUNNERS)
async def test_requests_of_several_adapters_run_side_by_side(model, sources, oracles, runner):
    async with tiny.running(of(runner, model), runner=runner) as engine:
        control = engine.model.tokenizer.control_ids
        await engine.set_adapters(sources)
        keys = [source.key for source in sources] + ["base"]
        found = await asyncio.gather(*(ids(engine, key) for key in keys * 2))
        assert found == [oracles(key, PROMPT, 12, control) for key in keys * 2]


@pytest.mark.slow
@pytest.mark.parametrize("runner", RUNNERS)
async def test_adapters_are_swapped_while_requests_run(model, sources, oracles, runner):
    """Typists ask without end for what is in the model; every answer is that of one adapter alone."""
    async with tiny.running(of(runner, model), runner=runner, num_threads=1) as engine:
        control = engine.model.tokenizer.control_ids
        usable = ["base"]
        answers = []
        done = False

        async def typist(number):
            turn = 0
            while not done:
                key = usable[(number + turn) % len(usable)]
                num_tokens = 3 + (number + turn) % 7
                prompt = list(range(number, number + 40 + 3 * (turn % 3)))
                answers.append((key, tuple(prompt), num_tokens, await ids(engine, key, prompt, num_tokens)))
                turn += 1

        typists = [asyncio.create_task(typist(number)) for number in range(3)]
        for wanted in ([0], [0, 1], [1, 2, 0], [], [2]):
            # As the server does: who leaves is not asked for any more before it goes.
            chosen = [sources[number] for number in wanted]
            stay = [source.key for source in chosen if source.key in usable]
            usable[:] = ["base", *stay]
            await engine.set_adapters(chosen)
            usable[:] = ["base", *(source.key for source in chosen)]
            target = len(answers) + 6
            while len(answers) < target:
                await asyncio.wait(typists, timeout=0.01, return_when=asyncio.FIRST_EXCEPTION)
                assert not any(task.done() for task in typists)
        done = True
        await asyncio.gather(*typists)
        assert {key for key, *_ in answers} == {"base", *(source.key for source in sources)}
        for key, prompt, num_tokens, found in answers:
            assert found == oracles(key, list(prompt), 9, control)[:num_tokens], key[:4]


@pytest.mark.parametrize("runner", RUNNERS)
async def test_a_request_under_way_keeps_the_adapter_that_leaves(model, sources, oracles, runner):
    async with tiny.running(of(runner, model), runner=runner) as engine:
        control = engine.model.tokenizer.control_ids
        await engine.set_adapters(sources[:1])
        first = sources[0].key
        async with aclosing(engine.generate(Request(tuple(PROMPT), 40, adapter=first))) as tokens:
            found = [(await anext(tokens)).id]
            swap = asyncio.create_task(engine.set_adapters(sources[1:2]))
            found += [token.id async for token in tokens]
        await swap
        assert found == oracles(first, PROMPT, 40, control)
        with pytest.raises(EngineError, match="is not loaded"):
            await ids(engine, first)
        assert await ids(engine, sources[1].key) == oracles(sources[1].key, PROMPT, 12, control)


async def test_keys_and_values_of_one_adapter_are_not_used_for_another(model, sources, oracles):
    async with tiny.running(model) as engine:
        control = engine.model.tokenizer.control_ids
        await engine.set_adapters(sources[:2])
        for key in (sources[0].key, None, sources[1].key):
            request = Request(tuple(PROMPT), 4, adapter=key)
            async with aclosing(engine.generate(request)) as tokens:
                found = [token.id async for token in tokens]
            assert found == oracles(key or "base", PROMPT, 4, control)
            assert request.stats.num_reused == 0
            assert (await tiny.collect(engine, PROMPT, 4, adapter=key))[0].id == found[0]
        engine.prewarm(list(range(100, 160)), sources[1].key)
        request = Request(tuple(range(100, 161)), 1, adapter=sources[1].key)
        async with aclosing(engine.generate(request)) as tokens:
            [_ async for _ in tokens]
        assert request.stats.num_reused in (0, 60)  # the prewarm may not have been begun


async def test_a_prewarm_does_not_keep_an_adapter_in_the_model(model, sources):
    async with tiny.running(model) as engine:
        await engine.set_adapters(sources[:1])
        engine.prewarm(list(range(200)), sources[0].key)
        await engine.set_adapters([])
        engine.prewarm(PROMPT, sources[0].key)  # comes too late, and is dropped
        assert await ids(engine, None)


@pytest.mark.parametrize("runner", RUNNERS)
async def test_one_that_cannot_be_used_changes_nothing(model, sources, oracles, runner, tmp_path):
    bad = adapters.write_adapter(model.path, tmp_path / "bad", ["q_proj", "down_proj"], seed=5)
    file = bad / "adapter_model.safetensors"
    save_file({name: value * 1e30 for name, value in load_file(file).items()}, file)
    async with tiny.running(of(runner, model), runner=runner) as engine:
        control = engine.model.tokenizer.control_ids
        await engine.set_adapters(sources[:1])
        with pytest.raises(AdapterError, match="not finite"):
            await engine.set_adapters([sources[0], adapters.source(bad)])
        with pytest.raises(AdapterError, match="have changed"):
            await engine.set_adapters([AdapterSource("0" * 64, "other", sources[1].path)])
        with pytest.raises(AdapterError, match="no adapter"):
            await engine.set_adapters([AdapterSource("0" * 64, "none", tmp_path)])
        with pytest.raises(AdapterError, match="at most 4"):
            await engine.set_adapters([AdapterSource(str(n), "x", tmp_path) for n in range(5)])
        for key in (sources[0].key, "base"):
            assert await ids(engine, key) == oracles(key, PROMPT, 12, control)


async def test_the_default_stays_whatever_else_comes(model, sources, oracles):
    async with tiny.running(model, adapter=sources[0].path) as engine:
        control = engine.model.tokenizer.control_ids
        await engine.set_adapters(sources[1:2])
        for key, expected in ((None, sources[0].key), (sources[1].key, sources[1].key), ("base", "base")):
            assert await ids(engine, key) == oracles(expected, PROMPT, 12, control)
        await engine.set_adapters([])
        assert await ids(engine, None) == oracles(sources[0].key, PROMPT, 12, control)


async def test_an_engine_that_is_not_there(model, sources):
    engine = LocalEngine(EngineSpec(model, "cpu", "float32"))
    with pytest.raises(EngineUnavailableError):
        await engine.set_adapters(sources[:1])
    await engine.start(lambda *_: None)
    await engine.close()
    with pytest.raises(EngineUnavailableError):
        await engine.set_adapters(sources[:1])


async def test_a_restarted_engine_has_the_same_adapters(model, sources, oracles):
    engines = []

    def make():
        engines.append(LocalEngine(EngineSpec(model, "cpu", "float32")))
        return engines[-1]

    engine = Supervisor(make)
    await engine.start(lambda *_: None)
    control = engine.model.tokenizer.control_ids
    await engine.set_adapters(sources[:1])
    engines[0].abandon("It was lost.")
    with pytest.raises(EngineUnavailableError):
        await ids(engine, None)
    await engine._restart
    assert await ids(engine, sources[0].key) == oracles(sources[0].key, PROMPT, 12, control)
    await engine.close()
