"""The engine's tokens equal those of transformers' `generate`, whatever is reused."""

from __future__ import annotations

import pytest
import tiny
import torch

from midfill.engine.openvino.graph import TENSOR_NAMES

KINDS = list(tiny.CONFIGS)
ALL = [
    *(("torch", kind) for kind in KINDS),
    *(("openvino", kind) for kind in TENSOR_NAMES),
    *(("llamacpp", kind) for kind in KINDS),
]
RUNNERS = ["torch", pytest.param("openvino", marks=pytest.mark.slow), "llamacpp"]
# llama.cpp looks GELU up in a table of 16-bit floats.
TOLERANCES = {("llamacpp", kind): 0.02 for kind in ("gpt_bigcode", "starcoder2", "gemma")}


class Models:
    """Tiny models, each in the form that a runner takes."""

    def __init__(self, folder):
        self._folder = folder
        self._made = {}

    def __getitem__(self, kind):
        return self.of("torch", kind)

    def of(self, runner, kind):
        # llama.cpp attends to all tokens.
        changes = {"sliding_window": None} if (runner, kind) == ("llamacpp", "starcoder2") else {}
        folder = self._folder / (f"{kind}-whole" if changes else kind)
        if folder not in self._made:
            self._made[folder] = tiny.write_model(kind, folder, **changes)
        return tiny.as_gguf(self._made[folder]) if runner == "llamacpp" else self._made[folder]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


def tokens_agree(model, ids, generated, expected, tolerance):
    """Whether the tokens are equal up to one where the reference's own choice is that close."""
    pairs = enumerate(zip(generated, expected, strict=False))
    at = next((at for at, (ours, theirs) in pairs if ours != theirs), None)
    if at is None or not tolerance:
        return generated == expected
    with torch.inference_mode():
        logits = model(torch.tensor([[*ids, *generated[:at]]])).logits[0, -1]
    return abs(float(logits[generated[at]] - logits[expected[at]])) <= tolerance


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [tiny.random_ids(generator, length) for length in lengths]


@pytest.mark.parametrize(("runner", "kind"), ALL)
async def test_tokens_and_log_probabilities_equal_generate(models, runner, kind):
    model = tiny.reference(models.of(runner, kind).path)
    tolerance = TOLERANCES.get((runner, kind), 0)
    async with tiny.running(models.of(runner, kind), runner=runner) as engine:
        control = engine.model.tokenizer.control_ids
        for ids in prompts(1, 1, 7, 64, 65, 200):
            tokens = await tiny.collect(engine, ids, 24)
            generated = [token.id for token in tokens]
            assert tokens_agree(model, ids, generated, tiny.oracle(model, ids, 24, control), tolerance)
            expected = tiny.logprobs(model, ids, generated)
            assert [token.logprob for token in tokens] == pytest.approx(expected, abs=tolerance or 1e-4)


@pytest.mark.parametrize(("runner", "kind"), ALL)
async def test_a_reused_prefix_changes_nothing(models, runner, kind):
    model = tiny.reference(models.of(runner, kind).path)
    tolerance = TOLERANCES.get((runner, kind), 0)
    [ids] = prompts(2, 150)
    async with tiny.running(models.of(runner, kind), runner=runner) as engine:
        control = engine.model.tokenizer.control_ids
        first = await tiny.collect_ids(engine, ids)
        assert await tiny.collect_ids(engine, ids) == first
        for end in (149, 100, 64, 1):
            cut = ids[:end]
            generated = await tiny.collect_ids(engine, cut)
            assert tokens_agree(model, cut, generated, tiny.oracle(model, cut, 16, control), tolerance)
        continued = [*ids, *first, 5]
        generated = await tiny.collect_ids(engine, continued)
        expected = tiny.oracle(model, continued, 16, control)
        assert tokens_agree(model, continued, generated, expected, tolerance)


