"""Run a GGUF file with llama.cpp: passes over chunks, the choice of a token, adapters.

Implements `engine.runner.Runner`, as do `openvino.runner` and `torch.runner`. The weights stay as they are in
the file, which is mapped into memory. All chunks of a step are computed in one pass, or in one per adapter. A
pass on a CPU can be aborted at any operation. Knows arrays, slot numbers and token ids; nothing of requests
or text. Imports neither torch nor transformers. Runs on the engine thread only, except for `prepare`.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from midfill.adapters.format import Adapter
from midfill.engine.choosing import Floats, chooser
from midfill.engine.kv_slots import NUM_SLOTS, common_prefix
from midfill.engine.llamacpp import adapter_files, devices
from midfill.engine.llamacpp.bindings import F16, F32, Q8_0, library
from midfill.engine.llamacpp.context import Context, Model, PassAbortedError, Span
from midfill.engine.scheduler import Choice, Chunk, SequenceState
from midfill.engine.torch.threads import ThreadCount
from midfill.errors import EngineError, ModelError
from midfill.models.gguf import model_type_of
from midfill.models.gguf_file import GGUFFile

_SPARE_SLOT = NUM_SLOTS
"""A sequence that no request ever gets."""

_LEAST_PART = 16
"""Tokens of the smallest part of a pass: 0.2 s on one core."""

_KV_TYPES = {"float32": F32, "float16": F16, "q8_0": Q8_0}


def load(
    file: GGUFFile,
    *,
    device: str,
    dtype: str,
    num_threads: int,
    thread_count: ThreadCount | None = None,
    kv_dtype: str = "float16",
) -> LlamaCppRunner:
    """Load a GGUF file.

    Args:
        file: its header; it may be closed.
        device: see `devices.choose`.
        dtype: "auto" for the weights as they are, or "float32", which a file with other weights refuses.
        num_threads: threads of each pass.
        thread_count: chooses fewer while other programs are busy; None for always `num_threads`.
        kv_dtype: number format of keys and values: "float16", "q8_0", or "float32" with dtype "float32".

    Raises:
        EngineError: the library cannot be used, or the device or dtype cannot be had.
        ModelError: the file cannot be used.
        MemoryError: there is not enough memory.
    """
    if dtype not in {"auto", "float32"}:
        raise EngineError(
            f'Runner "llamacpp" uses the weights of the GGUF file as they are; use dtype auto, not {dtype}.'
        )
    kv_type = _KV_TYPES["float32" if dtype == "float32" else kv_dtype]
    _check_types(file, dtype)
    gpu = devices.choose(device, devices.gpus())
    num_layers = 0 if gpu is None else devices.layers_that_fit(gpu, file, kv_type)
    model = Model(library(), file.path, gpu=None if gpu is None else gpu.handle, num_gpu_layers=num_layers)
    context = Context(
        model,
        num_sequences=NUM_SLOTS + 1,
        kv_type=kv_type,
        num_threads=num_threads,
        pass_tokens=LlamaCppRunner.chunk_tokens,
        pass_rows=LlamaCppRunner.max_draft_tokens + 1,
    )
    name = "cpu" if gpu is None or not num_layers else gpu.name
    return LlamaCppRunner(
        model,
        context,
        architecture=model_type_of(file.metadata),
        device=name,
        dtype=dtype,
        thread_count=thread_count,
    )


def _check_types(file: GGUFFile, dtype: str) -> None:
    """Check that a file has weights, of the wanted type."""
    if not file.tensors:
        raise ModelError(f"{file.path} has a vocabulary but no weights, so it cannot be used as a model.")
    types = {tensor.type_name for tensor in file.tensors.values()}
    if dtype == "float32" and types != {"F32"}:
        raise EngineError(f"{file.path} has weights of the types {', '.join(sorted(types))}; use dtype auto.")


@dataclass(frozen=True, slots=True)
class _Leftover:
    """Tokens whose keys and values a slot holds after an aborted pass; its user and adapter."""

    owner: tuple[str, str | None]
    tokens: list[int]


class LlamaCppRunner:
    """One model.

    A pass that is aborted keeps the parts that are finished: if the next chunk of the slot begins alike, it
    continues after them. After each aborted pass the parts are smaller, so that a prompt gets ahead even
    while somebody types, and after others larger again.

    Attributes:
        architecture: transformers' `model_type`; llama.cpp's name if the architecture has no conversion.
        context: maximum number of tokens of one sequence.
        vocab_size: number of logits.
        device: "cpu", or the library's name of a GPU, for example "Vulkan0".
        dtype: the file's type, for example "Q4_K - Medium", or "float32".
        attention: "".
        chunk_tokens, step_sequences, max_draft_tokens: see `engine.runner.Runner`.
    """

    chunk_tokens = 128  # on one core 1 % slower per token than 256; 64 are 5 % slower, 32 are 16 %
    warm_up_tokens = _LEAST_PART
    attention = ""
    step_sequences = NUM_SLOTS
    max_draft_tokens = 7

    def __init__(
        self,
        model: Model,
        context: Context,
        *,
        architecture: str,
        device: str,
        dtype: str,
        thread_count: ThreadCount | None,
    ) -> None:
        self.architecture = architecture
        self.device = device
        self.context = model.context
        self.vocab_size = model.vocab_size
        self.dtype = dtype if dtype == "float32" else model.file_type
        self._model = model
        self._context = context
        self._thread_count = thread_count
        self._adapters: dict[str | None, int | None] = {None: None}
        self._part_tokens = self.chunk_tokens
        self._leftovers: dict[int, _Leftover] = {}  # by slot

    def forward(
        self,
        chunks: list[Chunk],
        allowed: list[array[int] | None],
        interrupted: Callable[[], bool] | None = None,
    ) -> list[list[Choice]] | None:
        """Compute the chunks of one step; see `Runner.forward`."""
        if self._thread_count is not None:
            self._context.set_threads(self._thread_count.update(time.monotonic()))
        for chunk in chunks:
            if chunk.copy_from is not None:
                self._leftovers.pop(chunk.slot, None)
                self._context.copy(chunk.copy_from, chunk.slot, chunk.start)
        by_adapter: dict[str | None, list[int]] = {}
        for number, chunk in enumerate(chunks):
            by_adapter.setdefault(chunk.sequence.key, []).append(number)
        found: dict[int, list[Choice]] = {}
        self._make_room(chunks)
        try:
            for key, numbers in by_adapter.items():
                rows = self._compute(key, [chunks[number] for number in numbers], interrupted)
                for number, of_chunk in zip(numbers, rows, strict=True):
                    chunk = chunks[number]
                    choose = chooser(of_chunk, allowed[number])
                    found[number] = chunk.verify(choose) if chunk.samples else []
        except PassAbortedError:
            self._keep_leftovers(chunks)
            self._part_tokens = max(_LEAST_PART, self._part_tokens // 2)
            return None
        if sum(len(chunk.tokens) for chunk in chunks) > _LEAST_PART:
            self._part_tokens = min(self.chunk_tokens, self._part_tokens * 2)
        return [found[number] for number in range(len(chunks))]

    def _compute(
        self, key: str | None, chunks: Sequence[Chunk], interrupted: Callable[[], bool] | None
    ) -> list[list[Floats]]:
        """Return the requested rows of logits of each chunk; they are overwritten by the next pass."""
        adapter = self._adapters[key]
        self._compute_in_parts(chunks, adapter, interrupted)
        spans = []
        for chunk in chunks:
            start = self._context.held[chunk.slot]
            spans.append(Span(chunk.slot, start, _tokens_from(chunk, start), _num_rows(chunk)))
        return self._context.compute(spans, adapter, interrupted)

    def _compute_in_parts(
        self, chunks: Sequence[Chunk], adapter: int | None, interrupted: Callable[[], bool] | None
    ) -> None:
        """Compute the chunks until the rest fits into one part.

        If tokens before a chunk were dropped to make room for other sequences, they are computed first.
        """
        while True:
            rests = [_end(chunk) - self._context.held[chunk.slot] for chunk in chunks]
            chunk, rest = max(zip(chunks, rests, strict=True), key=lambda pair: pair[1])
            count = min(self._part_tokens, rest - max(1, _num_rows(chunk)))
            if sum(rests) <= self._part_tokens or count <= 0:
                return
            start = self._context.held[chunk.slot]
            tokens = _tokens_from(chunk, start)[:count]
            self._context.compute([Span(chunk.slot, start, tokens)], adapter, interrupted)

    def _make_room(self, chunks: Sequence[Chunk]) -> None:
        """Cut the sequences to what the chunks can use of them, and reserve cells. Raises `MemoryError`."""
        for chunk in chunks:
            useful = 0
            leftover = self._leftovers.pop(chunk.slot, None)
            if leftover is not None and leftover.owner == _owner(chunk):
                most = len(chunk.tokens) - max(1, _num_rows(chunk))
                useful = min(common_prefix(leftover.tokens[chunk.start :], chunk.tokens), most)
            self._context.cut(chunk.slot, chunk.start + useful)
        self._context.reserve({chunk.slot: _end(chunk) for chunk in chunks})

    def _keep_leftovers(self, chunks: Sequence[Chunk]) -> None:
        """Remember what an aborted pass has computed beyond the begin of its chunks."""
        for chunk in chunks:
            if (done := self._context.held[chunk.slot] - chunk.start) > 0:
                tokens = [*chunk.sequence.tokens[: chunk.start], *chunk.tokens[:done]]
                self._leftovers[chunk.slot] = _Leftover(_owner(chunk), tokens)

    def drop(self, slots: list[int]) -> None:
        """Free the cells of these slots."""
        for slot in slots:
            self._leftovers.pop(slot, None)
            self._context.cut(slot, 0)

    def prepare(self, adapters: Mapping[str, Adapter]) -> Callable[[], None]:
        """Prepare to have exactly these adapters; see `Runner.prepare`. Writes them as GGUF files."""
        files = {key: adapter_files.write(adapter, self._model.path) for key, adapter in adapters.items()}

        def install() -> None:
            self._install(files)

        return install

    def _install(self, files: Mapping[str, Path]) -> None:
        """Have exactly these adapters in the model. Raises `AdapterError`."""
        loaded = {key: handle for key, handle in self._adapters.items() if key is None or key in files}
        removed = [
            handle for key, handle in self._adapters.items() if handle is not None and key not in files
        ]
        new = [key for key in files if key not in loaded]
        self._adapters = loaded
        if removed:
            self._context.use_adapter(None)
        for handle in removed:
            self._model.library.llama_adapter_lora_free(handle)
        for key in new:
            loaded[key] = self._model.load_adapter(files[key])
        if new:
            # The size of a pass's graph is fixed when a context is made.
            self._context.rebuild()

    def probe(self, tokens: list[int], key: str | None) -> Floats:
        """Return the logits after these tokens; see `Runner.probe`."""
        chunk = Chunk(SequenceState(key, tokens), _SPARE_SLOT, 0, tokens, samples=True)
        try:
            self._make_room([chunk])
            [[last]] = self._compute(key, [chunk], None)
            logits: Floats = np.array(last)
        finally:
            self._context.cut(_SPARE_SLOT, 0)
        return logits

    def warm_up(self, num_tokens: int) -> None:
        """Run a chunk of this size and a single token: the first pass reads the file."""
        prompt = SequenceState(key=None, tokens=[0] * num_tokens)
        self.forward([Chunk(prompt, 0, 0, prompt.tokens, samples=True)], [None])
        self.forward([Chunk(prompt, 0, num_tokens, [0], samples=True)], [None])
        self.drop([0])

    def capture(self, report: Callable[[float], None], limit_s: float) -> None:
        """Do nothing: there are no graphs to capture."""

    def idle(self) -> bool:
        """Return False: no work is ever deferred."""
        return False


def _owner(chunk: Chunk) -> tuple[str, str | None]:
    return chunk.sequence.user, chunk.sequence.key


def _end(chunk: Chunk) -> int:
    return chunk.start + len(chunk.tokens)


def _tokens_from(chunk: Chunk, start: int) -> list[int]:
    """Return the tokens of a chunk's sequence from `start` on, which may be before the chunk."""
    if start >= chunk.start:
        return chunk.tokens[start - chunk.start :]
    return [*chunk.sequence.tokens[start : chunk.start], *chunk.tokens]


def _num_rows(chunk: Chunk) -> int:
    return 1 + chunk.num_draft_tokens if chunk.samples else 0
