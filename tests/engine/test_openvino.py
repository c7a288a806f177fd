"""The OpenVINO runner beside transformers; that its tokens equal generate's is in `test_generate.py`."""

from __future__ import annotations

import os
import subprocess
import sys

import passes
import pytest
import tiny
import torch
from passes import chosen, chunk, expected, prompts

from midfill.engine.openvino import runner as openvino_runner
from midfill.engine.openvino.graph import TENSOR_NAMES, UnsupportedError, read_shape
from midfill.errors import EngineError, ModelError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model("qwen2", tmp_path_factory.mktemp("openvino") / "model")


@pytest.fixture
def runner(model):
    shape = read_shape(model.path)
    return openvino_runner.load(model.path, shape, dtype="float32", num_threads=1, report=lambda _: None)


def test_sequences_of_one_pass_do_not_see_each_other(model, runner):
    passes.check_that_sequences_of_one_pass_do_not_see_each_other(model, runner, (40, 1, 75), 33)


def test_a_part_of_a_prompt_chooses_nothing(model, runner):
    passes.check_that_a_part_of_a_prompt_chooses_nothing(model, runner)


def test_a_past_is_copied_and_memory_grows(model, runner):
    [ids] = prompts(3, 450)
    # More tokens than there is memory for at first, in several slots.
    for slot in range(6):
        assert chosen(runner.forward([chunk(ids, slot)], [None])) == [expected(model, ids)]
    other = [*ids[:100], 5]
    found = runner.forward([chunk(other, 6, 100, copy_from=3)], [None])
    assert chosen(found) == [expected(model, other)]
    runner.drop([0, 1, 2, 3, 4, 5, 6])
    assert chosen(runner.forward([chunk(ids, 9)], [None])) == [expected(model, ids)]


def logprobs(choices):
    return [choice.logprob for [choice] in choices]


@pytest.mark.parametrize("kind", TENSOR_NAMES)
def test_a_pass_in_parts_computes_what_one_graph_does(tmp_path, kind):
    path = tiny.write_model(kind, tmp_path / "model").path
    runners = [
        openvino_runner.load(
            path, read_shape(path), dtype="float32", num_threads=1, report=lambda _: None, num_parts=num_parts
        )
        for num_parts in (1, 2, 9)
    ]
    one, two = prompts(5, 90, 33)
    for pass_ in (
        [chunk(one, 0)],
        [chunk([*one, 7], 0, 90), chunk(two, 1)],
        [chunk([*one[:40], 5], 2, 40, copy_from=0)],
    ):
        whole, *parts = (runner.forward(pass_, [None] * len(pass_)) for runner in runners)
        for found in parts:
            assert chosen(found) == chosen(whole)
            assert logprobs(found) == pytest.approx(logprobs(whole), abs=1e-5)


def test_a_pass_that_was_left_goes_on_where_it_was_left(model, runner):
    [ids] = prompts(6, 50)
    asked = []
    # It has three parts.
    for at in (1, 2):
        asked[:] = [False] * at
        assert runner.forward([chunk(ids, 0)], [None], lambda: asked.pop() or not asked) is None
        assert asked == []
        assert chosen(runner.forward([chunk(ids, 0)], [None], lambda: asked.append(1))) == [
            expected(model, ids)
        ]
        assert len(asked) == 2 - at


@pytest.mark.parametrize("between", ["a pass", "other tokens", "freed slots"])
def test_a_pass_that_was_left_is_run_anew_if_something_came_between(model, runner, between):
    ids, other = prompts(7, 50, 50)
    runner.forward([chunk(other, 1)], [None])
    assert runner.forward([chunk(ids, 0)], [None], lambda: True) is None
    if between == "a pass":
        runner.forward([chunk(other, 0)], [None])
    elif between == "other tokens":
        ids[-1] ^= 1
    else:  # the last to be freed are the first to be used: those of the other prompt
        runner.drop([0, 1])
    asked = []
    assert chosen(runner.forward([chunk(ids, 0)], [None], lambda: asked.append(1))) == [expected(model, ids)]
    assert len(asked) == 2


def test_a_pass_that_was_left_is_run_anew_if_its_past_is_copied_again(model, runner):
    other, rest = prompts(8, 50, 30)
    runner.forward([chunk(other, 1)], [None])
    ids = other[:20] + rest
    # A copy is of whole blocks, so it writes over the first of what was computed.
    pass_ = [chunk(ids, 0, 20, copy_from=1)]
    assert runner.forward(pass_, [None], lambda: True) is None
    runner.forward(pass_, [None])
    found = runner.forward([chunk([*ids, 7], 0, 50)], [None])
    runner.drop([0])
    whole = runner.forward([chunk([*ids, 7], 0)], [None])
    assert logprobs(found) == pytest.approx(logprobs(whole), abs=1e-5)
    assert chosen(found) == [expected(model, [*ids, 7])]


