"""Run a model on a CPU with OpenVINO: keys and values in blocks, the forward pass, the choice of a token.

Implements `engine.runner.Runner`, as does `torch.runner`, which runs the same models and is the reference.
All chunks of a step are computed in one pass, or in one per adapter where adapters are merged. A pass runs in
parts, some layers each, and can be aborted between two of them. Knows arrays, slot numbers and token ids;
nothing of threads, requests or text. Imports neither torch nor transformers. Runs on the engine thread only,
except for `prepare`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from midfill.adapters.format import Adapter
from midfill.engine.adapters.lora_stack import LoraStack
from midfill.engine.choosing import chooser
from midfill.engine.kv_slots import NUM_SLOTS
from midfill.engine.openvino.graph import DecoderShape, build_parts, siblings, skip_quantization
from midfill.engine.openvino.int8_weights import Floats, ModelWeights, Tensors, read_merged, read_weights
from midfill.engine.openvino.quiet_import import CACHED_SHAPES, ov
from midfill.engine.scheduler import Choice, Chunk, SequenceState

_FIRST_BLOCKS = 64
"""Blocks that memory is allocated for at first; doubled when they are used up."""

_ACTIVATION_GROUP = 128
"""Number of activations that share an 8-bit scale. With 32 decoding takes twice as long."""

_NUM_PARTS = 6
"""Parts per forward pass. +0.4 % decode time each; the longest takes 31 of 180 ms at 4k tokens."""

_NUM_COMPILING = 2
"""Parts compiled at a time; each may hold the interpreter lock for long when it is done."""

_SPARE_SLOT = -1
"""A slot that no request ever gets."""

_MAX_MERGED = 2
"""Maximum merged adapters, each with its own weights: the active one and its replacement."""

_MERGING_MEMORY = 3
"""Free memory needed to merge an adapter, in sizes of its weights: mapped, packed, and one spare."""


def _never() -> bool:
    return False


def load(
    path: Path,
    shape: DecoderShape,
    *,
    dtype: str,
    num_threads: int,
    report: Callable[[float], None],
    adapters: Mapping[str, Adapter] | None = None,
    num_parts: int = _NUM_PARTS,
) -> OpenVinoRunner:
    """Load the model of a folder.

    Args:
        path: folder with the safetensors files.
        shape: see `graph.read_shape`.
        dtype: "int8" or "float32".
        num_threads: threads of each pass.
        report: called with the share done, 0..1.
        adapters: in the model from the start; see `OpenVinoRunner.prepare`.
        num_parts: parts of each pass, at most one per layer.

    Raises:
        ModelError: the files do not have that shape.
        AdapterError: an adapter cannot be served.
        MemoryError: there is not enough memory.
    """
    properties = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": num_threads,
        # The editor and its other servers need the cores as well.
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _ACTIVATION_GROUP if dtype == "int8" else 0,
        "CPU_RUNTIME_CACHE_CAPACITY": CACHED_SHAPES,
    }
    exact = skip_quantization(shape) if dtype == "int8" else lambda _: True
    weights = read_weights(path, exact=exact, num_threads=num_threads, report=report)

    def compile_parts(tensors: Tensors, branched: frozenset[str]) -> list[ov.CompiledModel]:
        core = ov.Core()
        graphs = build_parts(shape, tensors, branched, num_parts=num_parts)
        with ThreadPoolExecutor(_NUM_COMPILING, thread_name_prefix="midfill-compile") as pool:
            return list(pool.map(lambda graph: core.compile_model(graph, "CPU", properties), graphs))

    runner = OpenVinoRunner(path, compile_parts, shape, weights, dtype)
    runner.prepare(adapters or {})()
    return runner


class OpenVinoRunner:
    """One model.

    One or two adapters are merged: each has a program with its own weights, beside that of the base, and a
    token costs the same as without an adapter. If there are more, or too little memory, one program has all
    of them as low-rank terms. Programs are compiled in the background. All programs share the keys and
    values, which stay where they are.

    Attributes:
        architecture: transformers' `model_type`.
        context: maximum number of tokens of one sequence.
        vocab_size: number of logits.
        device: "cpu".
        dtype: "int8" or "float32".
        attention: "".
        chunk_tokens, step_sequences, max_draft_tokens: see `engine.runner.Runner`.
    """

    device = "cpu"
    attention = ""
    chunk_tokens = 64  # 80 ms on two cores, where one token takes 25, and 32 take 50
    warm_up_tokens = chunk_tokens
    step_sequences = NUM_SLOTS
    max_draft_tokens = 7

    def __init__(
        self,
        path: Path,
        compile_parts: Callable[[Tensors, frozenset[str]], list[ov.CompiledModel]],
        shape: DecoderShape,
        weights: ModelWeights,
        dtype: str,
    ) -> None:
        self.architecture = shape.architecture
        self.context = shape.context
        self.vocab_size = shape.vocab_size
        self.dtype = dtype
        self._path = path
        self._compile = compile_parts
        self._shape = shape
        self._weights = weights
        self._programs: dict[str | None, _Program] = {}
        self._stack = LoraStack.of({})
        self._blocks = _Blocks()
        self._aborted: _PassKey | None = None  # valid while nothing has been computed or freed since

    def forward(
        self,
        chunks: list[Chunk],
        allowed: list[array[int] | None],
        interrupted: Callable[[], bool] = _never,
    ) -> list[list[Choice]] | None:
        """Compute the chunks of one step; see `Runner.forward`."""
        for chunk in chunks:
            if chunk.copy_from is not None:
                # Whole blocks are copied, over what an aborted pass has computed after `start`.
                self._aborted = None
                self._blocks.copy(chunk.copy_from, chunk.slot, chunk.start)
        try:
            logits = self._compute(chunks, interrupted)
        except _PassAbortedError:
            return None
        return [
            chunk.verify(chooser(rows, ids)) if chunk.samples else []
            for chunk, rows, ids in zip(chunks, logits, allowed, strict=True)
        ]

    def _compute(self, chunks: Sequence[Chunk], interrupted: Callable[[], bool] = _never) -> list[Floats]:
        """Return the requested logits of each chunk, computed in one pass for all chunks of the same program.

        Resumes an aborted pass. Raises `_PassAbortedError`.
        """
        aborted, self._aborted = self._aborted, None
        by_program: dict[_Program, list[int]] = {}
        for number, chunk in enumerate(chunks):
            by_program.setdefault(self._programs[chunk.sequence.key], []).append(number)
        found: dict[int, Floats] = {}
        for program, numbers in by_program.items():
            some = [chunks[number] for number in numbers]
            this = _PassKey(program, [(one.sequence.key, one.slot, one.start, one.tokens) for one in some])
            try:
                logits = program.compute(
                    some, self._blocks, self._stack, interrupted=interrupted, resume=this == aborted
                )
            except _PassAbortedError:
                self._aborted = this
                raise
            row = 0
            for number in numbers:
                count = 1 + chunks[number].num_draft_tokens if chunks[number].samples else 0
                found[number] = logits[row : row + count]
                row += count
        return [found[number] for number in range(len(chunks))]

    def prepare(self, adapters: Mapping[str, Adapter]) -> Callable[[], None]:
        """Prepare to have exactly these adapters; see `Runner.prepare`. Compiling takes seconds."""
        stack = LoraStack.of(adapters)
        siblings(self._shape, stack.layers)
        if len(adapters) <= _MAX_MERGED and self._has_memory_for(adapters):
            programs = self._merged(adapters)
            tensors: dict[str, ov.Tensor] = {}
        else:
            program = self._branched(stack)
            programs = dict.fromkeys([None, *adapters], program)
            tensors = program.adapter_tensors(stack, siblings(self._shape, program.branched))
        new = set(programs.values()) - set(self._programs.values())
        for program in new if self._programs else ():
            # The first passes pack the weights.
            blocks = _Blocks()
            blocks.attach([program])
            program.take(tensors)
            for chunk in _warming(self.chunk_tokens):
                program.compute([chunk], blocks, stack)

        def install() -> None:
            for program in set(programs.values()):
                program.take(tensors)
            self._blocks.attach(list(set(programs.values())))
            self._programs, self._stack = programs, stack

        return install

    def _has_memory_for(self, adapters: Mapping[str, Adapter]) -> bool:
        new = [adapter for key, adapter in adapters.items() if self._merged_before(key) is None]
        needed = sum(self._weights.size_of(adapter.branches) for adapter in new) * _MERGING_MEMORY
        return not needed or psutil.virtual_memory().available > needed

    def _merged_before(self, key: str | None) -> _Program | None:
        """Return the loaded program of an adapter alone, or of the base, or None."""
        program = self._programs.get(key)
        return None if program is None or program.branched else program

    def _merged(self, adapters: Mapping[str, Adapter]) -> dict[str | None, _Program]:
        """Return programs with merged weights for the base and for each adapter."""
        base = self._merged_before(None) or self._program(self._weights)
        programs: dict[str | None, _Program] = {None: base}
        for key, adapter in adapters.items():
            if (program := self._merged_before(key)) is None:
                # One thread: the others may be computing for a request.
                program = self._program(read_merged(self._path, self._weights, adapter, num_threads=1))
            programs[key] = program
        return programs

    def _branched(self, stack: LoraStack) -> _Program:
        """Return one program for the base and all adapters: the current one, if it has all LoRA inputs."""
        program = self._programs.get(None)
        if program is not None and program.branched and stack.layers <= program.branched:
            return program
        return self._program(self._weights, stack.layers)

    def _program(self, weights: ModelWeights, branched: frozenset[str] = frozenset()) -> _Program:
        return _Program(self._compile(weights.tensors, branched), weights, branched)

    def probe(self, tokens: list[int], key: str | None) -> Floats:
        """Return the logits after these tokens; see `Runner.probe`."""
        prompt = SequenceState(key, tokens)
        try:
            [[last]] = self._compute([Chunk(prompt, _SPARE_SLOT, 0, tokens, samples=True)])
            logits: Floats = last.copy()
        finally:
            self._blocks.drop(_SPARE_SLOT)
        return logits

    def warm_up(self, num_tokens: int) -> None:
        """Run a chunk of this size and a single token: the first passes are slow."""
        for chunk in _warming(num_tokens):
            for key in self._programs:
                self.forward([replace(chunk, sequence=SequenceState(key, chunk.sequence.tokens))], [None])
        self.drop([0])

    def capture(self, report: Callable[[float], None], limit_s: float) -> None:
        """Do nothing: there are no graphs to capture."""

    def idle(self) -> bool:
        """Return False: no work is ever deferred."""
        return False

    def drop(self, slots: list[int]) -> None:
        """Free the blocks of these slots."""
        self._aborted = None
        for slot in slots:
            self._blocks.drop(slot)


def _warming(num_tokens: int) -> list[Chunk]:
    prompt = SequenceState(key=None, tokens=[0] * num_tokens)
    return [
        Chunk(prompt, 0, 0, prompt.tokens, samples=True),
        Chunk(prompt, 0, num_tokens, [0], samples=True),
    ]


@dataclass(frozen=True, slots=True)
class _PassKey:
    """Identifies the work of one pass: of each chunk the adapter's key, slot, start and tokens."""

    program: _Program
    chunks: list[tuple[str | None, int, int, list[int]]]


