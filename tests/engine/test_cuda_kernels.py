"""The kernels of a captured pass, for models of real shapes in bf16 on "cuda:0", without a GPU or memory.

A GPU spends more time on a token of a small model the more kernels there are, so their number is a budget
that only falls. Attention counts as one.
"""

from __future__ import annotations

import pytest
import torch
from fake_cuda import FakeCuda
from transformers import AutoConfig, AutoModelForCausalLM

from midfill.bench.shapes import SHAPES
from midfill.engine.scheduler import Chunk, SequenceState
from midfill.engine.torch import fuse as fusing
from midfill.engine.torch.graph_shapes import GraphShape
from midfill.engine.torch.kv_cache import flash_kernel, packed_kernel
from midfill.engine.torch.runner import TorchRunner

PLACE = torch.device("cuda", 0)
PASSES = {
    "one token": GraphShape(1, 1, 2048),
    "four sequences": GraphShape(4, 1, 2048),
    "a key": GraphShape(1, 8, 2048),
    "a long prompt": GraphShape(1, 512, 2048),
    "a part of a prompt": GraphShape(1, 512, 2048, head=False),
}
# Kernels of one token with flash attention: per layer, and all others. Lower these, never raise them.
BUDGET = {"qwen2": (23, 42), "gpt_bigcode": (12, 35)}


class Device:
    """Where passes are captured: they are run once, under the eyes of `FakeCuda`."""

    def __init__(self, cuda):
        self.cuda = cuda
        self.found = None

    def capture(self, run):
        self.found = self.cuda.run(run)
        return run

    def has_room(self):
        return True


def build(name, num_layers):
    """A model of the real widths on the fake device; layers are all alike, so a few are enough."""
    config = dict(SHAPES[name])
    kind = config.pop("model_type")
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = num_layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **config), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


def put_on_device(model):
    made = {}
    for module in model.modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is None:
                continue
            if id(value) not in made:
                tensor = torch.empty(value.shape, dtype=value.dtype, device=PLACE)
                is_weight = isinstance(value, torch.nn.Parameter)
                made[id(value)] = torch.nn.Parameter(tensor, requires_grad=False) if is_weight else tensor
            store = module._parameters if name in module._parameters else module._buffers
            store[name] = made[id(value)]
        if hasattr(module, "original_inv_freq"):
            module.original_inv_freq = module.inv_freq


def passes(name, kernel, num_layers, monkeypatch):
    """Kernels and faults of each captured pass, and of one that is called."""
    model = build(name, num_layers)
    with FakeCuda() as cuda:
        put_on_device(model)
        # The replaced norms are compared by their values, which are not there.
        monkeypatch.setattr(torch, "allclose", lambda *_args, **_options: True)
        fusing.fuse(model)
        monkeypatch.undo()
        runner = TorchRunner(model, "bfloat16", PLACE)
        device = Device(cuda)
        runner.use_graphs(device, lambda _like, _heads: kernel, 4, 100 << 30)
        found = {}
        for title, shape in PASSES.items():
            runner._graphs._capture(shape)
            found[title] = device.found
        chunks = [
            Chunk(SequenceState(None, [1] * 40), 0, 0, [1] * 40, samples=True),
            Chunk(SequenceState(None, [1]), 1, 300, [1], samples=True),
        ]
        found["called"] = cuda.run(lambda: runner._logits(chunks, runner._cache))
        return found


@pytest.mark.parametrize("kernel", [flash_kernel, packed_kernel], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("name", list(SHAPES))
def test_no_pass_reads_on_the_host_or_mixes_devices(name, kernel, monkeypatch):
    found = passes(name, kernel, 2, monkeypatch)
    assert {title: faults for title, (_, faults) in found.items() if faults} == {}
    attention = {"_flash_attention_forward"} if kernel is flash_kernel else {"bmm"}
    for title in PASSES:
        assert attention <= found[title][0].keys()
    assert "bmm" in found["called"][0]


@pytest.mark.parametrize("name", list(SHAPES))
def test_the_kernels_of_a_token_stay_within_their_budget(name, monkeypatch):
    few, more = (passes(name, flash_kernel, layers, monkeypatch)["one token"][0] for layers in (1, 3))
    per_layer = (more - few).total() / 2
    others = few.total() - per_layer
    print(f"\n{name}: {per_layer:g} kernels per layer, {others:g} others: {dict(more - few)}, {dict(few)}")
    most_per_layer, most_others = BUDGET[SHAPES[name]["model_type"]]
    assert per_layer <= most_per_layer
    assert others <= most_others