def test_int8_is_nearly_the_same(model):
    shape = read_shape(model.path)
    rounded = openvino_runner.load(model.path, shape, dtype="int8", num_threads=1, report=lambda _: None)
    reference = tiny.reference(model.path)
    differences = []
    for ids in prompts(4, *range(20, 60)):
        [[choice]] = rounded.forward([chunk(ids, 0)], [None])
        with torch.inference_mode():
            logprobs = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        differences.append(float(logprobs.max() - logprobs[choice.id]))
    # What it chooses is never much less likely than the likeliest.
    assert max(differences) < 0.5


async def test_architectures_without_a_graph_are_run_by_torch(tmp_path):
    gemma = tiny.write_model("gemma", tmp_path / "gemma")
    with pytest.raises(UnsupportedError, match="gemma"):
        read_shape(gemma.path)
    with pytest.raises(EngineError, match="its architecture gemma is not supported"):
        async with tiny.running(gemma, runner="openvino"):
            pass
    async with tiny.running(gemma, dtype="auto") as engine:
        assert await tiny.collect_ids(engine, [1, 2, 3], 2)


async def test_what_openvino_does_not_serve_is_said(model):
    for options, reason in (
        ({"dtype": "bfloat16"}, "dtype bfloat16"),
        ({"device": "cuda"}, 'device "cuda"'),
    ):
        with pytest.raises(EngineError, match=reason):
            async with tiny.running(model, runner="openvino", **options):
                pass
    with pytest.raises(EngineError, match="no runner"):
        async with tiny.running(model, runner="vulkan"):
            pass


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
        ({"hidden_act": "relu"}, "relu"),
        ({"num_attention_heads": None}, "not as expected"),
    ],
)
def test_configurations_without_a_graph(tmp_path, changes, reason):
    model = tiny.write_model("llama", tmp_path / "model")
    tiny.edit_json(model.path / "config.json", **changes)
    with pytest.raises(UnsupportedError, match=reason):
        read_shape(model.path)


def test_weights_and_configuration_must_belong_together(tmp_path):
    def load(**changes):
        model = tiny.write_model("llama", tmp_path / "model")
        tiny.edit_json(model.path / "config.json", **changes)
        shape = read_shape(model.path)
        openvino_runner.load(model.path, shape, dtype="float32", num_threads=1, report=lambda _: None)

    with pytest.raises(ModelError, match=r"do not contain model\.layers\.3"):
        load(num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"does not describe, for example model\.layers\.2"):
        load(num_hidden_layers=2)
    with pytest.raises(ModelError, match="has shape"):
        load(num_key_value_heads=4)


def test_the_librarys_telemetry_is_not_loaded_and_leaves_no_file(model, tmp_path):
    code = f"""
import sys
events = []
sys.addaudithook(lambda name, _: events.append(name) if name.startswith(("socket.", "subprocess.")) else None)
from pathlib import Path
from midfill.engine.openvino import runner as openvino_runner
from midfill.engine.openvino.graph import read_shape
path = Path({str(model.path)!r})
runner = openvino_runner.load(path, read_shape(path), dtype="int8", num_threads=1, report=lambda _: None)
runner.warm_up(4)
loaded = [name for name, module in sys.modules.items() if "openvino_telemetry" in name and module is not None]
print(loaded, events, [name for name in ("torch", "transformers") if name in sys.modules])
"""
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "USERPROFILE": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert out.strip() == "[] [] []"
    assert list((tmp_path / "home").iterdir()) == []


_MANY_LENGTHS = """
import sys
from pathlib import Path

import psutil

from midfill.engine.openvino import runner as openvino_runner
from midfill.engine.openvino.graph import read_shape
from midfill.engine.scheduler import Chunk, SequenceState

path = Path(sys.argv[1])
runner = openvino_runner.load(path, read_shape(path), dtype="int8", num_threads=1, report=lambda _: None)


def run(length):
    prompt = SequenceState(None, [5] * length)
    runner.forward([Chunk(prompt, 0, 0, prompt.tokens, samples=True)], [None])


run(300)
before = psutil.Process().memory_info().rss
for length in range(1, 257):
    run(length)
print(psutil.Process().memory_info().rss - before)
"""


def test_memory_does_not_grow_with_each_new_length_of_a_pass(model):
    program = [sys.executable, "-c", _MANY_LENGTHS, str(model.path)]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    # 345 MB with the caches as they are by default, 176 with a bound on OpenVINO's alone, 8 with both.
    assert int(done.stdout) < 80e6
