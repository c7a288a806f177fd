"""Load weights from safetensors files into a transformers model, tensor by tensor.

The model is built without memory for its parameters. Then each tensor is read, checked and stored in the form
that the dtype plan asks for, so that the peak is the finished model plus a few blocks (see `safetensors_io`).
Code in a model's folder is never run.

Knows modules; nothing of caches or requests. Runs on the engine thread and, while a model loads, on a few
more threads.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM

from midfill.engine.torch.fuse import SharedProjection, fuse_norms, fuse_projections
from midfill.engine.torch.quantize import Int8Embedding, Int8Linear, Int8Weight
from midfill.engine.torch.weight_only import Int4Linear, Int4Weight, Int8WeightLinear, fits
from midfill.errors import ModelError
from midfill.models.safetensors_io import read_blocks
from midfill.models.store import read_config

_HARMLESS = re.compile(r"(\.attn\.(masked_)?bias|\.masked_bias|\.rotary_emb\.inv_freq)$")
"""Buffers that old checkpoints contain and that the modules compute themselves."""

# More than any model has: each layer is made before its weights are looked for.
_LARGEST = {"num_hidden_layers": 1000, "hidden_size": 1 << 20, "vocab_size": 1 << 20}
_COMPUTE = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""The type of weights and activations, for formats that have one."""

_QUANTIZED = {"int8", "int4"}
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
"""Layers whose past can be cut at any token, which reuse needs. Recurrent states cannot be cut."""


def build_model(
    path: Path,
    files: dict[str, Path],
    dtype: str,
    device: torch.device,
    *,
    num_threads: int,
    ahead: dict[str, Future[Int8Weight]],
    report: Callable[[float], None],
    int8_linear: Callable[[Int8Weight, torch.Tensor | None], nn.Module] = Int8Linear,
    fused: bool = False,
    compute: torch.dtype | None = None,
    packed: bool = True,
) -> Any:
    """Build the model of the folder `path`, ready for inference.

    Args:
        path: folder with `config.json`.
        files: the file of each tensor; see `safetensors_io.find_tensors`.
        dtype: "int8", "int4", "float32", "bfloat16" or "float16".
        device: where the weights go.
        num_threads: number of layers that are read and packed at a time.
        ahead: int8 weights that are being built already, by the names of their tensors.
        report: called with the share done, 0..1; an exception raised by it ends the loading.
        int8_linear: makes a linear layer of its weight and bias, for "int8".
        fused: compute layers of the same input as one, see `fuse`; their weights are read into one tensor.
        compute: type of the activations with "int8" and "int4"; with None float32, and with "int8" the layers
            of `quantize`, whose activations have 8 bits.
        packed: use torch's packed products with 4-bit weights where the device has them.

    Returns:
        A transformers `PreTrainedModel` in eval mode, without gradients.

    Raises:
        ModelError: the folder does not hold a model that can be run; names the file or tensor at fault.
    """
    model = _empty_model(path, _COMPUTE.get(dtype) or compute or torch.float32)
    layers = _Layers(device, compute or torch.float32, int8_linear, packed=packed)
    if dtype == "int8" and compute is not None:
        layers.int8_linear = layers.int8_weight_linear
    shared = fuse_projections(model) if fused else []
    loader = _Loader(model, files, dtype, device, layers, shared=shared, ahead=ahead, report=report)
    loader.run(num_threads)
    model.to(device)  # moves the buffers; the parameters are there already
    if fused:
        fuse_norms(model)
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model