async def test_the_stats_say_what_was_reused(models):
    [ids] = prompts(3, 100)
    async with tiny.running(models["qwen2"]) as engine:
        await tiny.collect(engine, ids, 4)
        request = tiny.Request((*ids[:90], 1, 2, 3), 4)
        _ = [token async for token in engine.generate(request)]
        stats = request.stats
        assert (stats.num_prompt, stats.num_reused) == (93, 90)
        assert stats.num_generated <= 4
        assert stats.submitted_s <= stats.started_s <= stats.first_token_s <= stats.ended_s


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("kind", ["gpt_bigcode", "qwen2", "llama"])
async def test_two_hundred_random_edits_change_nothing(models, runner, kind):
    model = tiny.reference(models.of(runner, kind).path)
    tolerance = TOLERANCES.get((runner, kind), 0)
    generator = torch.Generator().manual_seed(4)
    ids = tiny.random_ids(generator, 90)
    reused = 0
    async with tiny.running(models.of(runner, kind), runner=runner) as engine:
        control = engine.model.tokenizer.control_ids
        for _ in range(200):
            ids = tiny.edited(ids, generator)
            request = tiny.Request(tuple(ids), 4)
            generated = [token.id async for token in engine.generate(request)]
            assert tokens_agree(model, ids, generated, tiny.oracle(model, ids, 4, control), tolerance)
            reused += request.stats.num_reused
    assert reused > 200 * 60


@pytest.mark.parametrize("runner", RUNNERS)
async def test_several_documents_keep_their_own_past(models, runner):
    model = tiny.reference(models.of(runner, "llama").path)
    documents = prompts(5, 80, 90, 100, 110, 120)
    # Two of them begin alike, as documents with the same context do.
    documents[1] = documents[0][:70] + documents[1]
    async with tiny.running(models.of(runner, "llama"), runner=runner) as engine:
        control = engine.model.tokenizer.control_ids
        for turn in range(3):
            for document in documents:
                ids = [*document, turn]
                assert await tiny.collect_ids(engine, ids, 6) == tiny.oracle(model, ids, 6, control)


@pytest.mark.parametrize("runner", RUNNERS)
async def test_requests_at_the_same_time_get_their_own_tokens(models, runner):
    model = tiny.reference(models.of(runner, "qwen2").path)
    documents = prompts(6, 30, 70, 110, 50, 90, 20)
    async with tiny.running(models.of(runner, "qwen2"), runner=runner) as engine:
        control = engine.model.tokenizer.control_ids
        answers = await tiny.asyncio.gather(*(tiny.collect_ids(engine, ids, 8) for ids in documents))
    assert answers == [tiny.oracle(model, ids, 8, control) for ids in documents]


async def test_a_prewarmed_prompt_is_reused(models):
    model = tiny.reference(models["qwen2"].path)
    [ids] = prompts(7, 130)
    async with tiny.running(models["qwen2"]) as engine:
        control = engine.model.tokenizer.control_ids
        engine.prewarm(ids)
        # A request of another document ends after the prewarm began or goes before it; either is right.
        await tiny.collect(engine, [1, 2, 3], 1)
        engine.prewarm([])
        request = tiny.Request((*ids, 9), 8)
        generated = [token.id async for token in engine.generate(request)]
    assert generated == tiny.oracle(model, [*ids, 9], 8, control)


async def test_the_output_ends_where_the_context_ends(models):
    [ids] = prompts(8, 508)
    async with tiny.running(models["llama"]) as engine:
        assert len(await tiny.collect_ids(engine, ids, 50)) <= 4
        assert engine.model.context == 512


async def test_a_stop_id_ends_the_output_and_is_not_part_of_it(models):
    [ids] = prompts(9, 40)
    async with tiny.running(models["llama"]) as engine:
        free = await tiny.collect_ids(engine, ids, 12)
        stop = free[6]
        tokens = await tiny.collect(engine, ids, 12, stop_ids=frozenset({stop}))
        assert [token.id for token in tokens] == free[: free.index(stop)]