class _PassAbortedError(Exception):
    """Unwinds a pass that is aborted between two parts."""


class _Program:
    """A compiled graph in parts, which run one after the other, its inputs, and its latest results.

    Attributes:
        weights: the weights it was built from.
        branched: the layers that have LoRA inputs.
        ports: the inputs, by name.
    """

    def __init__(
        self, parts: Sequence[ov.CompiledModel], weights: ModelWeights, branched: frozenset[str]
    ) -> None:
        self.weights = weights
        self.branched = branched
        self.ports = {port.any_name: port for part in parts for port in part.inputs}
        self._requests = [part.create_infer_request() for part in parts]
        self._readers: dict[str, list[ov.InferRequest]] = {name: [] for name in self.ports}
        for part, request in zip(parts, self._requests, strict=True):
            for port in part.inputs:
                self._readers[port.any_name].append(request)
        self._inputs: dict[str, npt.NDArray[np.generic]] = {}  # views of what the parts read
        self._num_run = 0  # parts of the latest pass
        self._num_packed = 0  # parts that have run once

    def adapter_tensors(self, stack: LoraStack, groups: Sequence[tuple[str, ...]]) -> dict[str, ov.Tensor]:
        """Return the matrices of adapters, by the inputs that take them: tens of megabytes."""
        tensors = {}
        for group in groups:
            down = f"down.{group[0]}"
            tensors[down] = ov.Tensor(stack.down(group, self._size(down, 1)))
            for up, name in ((f"up.{name}", name) for name in group):
                tensors[up] = ov.Tensor(stack.up(name, self._size(up, 0)))
        return tensors

    def take(self, tensors: Mapping[str, ov.Tensor]) -> None:
        """Set inputs that stay from pass to pass."""
        for name, tensor in tensors.items():
            for request in self._readers[name]:
                request.set_tensor(name, tensor)

    def compute(
        self,
        chunks: Sequence[Chunk],
        blocks: _Blocks,
        stack: LoraStack,
        *,
        interrupted: Callable[[], bool] = _never,
        resume: bool = False,
    ) -> Floats:
        """Return the requested logits, one row each. They are overwritten by the next pass.

        Args:
            chunks: what to compute.
            blocks: the memory of keys and values.
            stack: the adapters.
            interrupted: polled between two parts; if true, the pass is aborted: raises `_PassAbortedError`.
            resume: this pass is the latest one, which was aborted; run only its remaining parts.
        """
        for chunk in chunks:
            blocks.reserve(chunk.slot, chunk.start + len(chunk.tokens))
        self._set_inputs(chunks, blocks)
        if self.branched:
            self._set("mask", stack.mask((chunk.sequence.key, len(chunk.tokens)) for chunk in chunks))
        first = self._num_run if resume else 0
        for number, request in enumerate(self._requests[first:], first):
            if number > first and interrupted():
                raise _PassAbortedError
            if number:
                request.set_tensor("hidden", self._requests[number - 1].get_output_tensor(0))
            # Otherwise the results are copied.
            request.infer(share_outputs=True)
            self._num_run = number + 1
            if number == self._num_packed:
                # The part has packed its weights, so the file's pages are no longer needed.
                self.weights.release_pages()
                self._num_packed += 1
        logits: Floats = self._requests[-1].get_output_tensor(0).data
        return logits

    def _set_inputs(self, chunks: Sequence[Chunk], blocks: _Blocks) -> None:
        tokens: list[int] = []
        positions: list[int] = []
        selected: list[int] = []
        past: list[int] = []
        begins, table, table_begins = [0], list[int](), [0]
        longest = 0
        for chunk in chunks:
            end = chunk.start + len(chunk.tokens)
            positions.extend(range(chunk.start, end))
            tokens.extend(chunk.tokens)
            if chunk.samples:
                selected.extend(range(len(tokens) - 1 - chunk.num_draft_tokens, len(tokens)))
            past.append(chunk.start)
            begins.append(len(tokens))
            table.extend(blocks.of(chunk.slot, end))
            table_begins.append(len(table))
            longest = max(longest, end)
        for name, values in (("input_ids", tokens), ("position_ids", positions), ("selected", selected)):
            self._set(name, np.array(values, np.int64))
        for name, values in (
            ("past_lens", past),
            ("subsequence_begins", begins),
            ("block_indices", table),
            ("block_indices_begins", table_begins),
        ):
            self._set(name, np.array(values, np.int32))
        self._set("max_context_len", np.array(longest, np.int32))

    def _set(self, name: str, values: npt.NDArray[np.generic]) -> None:
        held = self._inputs.get(name)
        if held is not None and held.shape == values.shape:
            # Setting a tensor costs each part more than reading it.
            held[...] = values
        else:
            tensor = ov.Tensor(values)
            self._inputs[name] = tensor.data
            self.take({name: tensor})

    def _size(self, port: str, axis: int) -> int:
        size: int = self.ports[port].partial_shape[axis].get_length()
        return size


