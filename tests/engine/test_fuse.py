"""Fused modules compute what the plain ones do, in fewer operations."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from stepping import Sequences, expected, prompts
from torch.utils._python_dispatch import TorchDispatchMode

from midfill.engine.torch.fuse import fuse
from midfill.engine.torch.runner import TorchRunner

VIEWS = (
    "view",
    "transpose",
    "slice",
    "split",
    "expand",
    "unsqueeze",
    "select",
    "permute",
    "alias",
    "detach",
    "t.",
)


class Counting(TorchDispatchMode):
    """Counts the operations that would be kernels on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not any(view in str(operation) for view in VIEWS)
        return operation(*args, **(kwargs or {}))


def operations(model, ids):
    with torch.inference_mode(), Counting() as counting:
        model(ids)
    return counting.count


@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_logits_are_the_same_and_operations_fewer(tmp_path, kind):
    model = tiny.write_model(kind, tmp_path)
    plain, fused = tiny.build(model.path, "float32"), tiny.build(model.path, "float32")
    replaced = fuse(fused)
    ids = torch.arange(50)[None]
    with torch.inference_mode():
        torch.testing.assert_close(fused(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    before, after = operations(plain, ids), operations(fused, ids)
    print(f"{kind}: {before} operations, fused {after}")
    assert (after < before) == bool(replaced)
    # GPTBigCode has one projection and layer norms to begin with.
    assert bool(replaced) == (kind != "gpt_bigcode")


@pytest.mark.parametrize("kind", ["qwen2", "llama", "starcoder2", "gemma"])
def test_tokens_still_equal_generate(tmp_path, kind):
    path = tiny.write_model(kind, tmp_path).path
    model = tiny.build(path, "float32")
    fuse(model)
    [prompt] = prompts(1, 70)
    running = Sequences(TorchRunner(model, "float32", torch.device("cpu")), [prompt])
    for _ in range(20):
        running.step([0])
    assert running.tokens[0] == expected(path, prompt, 20)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21
def test_a_projection_with_an_adapter_stays_as_it_is(tmp_path):
    path = tiny.write_model("qwen2", tmp_path).path
    adapted = get_peft_model(
        tiny.build(path, "float32"),
        LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    ids = torch.arange(50)[None]
    with torch.inference_mode():
        before = adapted(ids).logits
        fuse(adapted)
        torch.testing.assert_close(adapted(ids).logits, before, rtol=1e-4, atol=1e-4)
    names = [name for name, _ in adapted.named_parameters()]
    assert any("lora_A" in name for name in names)
    assert any("q_proj.weight" in name for name in names)
    assert not any("gate_proj.weight" in name for name in names)


def test_projections_of_different_inputs_are_not_mixed_up(tmp_path):
    model = tiny.build(tiny.write_model("llama", tmp_path).path, "float32")
    attention = model.model.layers[0].self_attn
    plain = [attention.q_proj, attention.k_proj, attention.v_proj]
    fuse(model)
    one, other = torch.randn(1, 3, 48), torch.randn(1, 3, 48)
    with torch.inference_mode():
        for place, name, inputs in [
            (0, "q_proj", one),
            (1, "k_proj", other),
            (0, "q_proj", other),
            (2, "v_proj", one),
        ]:
            torch.testing.assert_close(getattr(attention, name)(inputs), plain[place](inputs))
