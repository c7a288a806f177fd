"""A model and its KV cache in llama.cpp: sequences in one pool of cells, and passes over several of them.

Each slot of the engine is a sequence of the pool. A prefix that two sequences have in common is stored once.
The pool starts small and grows; a sequence that was dropped to make room is found empty by `held`, and the
runner computes its tokens again. All arguments are checked here, because the library ends the process on
wrong ones. Knows token ids and sequence numbers, nothing of requests. Runs on the engine thread only.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from midfill.engine.llamacpp.abort_flag import AbortFlag
from midfill.engine.llamacpp.bindings import (
    ABORTED,
    F32,
    FLASH_ATTENTION_OFF,
    FLASH_ATTENTION_ON,
    LOAD_MAPPED,
    NO_CELLS,
    OUT_OF_MEMORY,
    Batch,
    Library,
)
from midfill.engine.llamacpp.devices import POOL_CELLS
from midfill.errors import AdapterError, ModelError

Floats = npt.NDArray[np.float32]

_FIRST_CELLS = 2048
"""Cells that the pool has at first: three prompts of the usual size, 25 MB for the default model."""

_KEPT_CELLS = POOL_CELLS
"""The pool grows up to this size to keep sequences, and beyond it only for those of the current pass."""

_CELL_STEP = 256  # the library rounds up to this


class PassAbortedError(Exception):
    """Unwinds a pass that was aborted; the sequences are as they were before it."""


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a sequence to compute.

    Attributes:
        sequence: its number.
        start: number of tokens that precede these; all of them are held.
        tokens: the ids.
        num_rows: of how many tokens at the end the logits are wanted.
    """

    sequence: int
    start: int
    tokens: Sequence[int]
    num_rows: int = 0


class Model:
    """A GGUF file that is mapped into memory.

    Args:
        library: see `bindings.library`.
        path: the file, which `models.gguf_file` has read without an error.
        gpu: handle of the GPU to use, or None.
        num_gpu_layers: layers to put on it.

    Attributes:
        path: the file.
        context: maximum number of tokens of one sequence.
        vocab_size: number of logits.
        file_type: for the user, for example "Q4_K - Medium".

    Raises:
        ModelError: the library cannot load it, or it is of a kind whose past cannot be cut.
    """

    def __init__(
        self, library: Library, path: Path, *, gpu: int | None = None, num_gpu_layers: int = 0
    ) -> None:
        params = library.llama_model_default_params()
        params.load_mode = LOAD_MAPPED
        # The list ends with a null pointer; without one, all devices would be used.
        devices = (ctypes.c_void_p * 2)(gpu, None)
        params.devices = ctypes.addressof(devices)
        params.n_gpu_layers = num_gpu_layers
        library.errors.clear()
        handle = library.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            raise ModelError(f"llama.cpp cannot load {path}: {library.reason()}.")
        weakref.finalize(self, library.llama_model_free, handle)
        self.library = library
        self.handle = handle
        self.path = path
        # Their state is one for the whole sequence, so that nothing but all of it can be forgotten.
        uncut = (library.llama_model_is_recurrent, library.llama_model_is_hybrid)
        other = (library.llama_model_has_encoder, library.llama_model_is_diffusion)
        if any(check(handle) for check in (*uncut, *other)):
            raise ModelError(
                f"{path} is a recurrent, encoder or diffusion model; midfill needs a decoder with attention."
            )
        self.context: int = library.llama_model_n_ctx_train(handle)
        self.num_layers: int = library.llama_model_n_layer(handle)
        self.vocab: int = library.llama_model_get_vocab(handle)
        self.vocab_size: int = library.llama_vocab_n_tokens(self.vocab)
        self.file_type: str = library.llama_ftype_name(library.llama_model_ftype(handle)).decode()

    def load_adapter(self, path: Path) -> int:
        """Load an adapter's GGUF file; return its handle. Make contexts again before it is used.

        Raises `AdapterError`.
        """
        self.library.errors.clear()
        handle: int | None = self.library.llama_adapter_lora_init(self.handle, str(path).encode())
        if not handle:
            raise AdapterError(f"llama.cpp cannot load the adapter {path}: {self.library.reason()}.")
        return handle


