"""A base in int8 learns what a float32 base learns, as far as rounding allows; and takes less memory."""

import math

import pytest
import tiny
import torch
from peft import PeftModel
from torch import nn

from midfill.models.store import LocalModel
from midfill.settings import Settings
from midfill.training import data, quantized_base
from midfill.training.model import Adapted, Recipe
from midfill.training.trainer import Trainer

KINDS = ("gpt_bigcode", "qwen2", "llama", "starcoder2")
SETTINGS = Settings(family="stable-code", prefix_tokens=64, suffix_tokens=32, dtype="float32")
RECIPE = Recipe(learning_rate=1e-2, rank=4, alpha=8, batch=4)


def base(kind, folder):
    tiny.write_model(kind, folder)
    return LocalModel(f"tiny-{kind}", folder, None, "made here")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return base("qwen2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def examples(model):
    return data.build_general_examples(model, SETTINGS, seed=5, count=15)


def adapted(model, form="int8"):
    return Adapted(model, RECIPE, num_threads=1, yields=False, base_weights=form)


def gradients(made, example):
    """The loss of an example and its gradients, with branches that do something already."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.parameters.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    made.train_mode()
    torch.manual_seed(4)
    loss = made.losses(example).sum()
    loss.backward()
    return [loss.detach(), *(one.grad for one in made.parameters.values())]


def rounding(made, example):
    """How far two float32 gradients may be apart of which only the order of the sums differs.

    Relative to the largest. Each addition rounds by half an epsilon at most, to either side, so the errors
    of n of them add up to about the root of n. One number goes through all products of matrices on the way
    there, and through two for each on the way back; four times the expected error is beyond chance.
    """
    weights = [one.weight for one in made.peft.modules() if isinstance(one, nn.Linear)]
    longest = max(len(example.prompt) + len(example.target), *(max(one.shape) for one in weights))
    return 4 * torch.finfo(torch.float32).eps * math.sqrt(longest * 3 * len(weights))


def put_in(root, name, module):
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_rounded_weights(kind, examples, tmp_path, monkeypatch):
    # Several blocks, the last of which is smaller.
    monkeypatch.setattr(quantized_base, "_BLOCK_ELEMENTS", 20 * 48)
    model = base(kind, tmp_path)
    small, reference = adapted(model), adapted(model, "float32")
    changed = 0
    inside = reference.peft.base_model.model
    embedding = small.peft.base_model.model.get_input_embeddings()
    for name, one in list(small.peft.base_model.model.named_modules()):
        if isinstance(one, quantized_base.FrozenInt8Linear):
            plain = nn.Linear(one.in_features, one.out_features, one.bias is not None)
            plain.weight = nn.Parameter(one.weight.float() * one.scales[:, None], requires_grad=False)
            if one.bias is not None:
                plain.bias = nn.Parameter(one.bias.clone(), requires_grad=False)
            put_in(inside, name, plain)
            changed += 1
    table = embedding.weight.float() * embedding._scales
    inside.get_input_embeddings().weight = nn.Parameter(table, requires_grad=False)
    assert changed == len(small.layers) + 1
    found, expected = gradients(small, examples[0]), gradients(reference, examples[0])
    assert any(one.abs().max() > 1e-2 for one in expected[1:])
    allowed = rounding(reference, examples[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=allowed, atol=allowed * float(theirs.abs().max()))
    tied = small.peft.base_model.model.get_output_embeddings().weight is embedding.weight
    assert tied == small.peft.config.tie_word_embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_computed_again_is_what_was_computed(kind, examples, tmp_path, monkeypatch):
    model = base(kind, tmp_path)
    found = gradients(adapted(model), examples[0])
    monkeypatch.setattr("midfill.training.model.checkpoint_activations", lambda _: None)
    expected = gradients(adapted(model), examples[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_less_is_kept_for_the_way_back(model, examples, monkeypatch):
    def kept(made):
        """Bytes, without weights."""
        made.train_mode()
        weights = {one.untyped_storage().data_ptr() for one in made.peft.parameters()}
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made.losses(examples[0])
        return sum(storages.values())

    less = kept(adapted(model))
    monkeypatch.setattr("midfill.training.model.checkpoint_activations", lambda _: None)
    everything = kept(adapted(model))
    assert less < 0.6 * everything


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_training_ends_as_with_float32_and_its_adapter_fits_a_float32_base(model, examples, tmp_path):
    part, losses, mades = examples[:12], {}, {}
    for form in ("float32", "int8"):
        made = mades[form] = adapted(model, form)
        before = sum(map(made.loss_sum, part))
        folder = tmp_path / form
        trainer = Trainer(made, RECIPE, part, folder / "checkpoint", {}, bool, lambda *_: None)
        trained = trainer.run(60, max_steps=12)
        losses[form] = (before, sum(map(made.loss_sum, part)), *trained.losses)
        made.save(folder / "adapter")
    # Rounding the base moves the loss by a small part of what is learnt.
    learnt = losses["float32"][0] - losses["float32"][1]
    assert learnt > 0.1 * losses["float32"][0]
    assert abs(losses["int8"][1] - losses["float32"][1]) < 0.05 * learnt
    for float32, int8 in zip(losses["float32"], losses["int8"], strict=True):
        assert int8 == pytest.approx(float32, rel=0.03)
    # The branches know nothing of the form: on the float32 base ours and PEFT's give the same logits.
    ours = adapted(model, "float32")
    ours.load(tmp_path / "int8" / "adapter")
    theirs = PeftModel.from_pretrained(tiny.reference(model.path), tmp_path / "int8" / "adapter").eval()
    for example in examples[12:]:
        with torch.inference_mode():
            expected = theirs(torch.tensor([example.prompt])).logits[0, -1]
        assert torch.allclose(ours.probe_logits(example), expected, atol=1e-4)
        assert not torch.allclose(mades["float32"].probe_logits(example), expected, atol=1e-4)