def _empty_model(path: Path, dtype: torch.dtype) -> Any:
    read_config(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its config classes raise
        raise ModelError(
            f"{path / 'config.json'} is not the configuration of a known model: {error}"
        ) from error
    for size, most in _LARGEST.items():
        value = getattr(config, size, 1)
        if type(value) is not int or not 0 < value <= most:
            raise ModelError(
                f"{path / 'config.json'} says {size} is {str(value)[:40]}; the maximum is {most}."
            )
    foreign = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if foreign:
        raise ModelError(
            f"{path} has layers of type {', '.join(sorted(foreign))}, whose past cannot be cut and reused; "
            "use a model with plain attention."
        )
    try:
        with parameters_on_meta():
            return AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", dtype=dtype, trust_remote_code=False
            )
    except Exception as error:
        raise ModelError(f"{path} cannot be run as a causal language model: {error}") from error


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Give the modules made in this thread parameters without memory, on torch's meta device.

    Buffers stay real: rotary frequencies are computed by the modules and are in no file. So
    `torch.device("meta")`, which affects every tensor, cannot be used.
    """
    this_thread = threading.get_ident()

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> Any:
        if parameter.is_meta or threading.get_ident() != this_thread:
            return None  # leaves it as it is
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


class _Layers:
    """Makes the layers that hold quantized weights.

    Args:
        device: where they go.
        compute: type of the activations.
        int8_linear: see `build_model`.
        packed: see `build_model`.
    """

    def __init__(
        self,
        device: torch.device,
        compute: torch.dtype,
        int8_linear: Callable[[Int8Weight, torch.Tensor | None], nn.Module],
        *,
        packed: bool,
    ) -> None:
        self.compute = compute
        self.int8_linear = int8_linear
        self._device = device
        self._packed = packed

    def int8_weight_linear(self, weight: Int8Weight, bias: torch.Tensor | None) -> nn.Module:
        """Return a linear layer with 8-bit weights."""
        return Int8WeightLinear(weight, bias, self._device, self.compute)

    def int4_linear(self, weight: Int4Weight, bias: torch.Tensor | None) -> nn.Module:
        """Return a linear layer with 4-bit weights."""
        return Int4Linear(weight, bias, self._device, packed=self._packed)

    def embedding(self, weight: Int8Weight, padding_idx: int | None) -> nn.Module:
        """Return an embedding with 8-bit rows."""
        return Int8Embedding(weight, padding_idx, self._device, self.compute)


class _Loader:
    """Loads the tensors of the files into the modules of one model."""

    def __init__(
        self,
        model: Any,
        files: dict[str, Path],
        dtype: str,
        device: torch.device,
        layers: _Layers,
        *,
        shared: Sequence[SharedProjection],
        ahead: dict[str, Future[Int8Weight]],
        report: Callable[[float], None],
    ) -> None:
        self._model = model
        self._files = files
        self._dtype = dtype
        self._device = device
        self._ahead = ahead
        self._report = report
        self._layers = layers
        self._embedding = model.get_input_embeddings()
        # Names without a tensor in the files, to the name whose tensor they share.
        self._tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._shared = {one.linear: one for one in shared}

    def run(self, num_threads: int) -> None:
        """Check the names, then load the largest modules first, while memory for scratch space is still free.

        Packing int8 weights is single-threaded, so several layers are loaded at a time.
        """
        self._check_names()
        own = [item for item in self._modules.items() if _parameters(item[1]) or _stored(item[1])]
        own.sort(key=lambda item: -_num_elements(item[1]))
        total = sum(_num_elements(module) for _, module in own)
        done = 0
        with ThreadPoolExecutor(num_threads, thread_name_prefix="midfill-load") as pool:
            tasks = {pool.submit(self._load, name, module): _num_elements(module) for name, module in own}
            try:
                for task in as_completed(tasks):
                    task.result()
                    done += tasks[task]
                    self._report(done / total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if self._dtype not in _QUANTIZED:
            self._model.tie_weights()

    def _load(self, name: str, module: nn.Module) -> None:
        with torch.inference_mode(mode=False), torch.no_grad():
            quantized = self._dtype in _QUANTIZED
            if quantized and type(module) is nn.Linear:
                if self._dtype == "int4" and fits(module.weight.shape):
                    self._load_int4(name, module)
                else:
                    self._load_int8(name, module)
            # Some models scale inside a subclass of Embedding; those stay as they are.
            elif quantized and type(module) is nn.Embedding and module is self._embedding:
                self._load_embedding(name, module)
            else:
                self._load_plain(name, module)

    def _check_names(self) -> None:
        expected = {
            tensor
            for name, module in self._modules.items()
            for key, value in [*_parameters(module).items(), *_stored(module).items()]
            for tensor, _ in self._sources(_join(name, key), value.shape)
        }
        missing = sorted(expected - self._files.keys())
        if missing:
            raise ModelError(
                f"The weights do not contain {len(missing)} tensors that config.json requires, "
                f"for example {missing[0]}. Pull the model again."
            )
        unknown = sorted(
            name
            for name in self._files.keys() - expected
            if name not in self._tied and not _HARMLESS.search(name)
        )
        if unknown:
            raise ModelError(
                f"The weights contain {len(unknown)} tensors that config.json does not describe, "
                f"for example {unknown[0]}. Use weights and a config.json of the same model."
            )

    def _sources(self, name: str, shape: torch.Size) -> list[tuple[str, torch.Size]]:
        """Return the tensors of the files, and their shapes, whose rows make up a tensor of the model."""
        module, _, key = name.rpartition(".")
        if (shared := self._shared.get(module)) is None:
            return [(self._tied.get(name, name), shape)]
        return [
            (_join(part, key), torch.Size((size, *shape[1:])))
            for part, size in zip(shared.parts, shared.sizes, strict=True)
        ]

    def _blocks(self, name: str, shape: torch.Size, *, check: bool = True) -> Iterator[torch.Tensor]:
        """Yield blocks of a tensor's rows; see `safetensors_io.read_blocks`.

        Raises `ModelError` at NaN or infinity, unless the caller looks for them (`check`).
        """
        for tensor, part in self._sources(name, shape):
            for block in read_blocks(self._files[tensor], tensor, part):
                # The extremes reveal NaN and infinity without memory of the block's size.
                if (
                    check
                    and block.numel()
                    and not all(math.isfinite(extreme) for extreme in torch.aminmax(block))
                ):
                    raise _not_finite(tensor)
                yield block

    def _read(self, name: str, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read a tensor into new memory, with the shape and (unless `dtype` is given) the type of `like`."""
        result = torch.empty(like.shape, dtype=dtype or like.dtype, device=self._device)
        start = 0
        for block in self._blocks(name, like.shape):
            if like.ndim == 0:
                result.copy_(block)
            else:
                result[start : start + len(block)] = block
                start += len(block)
        return result

    def _load_int8(self, name: str, module: nn.Linear) -> None:
        bias = None if module.bias is None else self._read(_join(name, "bias"), module.bias)
        linear = self._layers.int8_linear if self._dtype == "int8" else self._layers.int8_weight_linear
        self._replace(name, linear(self._int8_weight(name, module), bias))

    def _load_int4(self, name: str, module: nn.Linear) -> None:
        bias = None if module.bias is None else self._read(_join(name, "bias"), module.bias)
        full, shape = _join(name, "weight"), module.weight.shape
        weight = Int4Weight.of(shape, self._blocks(full, shape), self._layers.compute)
        self._replace(name, self._layers.int4_linear(weight, bias))

    def _load_embedding(self, name: str, module: nn.Embedding) -> None:
        self._replace(name, self._layers.embedding(self._int8_weight(name, module), module.padding_idx))

    def _int8_weight(self, name: str, module: nn.Linear | nn.Embedding) -> Int8Weight:
        full = _join(name, "weight")
        shape = module.weight.shape
        ahead = self._ahead.get(self._tied.get(full, full))
        try:
            if ahead is not None and ahead.result().values.shape == shape:
                return ahead.result()
            # Reading it detects a wrong shape.
            return Int8Weight(shape, self._blocks(full, shape, check=False))
        except ValueError as error:
            raise _not_finite(self._tied.get(full, full)) from error

    def _replace(self, name: str, made: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._modules[parent], child, made)

    def _load_plain(self, name: str, module: nn.Module) -> None:
        for key, value in [*_parameters(module).items(), *_stored(module).items()]:
            full = _join(name, key)
            if full in self._tied:
                continue
            tensor = self._read(full, value)
            setattr(
                module,
                key,
                nn.Parameter(tensor, requires_grad=False) if key in _parameters(module) else tensor,
            )


def _not_finite(tensor: str) -> ModelError:
    return ModelError(f"{tensor} holds values that are not finite (NaN or infinity). Pull the model again.")


def _join(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's own parameters, without those of its children; tied ones included."""
    return {key: value for key, value in module._parameters.items() if value is not None}  # noqa: SLF001 - no public list keeps tied ones


def _stored(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the module's own buffers that are stored in files."""
    skipped = module._non_persistent_buffers_set  # noqa: SLF001 - there is no public way to tell them apart
    return {key: value for key, value in module.named_buffers(recurse=False) if key not in skipped}


def _num_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))
