"""Rounded weights: how exact they are, and when those in the cache are used."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from midfill.adapters.format import Adapter, Branch
from midfill.engine.openvino import int8_weights
from midfill.engine.openvino.int8_weights import QuantizedTensor, forget_merged, read_merged, read_weights
from midfill.errors import AdapterError, ModelError

MATRIX = "model.layers.0.mlp.gate_proj.weight"
VECTOR = "model.norm.weight"


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("MIDFILL_CACHE", str(tmp_path / "cache"))
    return tiny.write_model("llama", tmp_path / "model")


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Models of any size are kept; gives what is in the cache."""
    monkeypatch.setattr(int8_weights, "_MIN_CACHED_ELEMENTS", 0)
    return lambda: sorted(path.name for path in (tmp_path / "cache" / "rounded").iterdir())


def read(model, exact=lambda _: False):
    shares: list[float] = []
    weights = read_weights(model.path, exact=exact, num_threads=2, report=shares.append)
    return weights.tensors, shares


def test_matrices_are_rounded_by_rows_and_the_rest_is_exact(model):
    tensors, shares = read(model)
    for name, truth in load_file(model.path / "model.safetensors").items():
        found = tensors[name]
        if truth.ndim != 2:
            assert np.array_equal(found, truth.numpy())
            continue
        assert isinstance(found, QuantizedTensor)
        steps = np.abs(truth.numpy()).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(found.values * found.scales - truth.numpy()) <= steps / 2 * 1.0001)
    assert shares[-1] == pytest.approx(1.0)
    assert shares == sorted(shares)


def test_what_must_stay_exact_does(model):
    tensors, _ = read(model, exact=lambda name: name == MATRIX)
    truth = load_file(model.path / "model.safetensors")[MATRIX].numpy()
    assert np.array_equal(tensors[MATRIX], truth)


def test_small_models_are_not_kept(model, tmp_path):
    read(model)
    assert not (tmp_path / "cache").exists()


def test_a_kept_model_is_not_read_again(model, kept):
    first, shares = read(model)
    assert shares
    again, shares = read(model)
    assert not shares
    assert len(kept()) == 1
    for name, tensor in first.items():
        if isinstance(tensor, QuantizedTensor):
            assert np.array_equal(again[name].values, tensor.values)
            assert np.array_equal(again[name].scales, tensor.scales)
        else:
            assert np.array_equal(again[name], tensor)


def test_given_back_pages_come_back(model, kept):
    weights = read_weights(model.path, exact=lambda _: False, num_threads=1, report=lambda _: None)
    before = weights.tensors[MATRIX].values.copy()
    weights.release_pages()
    assert np.array_equal(weights.tensors[MATRIX].values, before)
    assert kept()


def test_changed_weights_replace_the_kept_ones(model, kept):
    read(model)
    [old] = kept()
    file = model.path / "model.safetensors"
    tensors = load_file(file)
    tensors[VECTOR] = torch.full_like(tensors[VECTOR], 3.0)
    save_file(tensors, file, metadata={"format": "pt"})
    found, _ = read(model)
    assert np.all(found[VECTOR] == 3.0)
    assert len(kept()) == 1
    assert kept() != [old]


def test_two_models_are_kept_side_by_side(model, kept, tmp_path):
    read(model)
    read(tiny.write_model("llama", tmp_path / "other" / "model", seed=1))
    assert len(kept()) == 2


def test_a_damaged_copy_is_made_anew(model, kept, tmp_path):
    first, _ = read(model)
    [name] = kept()
    file = tmp_path / "cache" / "rounded" / name / "integers.npy"
    file.write_bytes(file.read_bytes()[:-100])
    again, shares = read(model)
    assert shares
    assert np.array_equal(again[MATRIX].values, first[MATRIX].values)
    assert kept() == [name]


