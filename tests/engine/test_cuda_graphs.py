"""Captured passes, without a device: the test's own calls the pass instead of replaying it.

All else is the real thing, on the CPU in fp32: padding, buckets, several rows, the token that is fed back,
steps that run ahead. The tokens equal those of `generate` and of passes that are not captured.
"""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
import tiny
import torch
from stepping import Recorder, Sequences, expected, prompts

from midfill.engine.local import load
from midfill.engine.runner import FixedMemoryError
from midfill.engine.scheduler import Chunk, SequenceState
from midfill.engine.torch.cuda_graphs import MARGIN, GraphRunner
from midfill.engine.torch.fuse import fuse
from midfill.engine.torch.graph_shapes import GraphShape
from midfill.engine.torch.kv_cache import FixedKVCache, flash_kernel, packed_kernel
from midfill.engine.torch.runner import TorchRunner

KINDS = list(tiny.CONFIGS)
GIGABYTE = 1 << 30


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.write_model(kind, folder / kind) for kind in KINDS}


def make(path, *, captures=15):
    """A runner with the first passes captured: all widths at one length, two at a shorter one."""
    recorder = Recorder()
    runner = plain(path)
    runner.use_graphs(recorder, lambda _like, _heads: packed_kernel, 4, GIGABYTE)
    for _ in range(captures):
        if not runner.idle():
            break
    recorder.num_replays = 0
    return runner, recorder


