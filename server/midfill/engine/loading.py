"""From a model's folder to a model that is ready: which runner, and the order of loading.

On a CPU OpenVINO runs the architectures that there is a graph for; torch runs all others, GPUs and the
reference (float32). Neither is imported before it is known which one is needed: torch and
transformers take 4 s on their own. Runs on the engine thread.
"""

from __future__ import annotations

import ctypes
import sys
import time
from array import array
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from midfill.adapters.format import Adapter
from midfill.engine.adapters import loaded as residents
from midfill.engine.adapters.loaded import Residents
from midfill.engine.api import RUNNERS, EngineSpec, ModelInfo, Progress, Tokenizer
from midfill.engine.scheduler import Choice, Chunk
from midfill.engine.token_healing import TokenIndex
from midfill.engine.torch.threads import num_cores
from midfill.errors import EngineError
from midfill.models.store import verify
from midfill.system import malloc as heap

if TYPE_CHECKING:
    from midfill.engine.openvino.graph import Shape


_CAPTURE_S = 4.0
"""How long loading may go on with CUDA graphs; the rest are captured when there is nothing else to do."""


class Runner(Protocol):
    """What the step loop needs of a model. `runner.Runner` and `openvino_runner.OpenVinoRunner` are two.

    Attributes:
        context: the most tokens of one sequence.
        vocab_size: the number of logits.
        chunk_tokens: tokens for one forward pass: whoever comes meanwhile waits for its end.
        step_sequences: sequences for one forward pass.
        max_guesses: the most guesses of one sequence that it verifies; 0 if it cannot.
    """

    context: int
    vocab_size: int
    chunk_tokens: int
    step_sequences: int
    max_guesses: int

    def forward(
        self, chunks: list[Chunk], allowed: list[array[int] | None], interrupted: Callable[[], bool]
    ) -> list[list[Choice]] | None:
        """Compute the chunks of one step.

        Args:
            chunks: what the scheduler planned; no two of the same sequence.
            allowed: for each chunk the ids to choose from, or None for all.
            interrupted: asked now and then, if the runner can leave a pass in the middle: whether to.

        Returns:
            For each chunk that `samples` the most likely next token, and one more for each guess that came
            true (see `Chunk.verify`); nothing for the others. None if the pass was left: then it is as if
            it had not been, but that the same pass may take less time if it comes next.

        Raises:
            MemoryError: there is not enough memory, on whatever device.
        """
        ...

    def drop(self, slots: list[int]) -> None:
        """Free the memory of these slots."""
        ...

    def prepare(self, adapters: Mapping[str, Adapter]) -> Callable[[], None]:
        """Get ready to have these adapters in the model and no others, while passes go on.

        May take seconds, in any thread, but not twice at a time. The adapters fit the model; their keys are
        those of the sequences (`scheduler.Sequence.key`). Returns what puts them in, which is quick, and
        is called on the engine thread between two passes.

        Raises `AdapterError` if one cannot be served, and `MemoryError`.
        """
        ...

    def probe(self, tokens: list[int], key: str | None) -> npt.NDArray[np.float32]:
        """The logits that follow these tokens with an adapter, or None. Leaves nothing in a slot."""
        ...

    def idle(self) -> bool:
        """Nobody waits: do a piece of what was put off. Whether there was any."""
        ...