def test_without_a_cache_it_works_all_the_same(model, kept, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    tensors, _ = read(model)
    assert isinstance(tensors[MATRIX], QuantizedTensor)


def test_what_is_not_finite_is_refused_and_not_kept(model, kept):
    file = model.path / "model.safetensors"
    tensors = load_file(file)
    tensors[MATRIX][3, 3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file)
    with pytest.raises(ModelError, match="not finite"):
        read(model)
    assert kept() == []


def adapter_of(model, size, digest="a" * 64, scale=1.0):
    """One with a branch on `MATRIX`, whose values are about `size`."""
    outputs, inputs = load_file(model.path / "model.safetensors")[MATRIX].shape
    numbers = np.random.default_rng(int(digest[0], 16))
    down = numbers.standard_normal((4, inputs), np.float32) / 2
    up = size * numbers.standard_normal((outputs, 4), np.float32)
    branches = {MATRIX.removesuffix(".weight"): Branch(down, up, scale)}
    return Adapter(model.path / "adapter", digest, None, 4, branches)


def merged(model, adapter):
    base = read_weights(model.path, exact=lambda _: False, num_threads=1, report=lambda _: None)
    return base, read_merged(model.path, base, adapter, num_threads=1)


@pytest.mark.skipif(sys.platform == "win32", reason="modes mean nothing on Windows")
def test_kept_weights_are_their_owners_alone(model, kept, tmp_path):
    before = os.umask(0)
    try:
        folder = tmp_path / "cache" / "rounded"
        folder.mkdir(parents=True)
        read(model)
        assert kept()
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o077 == 0, path
    finally:
        os.umask(before)


@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_an_adapter_is_added_before_the_weights_are_rounded(model, size):
    """So even one whose values are far below a step of the rounded weights is not lost."""
    adapter = adapter_of(model, size)
    [branch] = adapter.branches.values()
    truth = load_file(model.path / "model.safetensors")[MATRIX].numpy()
    added = branch.up @ branch.down
    base, found = merged(model, adapter)
    before, after = (one.tensors[MATRIX].values * one.tensors[MATRIX].scales for one in (base, found))
    steps = found.tensors[MATRIX].scales
    assert np.all(np.abs(after - truth - added) <= steps / 2 * 1.001)
    # On the whole the change is what was added. With weights that were rounded before it would be nothing.
    share = float((added * (after - before)).sum() / (added * added).sum())
    assert 0.6 < share < 1.4
    assert np.abs(added).max() < (steps.min() if size < 1 else np.inf)


def test_the_base_is_left_as_it_is(model):
    first, _ = read(model)
    base, found = merged(model, adapter_of(model, 0.1))
    assert np.array_equal(base.tensors[MATRIX].values, first[MATRIX].values)
    assert all(found.tensors[name] is base.tensors[name] for name in first if name != MATRIX)


def test_merged_weights_are_kept_beside_those_of_the_base(model, kept):
    _, found = merged(model, adapter_of(model, 0.1))
    assert len(kept()) == 2
    before = found.tensors[MATRIX].values.copy()
    found.release_pages()
    assert np.array_equal(found.tensors[MATRIX].values, before)
    both = kept()
    _, again = merged(model, adapter_of(model, 0.1))
    assert np.array_equal(again.tensors[MATRIX].values, before)
    assert kept() == both
    # Another adapter takes the place of this one, and the base stays.
    _, other = merged(model, adapter_of(model, 0.1, "b" * 64))
    assert not np.array_equal(other.tensors[MATRIX].values, before)
    assert len(kept()) == 2
    assert len(set(kept()) & set(both)) == 1
    values = other.tensors[MATRIX].values.copy()
    forget_merged(model.path)
    assert set(kept()) < set(both)
    other.release_pages()
    assert np.array_equal(other.tensors[MATRIX].values, values)


def test_an_adapter_that_overflows_is_named(model):
    with pytest.raises(AdapterError, match="not finite"):
        merged(model, adapter_of(model, 1.0, scale=1e38))
