"""Load a model from its folder or file: choose the runner, then load in the order that is fastest.

On a CPU OpenVINO runs the architectures that `openvino.graph` can build; torch runs all other architectures,
GPUs and the reference (float32). llama.cpp runs GGUF files, if the user has chosen it. None is imported
before it is needed: torch and transformers take 4 s to import. Runs on the engine thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from midfill.adapters.format import Adapter
from midfill.engine.adapters import loaded
from midfill.engine.adapters.loaded import LoadedAdapters
from midfill.engine.api import RUNNERS, EngineSpec, ModelInfo, Progress, Tokenizer
from midfill.engine.runner import LoadedRunner, Runner
from midfill.engine.token_healing import TokenIndex
from midfill.engine.torch import devices
from midfill.engine.torch.devices import Device
from midfill.engine.torch.threads import ThreadCount, num_cores
from midfill.errors import EngineError, ModelError
from midfill.models.store import verify
from midfill.system import malloc

if TYPE_CHECKING:
    from midfill.engine.openvino.graph import DecoderShape


_LOG = logging.getLogger(__name__)

_CAPTURE_S = 4.0
"""Seconds of loading spent on CUDA graphs; the remaining graphs are captured when the engine is idle."""

_OPENVINO_REFUSES = 'OpenVINO cannot run this model: {}. Use runner "auto" or "torch".'

_SAMPLE = "def area(width, height):\n    return width * height\n"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A loaded model.

    Attributes:
        info: the description for the completion pipeline.
        runner: the model itself.
        index: its vocabulary in byte order.
        adapters: the adapters in the model.
        warm_up_s: duration of a warm-up with a full chunk: no step should take much longer.
    """

    info: ModelInfo
    runner: Runner
    index: TokenIndex
    adapters: LoadedAdapters
    warm_up_s: float = 0.0


def load(
    spec: EngineSpec,
    progress: Progress,
    *,
    find_gpus: Callable[[str], Sequence[Device]] = devices.find_gpus,
) -> LoadedModel:
    """Load the model that `spec` names; takes seconds. `find_gpus` returns what `spec.device` chooses from.

    Raises:
        ModelError: the model cannot be used.
        AdapterError: the adapter cannot be used, or not with this model.
        EngineError: the runner, device or dtype cannot be had.
        MemoryError: there is not enough memory.
    """
    device, dtype = _place(spec, find_gpus)
    shape = _openvino_shape(spec, device)
    default = None if spec.adapter is None else loaded.read(spec.adapter, spec.model.path)
    adapters = {} if default is None else {default.digest: default}
    with ThreadPoolExecutor(1, thread_name_prefix="midfill-verify") as pool:
        verified = pool.submit(verify, spec.model.path)  # One core is free while libraries are imported.
        if spec.runner == "llamacpp":
            runner, (tokenizer, index) = _load_llamacpp(spec, progress)
        elif shape is not None:
            runner, (tokenizer, index) = _load_openvino(spec, shape, progress, adapters)
        else:
            runner, (tokenizer, index) = _load_torch(spec, device, dtype, progress)
        verified.result()
    install = runner.prepare(adapters)
    install()
    progress("warming up", None)
    began = time.monotonic()
    num_tokens = min(runner.warm_up_tokens, runner.context - 1)
    runner.warm_up(num_tokens)
    warm_up_s = (time.monotonic() - began) * max(1.0, runner.chunk_tokens / num_tokens)
    loaded.check(runner, adapters)
    if device.kind != "cpu" or runner.dtype == "float16":
        _check_range(runner, tokenizer, spec)
    runner.capture(lambda share: progress("capturing graphs", share), _CAPTURE_S)
    info = ModelInfo(
        name=spec.model.name,
        family=spec.model.family,
        architecture=runner.architecture,
        context=runner.context,
        tokenizer=tokenizer,
        device=runner.device,
        dtype=runner.dtype,
        adapter=spec.adapter.name if spec.adapter is not None else None,
        attention=runner.attention,
    )
    malloc.trim()
    return LoadedModel(info, runner, index, LoadedAdapters(runner, install, default), warm_up_s)


def _place(spec: EngineSpec, find_gpus: Callable[[str], Sequence[Device]]) -> tuple[Device, str]:
    """Return the device that the model runs on, and the format of its weights there.

    With "auto" the CPU takes a model that the GPU cannot run, and the log says why.
    """
    if spec.runner == "llamacpp":
        # Its own library looks for GPUs.
        return devices.CPU, spec.dtype
    if spec.runner == "openvino":
        if spec.device not in {"auto", "cpu"}:
            raise EngineError(_OPENVINO_REFUSES.format(f'it does not support device "{spec.device}"'))
        return devices.CPU, spec.dtype
    device, why = devices.choose(spec.device, find_gpus(spec.device))
    if device.kind != "cpu":
        from midfill.engine.torch.loading import choose_format

        try:
            dtype = choose_format(
                spec.model,
                device,
                spec.dtype,
                prompt_tokens=spec.prompt_tokens,
                adapters=spec.adapter is not None,
            )
        except EngineError as error:
            if spec.device != "auto":
                raise
            why = f"{error} The model runs on the CPU."
        else:
            return device, dtype
    if why:
        _LOG.warning("%s", why)
    return devices.CPU, spec.dtype