def plain(path):
    return TorchRunner(tiny.build(path, "float32"), "float32", torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("captures", [1, 15, pytest.param(1000, marks=pytest.mark.slow)])
def test_one_sequence_equals_generate(models, kind, captures):
    path = models[kind].path
    runner, recorder = make(path, captures=captures)
    for prompt in prompts(1, 1, 7, 70, 290):
        running = Sequences(runner, [prompt])
        while len(running.tokens[0]) < len(prompt) + 20:
            running.step([0], most=64)
        assert running.tokens[0] == expected(path, prompt, 20)
        found = tiny.logprobs(tiny.reference(path), prompt, running.tokens[0][len(prompt) :])
        assert running.logprobs[0] == pytest.approx(found, abs=1e-4)
    assert recorder.num_replays > 60


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("captured", [False, True])
def test_batched_equals_alone_equals_generate(models, kind, captured):
    path = models[kind].path
    runner = make(path)[0] if captured else plain(path)
    documents = prompts(2, 30, 120, 3, 77)
    running = Sequences(runner, documents)
    # The prompts differ in length, so that chunks of prompts and single tokens share steps.
    for _ in range(20):
        running.step([3, 0, 1, 2], most=50)
    for slot, prompt in enumerate(documents):
        generated = running.tokens[slot][len(prompt) :]
        assert len(generated) >= 16
        assert running.tokens[slot] == expected(path, prompt, len(generated))


def test_decode_steps_run_ahead_of_their_reader(models):
    runner, recorder = make(models["qwen2"].path)
    [prompt] = prompts(3, 40)
    running = Sequences(runner, [prompt])
    for _ in range(10):
        running.step([0])
    # While the first result was waited for, two more steps were under way, and so on.
    assert recorder.waits == [2] * 10
    assert recorder.num_replays == 12
    assert running.tokens[0] == expected(models["qwen2"].path, prompt, 10)


def test_only_one_slow_step_runs_ahead(models):
    runner, recorder = make(models["qwen2"].path)
    [prompt] = prompts(3, 40)
    for step_s, ahead in ((0.004, 1), (0.001, 2)):
        runner._graphs.set_step_duration(step_s)
        running = Sequences(runner, [prompt])
        recorder.waits.clear()
        for _ in range(4):
            running.step([0])
        assert recorder.waits == [ahead] * 4


def test_one_part_of_a_prompt_is_read_while_the_next_is_prepared(models):
    path = models["qwen2"].path
    runner, recorder = make(path)
    [prompt] = prompts(16, 300)
    for step_s, waits in ((0.004, [0, 0, 0, 0]), (0.001, [1, 1, 1])):
        runner._graphs.set_step_duration(step_s)
        recorder.waits.clear()
        running = Sequences(runner, [prompt])
        for _ in range(4):
            assert running.step([0], most=64) == [None]
        assert recorder.waits == waits
        for _ in range(4):
            running.step([0], most=64)
        assert running.tokens[0] == expected(path, prompt, 4)


def test_capturing_while_the_model_loads(models):
    runner, recorder = make(models["llama"].path, captures=0)
    shares = []
    runner.capture(shares.append, limit_s=0.5)
    assert shares == sorted(shares)
    assert 0 < runner._graphs.num_captured <= len(shares) + 1
    [prompt] = prompts(15, 40)
    running = Sequences(runner, [prompt])
    recorder.num_replays = 0
    for _ in range(5):
        running.step([0])
    assert recorder.num_replays > 0
    assert running.tokens[0] == expected(models["llama"].path, prompt, 5)


def test_sequences_that_run_ahead_together_may_end_one_by_one(models):
    path = models["llama"].path
    runner, recorder = make(path)
    documents = prompts(4, 20, 33, 41)
    running = Sequences(runner, documents)
    for slots in [[0, 1, 2]] * 4 + [[0, 2]] * 4 + [[2]] * 4:
        running.step(slots)
    assert [len(running.tokens[slot]) - len(documents[slot]) for slot in range(3)] == [8, 4, 12]
    for slot, prompt in enumerate(documents):
        count = len(running.tokens[slot]) - len(prompt)
        assert running.tokens[slot] == expected(path, prompt, count)
    # The prompts are too long for one pass. Nothing is computed twice: two steps at the end are for nothing.
    assert recorder.num_replays == 3 + 11 + 2


def test_another_request_comes_between(models):
    path = models["gpt_bigcode"].path
    runner, _ = make(path)
    documents = prompts(5, 60, 25)
    running = Sequences(runner, documents)
    for slots in [[0], [0], [1], [0], [1], [1], [0, 1], [1, 0], [0]]:
        running.step(slots)
    for slot, prompt in enumerate(documents):
        count = len(running.tokens[slot]) - len(prompt)
        assert running.tokens[slot] == expected(path, prompt, count)


def test_a_cut_past_is_written_anew_though_steps_ran_ahead(models):
    path = models["qwen2"].path
    runner, _ = make(path)
    [prompt] = prompts(6, 90)
    running = Sequences(runner, [prompt])
    for end in (90, 75, 60, 59, 10):
        for _ in range(4):
            running.step([0])
        assert running.tokens[0][-4:] == expected(path, running.tokens[0][:-4], 4)[-4:]
        running.tokens[0] = [*prompt[:end], end]
        running.computed[0] = end
    running.step([0])
    assert running.tokens[0] == expected(path, [*prompt[:10], 10], 1)


def test_the_same_place_with_another_token_is_not_what_ran_ahead(models):
    path = models["qwen2"].path
    runner, _ = make(path)
    [prompt] = prompts(7, 30)
    running = Sequences(runner, [prompt])
    running.step([0])
    typed = (running.tokens[0][-1] + 1) % 256
    running.tokens[0][-1] = typed
    running.step([0])
    assert running.tokens[0] == expected(path, [*prompt, typed], 1)


def test_a_copied_past_is_not_what_ran_ahead(models):
    path = models["llama"].path
    runner, _ = make(path)
    documents = prompts(8, 40, 40)
    running = Sequences(runner, documents)
    running.step([1])
    running.step([0])
    # Slot 0 now gets the past of slot 1, and the very token that its next step was to compute.
    token = running.tokens[0][-1]
    chunk = Chunk(SequenceState(None, []), 0, 40, [token], samples=True, copy_from=1)
    [[choice]] = runner.forward([chunk], [None])
    assert [choice.id] == expected(path, [*documents[1], token], 1)[-1:]


def test_a_constrained_choice_is_made_from_the_same_pass(models):
    path = models["qwen2"].path
    captured, recorder = make(path)
    [prompt] = prompts(9, 50)
    running, reference = Sequences(captured, [prompt]), Sequences(plain(path), [prompt])
    for ids in ([5, 9, 200], None, None, [17, 3], None, None):
        constraint = [None if ids is None else array("q", ids)]
        [found] = running.step([0], allowed=constraint)
        [wanted] = reference.step([0], allowed=constraint)
        assert found.id == wanted.id
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert ids is None or found.id in ids
    # After a demand nothing runs ahead: the next one depends on its token.
    assert recorder.waits[0] == recorder.waits[3] == 0


@pytest.mark.parametrize("length", [5, 60, 150], ids=lambda length: f"{length}-tokens")
@pytest.mark.parametrize("num_right", [0, 2, 7])
def test_guesses_are_verified_in_the_same_pass(models, length, num_right):
    path = models["qwen2"].path
    runner, recorder = make(path)
    [prompt] = prompts(17, length)
    right = expected(path, prompt, 10)[length:]
    guesses = [token if i < num_right else (token + 1) % 256 for i, token in enumerate(right[:7])]
    chunk = Chunk(SequenceState(None, []), 0, 0, [*prompt, *guesses], samples=True, num_draft_tokens=7)
    [found] = runner.forward([chunk], [None])
    assert [choice.id for choice in found] == right[: num_right + 1]
    assert recorder.num_replays == 1
    # What a wrong guess has left in the slot is written anew.
    running = Sequences(runner, [[*prompt, *right[: num_right + 1]]])
    running.computed[0] = length + num_right
    for _ in range(9 - num_right):
        running.step([0])
    assert running.tokens[0] == [*prompt, *right]


def test_a_step_without_a_captured_pass_runs_without(models):
    path = models["starcoder2"].path
    runner, recorder = make(path, captures=0)
    [prompt] = prompts(10, 100)
    running = Sequences(runner, [prompt])
    for _ in range(6):
        running.step([0])
    assert recorder.num_replays == 0
    # Now one is there, for one token; what was computed without is in the same memory.
    assert runner.idle()
    for _ in range(6):
        running.step([0])
    assert recorder.num_replays == 6 + 2
    assert running.tokens[0] == expected(path, prompt, 12)


def test_captures_leave_the_slots_alone(models):
    path = models["gemma"].path
    runner, _ = make(path, captures=3)
    [prompt] = prompts(11, 200)
    running = Sequences(runner, [prompt])
    running.step([0])
    for _ in range(12):
        assert runner.idle()
    for _ in range(9):
        running.step([0])
    assert running.tokens[0] == expected(path, prompt, 10)


def test_steps_do_not_run_ahead_beyond_the_context(models):
    path = models["gpt_bigcode"].path  # one learned position too many would be an error
    runner, recorder = make(path)
    [prompt] = prompts(12, 507)
    running = Sequences(runner, [prompt])
    for _ in range(5):
        running.step([0])
    assert recorder.waits == [2, 2, 2, 2, 1]
    assert running.tokens[0] == expected(path, prompt, 5)


def test_less_memory_is_a_shorter_context(models):
    path = models["llama"].path
    runner = plain(path)
    token_bytes = 3 * 2 * 2 * 12 * 4
    runner.use_graphs(Recorder(), lambda _like, _heads: packed_kernel, 4, 3 * 4 * 300 * token_bytes)
    assert runner.context == 256


def test_a_pass_that_did_not_fit_is_tried_once_more_and_the_graphs_stay(models):
    path = models["qwen2"].path
    runner, recorder = make(path)
    [prompt] = prompts(13, 30)
    running = Sequences(runner, [prompt])
    running.step([0])
    for errors in (1, 2):
        recorder.error, recorder.num_errors = torch.OutOfMemoryError("CUDA out of memory"), errors
        running.tokens[0] = [*prompt, 7]
        running.computed[0] = 30
        if errors == 2:
            with pytest.raises(FixedMemoryError):
                running.step([0])
        replays = recorder.num_replays
        for _ in range(3):
            running.step([0])
        assert recorder.num_replays >= replays + 3
        assert running.tokens[0] == expected(path, [*prompt, 7], 3)
    # Nothing is captured for a while.
    assert not runner.idle()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [packed_kernel, flash_kernel], ids=lambda kernel: kernel.__name__)
