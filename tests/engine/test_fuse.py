"""Fused modules compute what the plain ones do, in fewer operations."""

from __future__ import annotations

import gc
import weakref

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from stepping import Sequences, expected, prompts
from torch.utils._python_dispatch import TorchDispatchMode

from midfill.engine.torch.fuse import fuse, fuse_projections
from midfill.engine.torch.runner import TorchRunner
from midfill.engine.torch.weights import build_model
from midfill.errors import ModelError
from midfill.models.safetensors_io import find_tensors

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


def build_fused(path):
    """The model of a folder, whose layers are fused while it is loaded."""
    options = {"num_threads": 1, "ahead": {}, "report": lambda _: None, "fused": True}
    return build_model(path, find_tensors(path), "float32", torch.device("cpu"), **options)


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


class AliveWeights(TorchDispatchMode):
    """Before each concatenation: the number of projections that are alive but not part of it."""

    def __init__(self, model):
        super().__init__()
        linears = [one for one in model.modules() if type(one) is torch.nn.Linear]
        self._weights = [weakref.ref(one.weight) for one in linears if one is not model.lm_head]
        self.counts = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.cat.default and args[0][0].ndim == 2:
            alive = [one() for one in self._weights]
            self.counts.append(sum(one is not None for one in alive))
        return operation(*args, **(kwargs or {}))


def test_the_layers_of_a_group_are_released_before_the_next_is_copied(tmp_path):
    model = tiny.build(tiny.write_model("llama", tmp_path).path, "float32")
    with AliveWeights(model) as alive:
        fuse(model)
    # Three layers: query, key and value become one, gate and up another. What remains of each layer is two.
    assert alive.counts == [21, 18, 16, 13, 11, 8]


def tensor_bytes():
    """The memory of all tensors that were made since `gc.freeze`."""
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and one.device.type == "cpu":
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.fixture
def only_new_objects():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_fused_layers_takes_the_weights_and_no_more(tmp_path, dtype):
    path = tiny.write_model("llama", tmp_path).path
    seen = []
    model = build_model(
        path,
        find_tensors(path),
        dtype,
        torch.device("cpu"),
        num_threads=1,
        ahead={},
        report=lambda _share: seen.append(tensor_bytes()),
        fused=True,
    )
    seen.append(tensor_bytes())
    weights = sum(one.untyped_storage().nbytes() for one in model.parameters())
    layer = sum(one.untyped_storage().nbytes() for one in model.model.layers[0].parameters())
    assert weights <= max(seen) <= weights + layer
    assert any(name.endswith("_shared.linear.weight") for name, _ in model.named_parameters())
    assert not fuse_projections(model)


@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_a_model_that_is_loaded_fused_gives_the_same_logits(tmp_path, kind):
    path = tiny.write_model(kind, tmp_path).path
    fused = build_fused(path)
    ids = torch.arange(50)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            fused(ids).logits, tiny.build(path, "float32")(ids).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["self_attn.k_proj.weight", "mlp.up_proj.weight", "self_attn.v_proj.bias"])
def test_a_tensor_of_a_fused_layer_at_fault_is_named(tmp_path, name):
    path = tiny.write_model("qwen2", tmp_path).path
    tensors = load_file(path / "model.safetensors")
    full = f"model.layers.1.{name}"

    def build():
        save_file(tensors, path / "model.safetensors")
        return build_fused(path)

    tensors[full].view(-1)[3] = float("nan")
    with pytest.raises(ModelError, match=rf"{full} holds values that are not finite"):
        build()
    tensors[full] = tensors[full][:5].contiguous().nan_to_num()
    with pytest.raises(ModelError, match=rf"{full} in .* has shape"):
        build()
    del tensors[full]
    with pytest.raises(ModelError, match=rf"for example {full}"):
        build()