class Context:
    """The KV cache of a model, and the memory of a pass.

    Args:
        model: the model.
        num_sequences: number of sequences.
        kv_type: type of keys and values, for example `bindings.F16`.
        num_threads: threads of a pass.
        pass_tokens: maximum number of tokens of a pass.
        pass_rows: maximum number of rows of logits of one sequence in a pass.

    Attributes:
        held: number of tokens of each sequence that are computed.

    Raises:
        MemoryError: there is not enough memory.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_sequences: int,
        kv_type: int,
        num_threads: int,
        pass_tokens: int,
        pass_rows: int,
    ) -> None:
        self.held = [0] * num_sequences
        self._used = [0] * num_sequences  # the latest pass of each, by number
        self._num_passes = 0
        self._model = model
        self._library = model.library
        self._kv_type = kv_type
        self._num_threads = num_threads
        self._pass_tokens = pass_tokens
        self._pass_rows = pass_rows
        self._batch = _PassBatch(pass_tokens)
        self._flag = AbortFlag()
        self._adapter: int | None = None
        self._most_cells = num_sequences * model.context
        self._state = self._new_state(min(_FIRST_CELLS, self._most_cells))

    @property
    def num_cells(self) -> int:
        """Size of the pool in tokens."""
        return self._state.num_cells

    def cut(self, sequence: int, length: int) -> None:
        """Forget all tokens of a sequence but the first `length`."""
        if self.held[sequence] <= length:
            return
        if not self._library.llama_memory_seq_rm(self._state.memory, sequence, length or -1, -1):
            # Not possible for this kind of memory.
            self._library.llama_memory_seq_rm(self._state.memory, sequence, -1, -1)
            length = 0
        self.held[sequence] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Let `target` hold the first `length` tokens of `source`, as many of them as it holds."""
        if source == target:
            self.cut(target, length)
            return
        self.cut(target, 0)
        length = min(length, self.held[source])
        if length:
            self._library.llama_memory_seq_cp(self._state.memory, source, target, 0, length)
            self.held[target] = length

    def compute(
        self, spans: Sequence[Span], adapter: int | None, interrupted: Callable[[], bool] | None
    ) -> list[list[Floats]]:
        """Compute spans of different sequences in one pass; return the rows of each, valid until the next.

        Call `reserve` first.

        Args:
            spans: what to compute, `pass_tokens` in all at most.
            adapter: handle of the adapter to use, or None.
            interrupted: polled meanwhile; true aborts the pass.

        Raises:
            PassAbortedError: the pass was aborted; each sequence holds the tokens before its span.
            MemoryError: the pool has no room, or there is no memory for the pass.
            RuntimeError: the library failed.
        """
        self._check(spans)
        for span in spans:
            self.cut(span.sequence, span.start)
        self.use_adapter(adapter)
        with self._flag.raised_when(interrupted):
            status = self._library.llama_decode(self._state.handle, self._batch.fill(spans))
        if status == ABORTED:
            self._forget(spans)
            raise PassAbortedError
        if status in {NO_CELLS, OUT_OF_MEMORY}:
            self._forget(spans)
            raise MemoryError
        if status:
            self._forget(spans)
            raise RuntimeError(f"llama_decode returned {status}: {self._library.reason()}")
        self._num_passes += 1
        for span in spans:
            self.held[span.sequence] = span.start + len(span.tokens)
            self._used[span.sequence] = self._num_passes
        return self._rows(spans)

    def set_threads(self, count: int) -> None:
        """Use this many threads from now on."""
        if count != self._num_threads:
            self._num_threads = count
            self._library.llama_set_n_threads(self._state.handle, count, count)

    def rebuild(self) -> None:
        """Make the native context again, with what the sequences hold.

        Needed after an adapter was loaded: the size of a pass's graph is fixed when the context is made.
        """
        self._replace(self.num_cells)

    def _check(self, spans: Sequence[Span]) -> None:
        """Raise `ValueError` for what the library would end the process for."""
        if len({span.sequence for span in spans}) != len(spans):
            raise ValueError("two spans of the same sequence")
        if not 0 < sum(len(span.tokens) for span in spans) <= self._pass_tokens:
            raise ValueError("too many tokens for one pass, or none")
        for span in spans:
            if not span.tokens or not 0 <= span.num_rows <= min(len(span.tokens), self._pass_rows):
                raise ValueError("a span without tokens, or with too many rows")
            if not 0 <= span.start <= self.held[span.sequence]:
                raise ValueError("the tokens before a span are not computed")
            if span.start + len(span.tokens) > self._model.context:
                raise ValueError("a span that ends beyond the context")
            if min(span.tokens) < 0 or max(span.tokens) >= self._model.vocab_size:
                raise ValueError("a token id that the model does not know")

    def _rows(self, spans: Sequence[Span]) -> list[list[Floats]]:
        rows = []
        end = 0
        for span in spans:
            end += len(span.tokens)
            found = [
                np.ctypeslib.as_array(
                    self._library.llama_get_logits_ith(self._state.handle, index), (self._model.vocab_size,)
                )
                for index in range(end - span.num_rows, end)
            ]
            rows.append(found)
        return rows

    def _forget(self, spans: Sequence[Span]) -> None:
        """Remove what a failed pass may have left after the begin of its spans."""
        for span in spans:
            self.held[span.sequence] = span.start + len(span.tokens)
            self.cut(span.sequence, span.start)

    def use_adapter(self, adapter: int | None) -> None:
        """Use an adapter from now on, or none. Raises `RuntimeError`."""
        if adapter == self._adapter:
            return
        handles = (ctypes.c_void_p * 1)(adapter)
        scales = (ctypes.c_float * 1)(1.0)
        count = 0 if adapter is None else 1
        if self._library.llama_set_adapters_lora(self._state.handle, handles, count, scales):
            raise RuntimeError("llama.cpp does not take the adapter")
        self._adapter = adapter

    # The pool.

    def reserve(self, ends: Mapping[int, int]) -> None:
        """Make room in the pool, at the expense of other sequences if it may not grow.

        Args:
            ends: numbers of the tokens that sequences are going to hold, by sequence.

        Raises:
            MemoryError: there is not enough memory.
        """
        current = sum(ends.values())
        others = [number for number, held in enumerate(self.held) if held and number not in ends]
        wanted = current + sum(self.held[number] for number in others)
        if wanted > self.num_cells and self.num_cells < _KEPT_CELLS:
            self._grow(min(wanted, _KEPT_CELLS))
        for number in sorted(others, key=self._used.__getitem__):
            if wanted <= self.num_cells:
                break
            wanted -= self.held[number]
            self.cut(number, 0)
        if current > self.num_cells:
            self._grow(current)

    def _grow(self, num_cells: int) -> None:
        self._replace(min(max(num_cells, 2 * self.num_cells), self._most_cells))

    def _replace(self, num_cells: int) -> None:
        """Replace the native context by one with this many cells, and copy the sequences to it."""
        old, new = self._state, self._new_state(num_cells)
        library = self._library
        for number, held in enumerate(self.held):
            if not held:
                continue
            num_bytes = library.llama_state_seq_get_size(old.handle, number)
            data = (ctypes.c_uint8 * num_bytes)()
            library.llama_state_seq_get_data(old.handle, data, num_bytes, number)
            if not library.llama_state_seq_set_data(new.handle, data, num_bytes, number):
                self.held[number] = 0
        self._state, self._adapter = new, None

    def _new_state(self, num_cells: int) -> _State:
        params = self._library.llama_context_default_params()
        params.n_ctx = -(-num_cells // _CELL_STEP) * _CELL_STEP
        params.n_batch = params.n_ubatch = self._pass_tokens
        params.n_seq_max = len(self.held)
        params.n_outputs_max = min(self._pass_tokens, self._pass_rows * len(self.held))
        params.n_outputs_max_per_seq = self._pass_rows
        params.n_threads = params.n_threads_batch = self._num_threads
        # It skips the cells of other sequences, but adds up in 16 bits. Without it, the reference is exact.
        params.flash_attn_type = FLASH_ATTENTION_OFF if self._kv_type == F32 else FLASH_ATTENTION_ON
        params.type_k = params.type_v = self._kv_type
        params.kv_unified = True
        state = _State(self._model, params)
        self._library.llama_set_abort_callback(state.handle, self._flag.function, self._flag.address)
        return state


class _State:
    """A native context.

    Raises `MemoryError`.
    """

    def __init__(self, model: Model, params: Any) -> None:
        library = model.library
        library.errors.clear()
        handle = library.llama_init_from_model(model.handle, params)
        if not handle:
            raise MemoryError(f"llama.cpp makes no context: {library.reason()}")
        # The finalizer keeps the model, which has to be freed later.
        weakref.finalize(self, _free, model, handle)
        self.handle = handle
        self.memory = library.llama_get_memory(handle)
        self.num_cells: int = library.llama_n_ctx(handle)


def _free(model: Model, handle: int) -> None:
    model.library.llama_free(handle)


class _PassBatch:
    """The arrays of a `llama_batch`, allocated once."""

    def __init__(self, num_tokens: int) -> None:
        self._ids, self._positions, self._sequences = np.zeros((3, num_tokens), np.int32)
        self._counts = np.ones(num_tokens, np.int32)
        self._wanted = np.zeros(num_tokens, np.int8)
        pointer = ctypes.POINTER(ctypes.c_int32)
        # Each token is in one sequence: a list of length one.
        at, width = self._sequences.ctypes.data, self._sequences.itemsize
        self._lists = (pointer * num_tokens)(
            *(ctypes.cast(at + number * width, pointer) for number in range(num_tokens))
        )
        self._batch = Batch(
            token=self._ids.ctypes.data_as(pointer),
            pos=self._positions.ctypes.data_as(pointer),
            n_seq_id=self._counts.ctypes.data_as(pointer),
            seq_id=self._lists,
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, spans: Sequence[Span]) -> Batch:
        """Return the batch with these spans."""
        at = 0
        for span in spans:
            end = at + len(span.tokens)
            self._ids[at:end] = span.tokens
            self._positions[at:end] = np.arange(span.start, span.start + len(span.tokens))
            self._sequences[at:end] = span.sequence
            self._wanted[at:end] = 0
            self._wanted[end - span.num_rows : end] = 1
            at = end
        self._batch.n_tokens = at
        return self._batch