class _Blocks:
    """The memory of keys and values, in blocks of a few tokens that slots own.

    Entries after the computed tokens of a slot are leftovers; the next pass overwrites them. So cutting a
    past costs nothing, and a failed pass leaves no trace.
    """

    def __init__(self) -> None:
        self._programs: list[_Program] = []
        self._owned: dict[int, list[int]] = {}
        self._free: list[int] = []
        self._count = 0
        self._size = 1
        self._tensors: dict[str, ov.Tensor] = {}

    def attach(self, programs: list[_Program]) -> None:
        """Become the memory of these programs, which have the same shape; keep its contents."""
        self._programs = programs
        if self._tensors:
            self._attach_tensors()
        else:
            self._grow(_FIRST_BLOCKS)

    def _attach_tensors(self) -> None:
        for program in self._programs:
            program.take(self._tensors)

    def of(self, slot: int, length: int) -> list[int]:
        """Return the blocks with the first `length` tokens of a slot."""
        return self._owned.get(slot, [])[: self._num_blocks(length)]

    def reserve(self, slot: int, length: int) -> None:
        """Let a slot own blocks for `length` tokens. Raises `MemoryError` if there is no memory for them."""
        owned = self._owned.setdefault(slot, [])
        missing = self._num_blocks(length) - len(owned)
        while missing > len(self._free):
            self._grow(2 * self._count)
        for _ in range(missing):
            owned.append(self._free.pop())

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot to another one."""
        self.reserve(target, length)
        ours, theirs = self.of(target, length), self.of(source, length)
        for tensor in self._tensors.values():
            tensor.data[ours] = tensor.data[theirs]

    def drop(self, slot: int) -> None:
        """Free all blocks of a slot."""
        self._free.extend(self._owned.pop(slot, []))

    def _num_blocks(self, length: int) -> int:
        return -(-length // self._size)

    def _grow(self, count: int) -> None:
        for name, port in self._programs[0].ports.items():
            if "_cache." not in name:
                continue
            # (blocks, heads, tokens of a block, width), as the device wants them.
            shape = [size.get_length() for size in list(port.partial_shape)[1:]]
            self._size = shape[1]
            # The system does not allocate memory that was never written to.
            grown = ov.Tensor(port.element_type, ov.Shape([count, *shape]))
            if name in self._tensors:
                grown.data[: self._count] = self._tensors[name].data
            self._tensors[name] = grown
        self._attach_tensors()
        self._free.extend(range(count - 1, self._count - 1, -1))
        self._count = count