def _check_range(runner: LoadedRunner, tokenizer: Tokenizer, spec: EngineSpec) -> None:
    """Check that the model's values are within the range of its format: some models leave that of float16.

    Raises:
        EngineError: they are not.
    """
    logits = runner.probe(tokenizer.encode(_SAMPLE), None)
    if not bool(np.isfinite(logits).all()):
        raise EngineError(
            f"{spec.model.name} computes values that {runner.dtype} cannot hold on {runner.device}. Set "
            "dtype to bfloat16 or float32, or device to cpu."
        )


def _openvino_shape(spec: EngineSpec, device: Device) -> DecoderShape | None:
    """Return the shape of the model if OpenVINO is to run it, else None."""
    if spec.runner not in RUNNERS:
        raise EngineError(f'There is no runner "{spec.runner}"; use {", ".join(RUNNERS)}.')
    if spec.runner in {"torch", "llamacpp"}:
        return None
    # Float32 is the reference, which torch runs unless OpenVINO is asked for by name.
    dtypes = {"auto", "int8"} if spec.runner == "auto" else {"auto", "int8", "float32"}
    try:
        from midfill.engine.openvino.graph import UnsupportedError, read_shape
    except ImportError as error:
        why = f"it cannot be imported ({error})"
    else:
        if device.kind != "cpu":
            why = f'it does not support device "{device.torch_name}"'
        elif spec.dtype not in dtypes:
            why = f"it does not support dtype {spec.dtype}"
        else:
            try:
                return read_shape(spec.model.path)
            except UnsupportedError as error:
                why = str(error)
    if spec.runner == "openvino":
        raise EngineError(_OPENVINO_REFUSES.format(why))
    return None


def _load_openvino(
    spec: EngineSpec, shape: DecoderShape, progress: Progress, adapters: Mapping[str, Adapter]
) -> tuple[LoadedRunner, tuple[Tokenizer, TokenIndex]]:
    from midfill.engine.openvino import runner as openvino_runner

    with ThreadPoolExecutor(1, thread_name_prefix="midfill-ahead") as pool:
        vocabulary = pool.submit(_load_vocabulary, spec)
        runner = openvino_runner.load(
            spec.model.path,
            shape,
            dtype="int8" if spec.dtype == "auto" else spec.dtype,
            num_threads=spec.num_threads or num_cores(),
            report=lambda share: progress("loading weights", share),
            adapters=adapters,
        )
        return runner, vocabulary.result()


def _load_llamacpp(spec: EngineSpec, progress: Progress) -> tuple[LoadedRunner, tuple[Tokenizer, TokenIndex]]:
    from midfill.engine.llamacpp import runner as llamacpp_runner
    from midfill.models.gguf import tokenizer_from_metadata
    from midfill.models.gguf_file import open_gguf

    if spec.model.path.is_dir():
        raise ModelError(
            f'Runner "llamacpp" needs a GGUF file; {spec.model.path} is a folder. Name a file that ends in '
            '.gguf, or use runner "auto".'
        )
    progress("mapping the model file", None)
    with open_gguf(spec.model.path) as file:
        header = file
    with ThreadPoolExecutor(1, thread_name_prefix="midfill-ahead") as pool:
        vocabulary = pool.submit(lambda: _indexed(tokenizer_from_metadata(header.metadata, header.path)))
        runner = llamacpp_runner.load(
            header,
            device=spec.device,
            dtype=spec.dtype,
            num_threads=spec.num_threads or num_cores(),
            # The user's number of threads is never changed.
            thread_count=None if spec.num_threads else ThreadCount(num_cores()),
        )
        return runner, vocabulary.result()


def _load_torch(
    spec: EngineSpec, device: Device, dtype: str, progress: Progress
) -> tuple[LoadedRunner, tuple[Tokenizer, TokenIndex]]:
    progress("importing torch", None)
    from midfill.engine.torch.loading import load_runner

    return load_runner(
        spec.model.path,
        device=device,
        dtype=dtype,
        num_threads=spec.num_threads,
        prompt_tokens=spec.prompt_tokens,
        report=lambda share: progress("loading weights", share),
        meanwhile=lambda: _load_vocabulary(spec),
    )


def _load_vocabulary(spec: EngineSpec) -> tuple[Tokenizer, TokenIndex]:
    """Load the tokenizer and its index: two seconds of plain Python for a large vocabulary."""
    from midfill.models.tokenizer import load_tokenizer

    return _indexed(load_tokenizer(spec.model.path))


def _indexed(tokenizer: Tokenizer) -> tuple[Tokenizer, TokenIndex]:
    index = TokenIndex(tokenizer.vocab_bytes(), tokenizer.control_ids)
    malloc.trim()
    return tokenizer, index