class LoadedRunner(Runner, Protocol):
    """What is asked of a runner once, when it has been loaded.

    Attributes:
        architecture: transformers' `model_type`.
        device: for the user, for example "cpu".
        dtype: "int8", "float32" or "bfloat16".
    """

    architecture: str
    device: str
    dtype: str

    def warm_up(self, num_tokens: int) -> None:
        """Run a chunk of this size and a single token."""
        ...

    def capture(self, report: Callable[[float], None], limit_s: float) -> None:
        """Capture passes for about this long, on a device that has such."""
        ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready.

    Attributes:
        info: what the pipeline is told.
        runner: the model itself.
        index: its vocabulary in byte order.
        residents: the adapters in it.
        slow_turn_s: how long the warm-up took, a full chunk included: no turn should take much longer.
    """

    info: ModelInfo
    runner: Runner
    index: TokenIndex
    residents: Residents
    slow_turn_s: float = 0.0


def load(spec: EngineSpec, progress: Progress) -> Loaded:
    """Load what `spec` names: it takes seconds.

    Raises:
        ModelError: the model cannot be used.
        AdapterError: the adapter cannot be used, or not with this model.
        EngineError: the runner, device or dtype cannot be had.
        MemoryError: there is not enough memory.
    """
    shape = _openvino_shape(spec)
    default = None if spec.adapter is None else residents.read(spec.adapter, spec.model.path)
    adapters = {} if default is None else {default.digest: default}
    with ThreadPoolExecutor(1, thread_name_prefix="midfill-verify") as pool:
        verified = pool.submit(verify, spec.model.path)  # While libraries are imported, there is a core free.
        if shape is not None:
            runner, (tokenizer, index) = _load_openvino(spec, shape, progress, adapters)
        else:
            runner, (tokenizer, index) = _load_torch(spec, progress)
        verified.result()
    install = runner.prepare(adapters)
    install()
    progress("warming up", None)
    began = time.monotonic()
    runner.warm_up(min(runner.chunk_tokens, runner.context - 1))
    slow_turn_s = time.monotonic() - began
    residents.check(runner, adapters)
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
    )
    heap.trim()
    return Loaded(info, runner, index, Residents(runner, install, default), slow_turn_s)


def _openvino_shape(spec: EngineSpec) -> Shape | None:
    """The shape of the model if OpenVINO is to run it, else None."""
    if spec.runner not in RUNNERS:
        raise EngineError(f'There is no runner "{spec.runner}"; use {", ".join(RUNNERS)}.')
    if spec.runner == "torch":
        return None
    # Float32 is the reference, which only whoever asks for OpenVINO wants from it.
    dtypes = {"auto", "int8"} if spec.runner == "auto" else {"auto", "int8", "float32"}
    try:
        from midfill.engine.openvino.graph import UnsupportedError, read_shape  # noqa: PLC0415 - imports openvino
    except ImportError as error:
        why = f"it cannot be imported ({error})"
    else:
        if spec.device != "cpu" and not (spec.device == "auto" and not _has_cuda()):
            why = f'it does not serve device "{spec.device}"'
        elif spec.dtype not in dtypes:
            why = f"it does not serve dtype {spec.dtype}"
        else:
            try:
                return read_shape(spec.model.path)
            except UnsupportedError as error:
                why = str(error)
    if spec.runner == "openvino":
        raise EngineError(f'OpenVINO cannot run this model: {why}. Use runner "auto" or "torch".')
    return None


def _has_cuda() -> bool:
    """Whether there is a driver of NVIDIA's, and torch can use it: without one torch need not be asked."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    import torch  # noqa: PLC0415 - takes a second

    return torch.cuda.is_available()


def _load_openvino(
    spec: EngineSpec, shape: Shape, progress: Progress, adapters: Mapping[str, Adapter]
) -> tuple[LoadedRunner, tuple[Tokenizer, TokenIndex]]:
    from midfill.engine.openvino import runner as openvino_runner  # noqa: PLC0415 - imports openvino

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


def _load_torch(spec: EngineSpec, progress: Progress) -> tuple[LoadedRunner, tuple[Tokenizer, TokenIndex]]:
    progress("importing torch", None)
    from midfill.engine.torch.loading import load_runner  # noqa: PLC0415 - this is what imports torch

    return load_runner(
        spec.model.path,
        device=spec.device,
        dtype=spec.dtype,
        num_threads=spec.num_threads,
        report=lambda share: progress("loading weights", share),
        meanwhile=lambda: _load_vocabulary(spec),
    )


def _load_vocabulary(spec: EngineSpec) -> tuple[Tokenizer, TokenIndex]:
    """Two seconds of plain Python for a large vocabulary."""
    from midfill.models.tokenizer import load_tokenizer  # noqa: PLC0415 - not needed before a model is

    tokenizer = load_tokenizer(spec.model.path)
    index = TokenIndex(tokenizer.vocab_bytes(), tokenizer.control_ids)
    heap.trim()
    return tokenizer, index