def test_a_pass_asks_for_no_value_on_the_host(models, kind, kernel):
    """What cannot be captured fails here too: tensors without values, on a device of their own, in bf16."""
    meta = torch.device("meta")
    model = tiny.build(models[kind].path, "bfloat16")
    fuse(model)
    runner = TorchRunner(model, "bfloat16", torch.device("cpu"))
    with torch.inference_mode():
        runner.forward([Chunk(SequenceState(None, []), 0, 0, [1], samples=False)], [None])
        like = [tuple(x.to(meta) for x in runner._cache.entries(layer, 0, 1)) for layer in range(3)]
        model.to(meta)
        replays = GraphRunner(
            runner.run,
            FixedKVCache(like, 4, 512 + MARGIN),
            context=512,
            vocab_size=runner.vocab_size,
            kernel=kernel,
            lora=runner._lora,
            device=Recorder(),
            tensor_device=meta,
        )
        for shape in (
            GraphShape(1, 1, 256),
            GraphShape(4, 8, 512),
            GraphShape(1, 128, 512),
            GraphShape(1, 512, 1024, head=False),
        ):
            replays._run(shape)
    assert like[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["gpt_bigcode", "qwen2"])
async def test_the_engine_on_captured_passes_equals_generate(models, kind):
    """Cancellation, reuse, random edits: the whole loop on captured passes."""
    path = models[kind].path
    reference = tiny.reference(path)

    def load_captured(spec, progress):
        loaded = load(spec, progress)
        runner, _ = make(path)
        return replace(loaded, runner=runner)

    generator = torch.Generator().manual_seed(14)
    ids = tiny.random_ids(generator, 90)
    async with tiny.running(models[kind], load_model=load_captured) as engine:
        control = engine.model.tokenizer.control_ids
        for turn in range(60):
            ids = tiny.edited(ids, generator, 1 + turn % 4)
            if turn % 3 == 0:
                await tiny.cancel(engine, ids)
            assert await tiny.collect_ids(engine, ids, 6) == tiny.oracle(reference, ids, 6, control)
