"""The model on a CPU, run by OpenVINO: keys and values in blocks, the forward pass, the choice of a token.

Keeps the contract of `runner.Runner`, which runs the same models with torch and is its reference. All
chunks of a step are computed in one pass. Knows arrays, slot numbers and token ids; nothing of
threads, requests or text. Imports neither torch nor transformers. Runs on the engine thread only, but for
`prepare`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from midfill.adapters.format import Adapter
from midfill.engine.branches import Stack
from midfill.engine.openvino_graph import Shape, build_graph, siblings, stays_exact
from midfill.engine.rounded import Floats, Weights, read_weights
from midfill.engine.scheduler import Choice, Chunk
from midfill.engine.scheduler import Sequence as Tokens
from midfill.engine.slots import NUM_SLOTS
from midfill.engine.vino import ov

_FIRST_BLOCKS = 64
"""Blocks that there is memory for at first; doubled when they are used up."""

_ACTIVATION_GROUP = 128
"""Activations share an 8-bit scale in groups of so many. With 32 decoding takes twice as long."""

_SPARE_SLOT = -1
"""A slot that no request ever gets."""


def load(  # noqa: PLR0913 - what to load, and how
    path: Path,
    shape: Shape,
    *,
    dtype: str,
    num_threads: int,
    report: Callable[[float], None],
    adapters: Mapping[str, Adapter] | None = None,
) -> OpenVinoRunner:
    """Load the model of a folder.

    Args:
        path: folder with the safetensors files.
        shape: see `openvino_graph.read_shape`.
        dtype: "int8" or "float32".
        num_threads: of each pass.
        report: called with the share done, 0..1.
        adapters: in the model from the start; see `OpenVinoRunner.prepare`.

    Raises:
        ModelError: the files are not those of that shape.
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
    }
    exact = stays_exact(shape) if dtype == "int8" else lambda _: True
    weights = read_weights(path, exact=exact, num_threads=num_threads, report=report)

    def compile_graph(branched: frozenset[str]) -> ov.CompiledModel:
        return ov.Core().compile_model(build_graph(shape, weights.tensors, branched), "CPU", properties)

    runner = OpenVinoRunner(compile_graph, shape, weights, dtype)
    runner.prepare(adapters or {})()
    return runner


class OpenVinoRunner:
    """One model.

    Adapters need another graph, which is compiled in the background when the first one is wanted: without
    any, branches would cost time for nothing. The keys and values stay where they are.

    Attributes:
        architecture: transformers' `model_type`.
        context: the most tokens of one sequence.
        vocab_size: the number of logits.
        device: "cpu".
        dtype: "int8" or "float32".
        chunk_tokens, step_sequences, max_guesses: see `loading.Runner`.
    """

    device = "cpu"
    chunk_tokens = 32  # 55 ms on two cores, where one token takes 28, and 64 take 87
    step_sequences = NUM_SLOTS
    max_guesses = 7

    def __init__(
        self,
        compile_graph: Callable[[frozenset[str]], ov.CompiledModel],
        shape: Shape,
        weights: Weights,
        dtype: str,
    ) -> None:
        self.architecture = shape.architecture
        self.context = shape.context
        self.vocab_size = shape.vocab_size
        self.dtype = dtype
        self._compile = compile_graph
        self._shape = shape
        self._weights = weights
        self._program: _Program | None = None
        self._stack = Stack.of({})
        self._blocks = _Blocks()

    def forward(self, chunks: list[Chunk], allowed: list[array[int] | None]) -> list[list[Choice]]:
        """Compute the chunks of one step in one pass; see `runner.Runner.forward`."""
        for chunk in chunks:
            if chunk.copy_from is not None:
                self._blocks.copy(chunk.copy_from, chunk.slot, chunk.start)
        logits = self._compute(chunks)
        choices: list[list[Choice]] = []
        row = 0
        for chunk, ids in zip(chunks, allowed, strict=True):
            if not chunk.samples:
                choices.append([])
                continue
            rows = logits[row : row + 1 + chunk.num_guesses]
            choices.append(chunk.verify(_chooser(rows, ids)))
            row += len(rows)
        return choices

    def _compute(self, chunks: Sequence[Chunk]) -> Floats:
        if self._program is None:
            raise AssertionError("nothing was prepared")
        return self._program.compute(chunks, self._blocks, self._stack)

    def prepare(self, adapters: Mapping[str, Adapter]) -> Callable[[], None]:
        """See `loading.Runner.prepare`. Compiling takes seconds, during which passes go on."""
        stack = Stack.of(adapters)
        siblings(self._shape, stack.layers)
        program = self._program
        fits = program is not None and stack.layers <= program.branched
        if program is None or not fits or (program.branched and not adapters):
            program = _Program(self._compile(stack.layers), stack.layers)
        tensors = program.adapter_tensors(stack, siblings(self._shape, program.branched))
        if program is not self._program and self._program is not None:
            # The first passes pack the weights. Then the file's pages are not needed any more.
            blocks = _Blocks()
            blocks.attach(program)
            program.take(tensors)
            for chunk in _warming(self.chunk_tokens):
                program.compute([chunk], blocks, stack)
            self._weights.give_back()

        def install() -> None:
            program.take(tensors)
            if program is not self._program:
                self._blocks.attach(program)
            self._program, self._stack = program, stack

        return install

    def probe(self, tokens: list[int], key: str | None) -> Floats:
        """The logits that follow these tokens; see `loading.Runner.probe`."""
        prompt = Tokens(key, tokens)
        try:
            logits: Floats = self._compute([Chunk(prompt, _SPARE_SLOT, 0, tokens, samples=True)])[0].copy()
        finally:
            self._blocks.drop(_SPARE_SLOT)
        return logits

    def warm_up(self, num_tokens: int) -> None:
        """Run a chunk of this size and a single token: the first passes are slow, whoever waits for them."""
        for chunk in _warming(num_tokens):
            self.forward([chunk], [None])
        self.drop([0])
        self._weights.give_back()

    def capture(self, report: Callable[[float], None], limit_s: float) -> None:
        """There is nothing to capture."""

    def idle(self) -> bool:
        """Nothing is ever put off."""
        return False

    def drop(self, slots: list[int]) -> None:
        """Free the blocks of these slots."""
        for slot in slots:
            self._blocks.drop(slot)


def _warming(num_tokens: int) -> list[Chunk]:
    prompt = Tokens(key=None, tokens=[0] * num_tokens)
    return [
        Chunk(prompt, 0, 0, prompt.tokens, samples=True),
        Chunk(prompt, 0, num_tokens, [0], samples=True),
    ]


class _Program:
    """A compiled graph, its inputs, and its latest results.

    Attributes:
        branched: the layers that have branches.
        request: OpenVINO's.
        ports: the inputs, by name.
    """

    def __init__(self, compiled: ov.CompiledModel, branched: frozenset[str]) -> None:
        self.branched = branched
        self.request = compiled.create_infer_request()
        self.ports = {port.any_name: port for port in compiled.inputs}

    def adapter_tensors(self, stack: Stack, groups: Sequence[tuple[str, ...]]) -> dict[str, ov.Tensor]:
        """The matrices of adapters, by the inputs that take them: tens of megabytes."""
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
            self.request.set_tensor(name, tensor)

    def compute(self, chunks: Sequence[Chunk], blocks: _Blocks, stack: Stack) -> Floats:
        """The logits that are wanted, one row each. They are overwritten by the next pass."""
        for chunk in chunks:
            blocks.reserve(chunk.slot, chunk.start + len(chunk.tokens))
        self._set_inputs(chunks, blocks)
        if self.branched:
            self._set("mask", stack.mask((chunk.sequence.key, len(chunk.tokens)) for chunk in chunks))
        self.request.infer()
        logits: Floats = self.request.get_output_tensor(0).data
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
                selected.extend(range(len(tokens) - 1 - chunk.num_guesses, len(tokens)))
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
        self.request.set_tensor(name, ov.Tensor(values))

    def _size(self, port: str, axis: int) -> int:
        size: int = self.ports[port].partial_shape[axis].get_length()
        return size


class _Blocks:
    """The memory of keys and values, in blocks of a few tokens that slots own.

    Entries behind what a slot has computed are leftovers; the next pass writes over them. So cutting a past
    costs nothing, and a failed pass leaves no trace.
    """

    def __init__(self) -> None:
        self._program: _Program | None = None
        self._owned: dict[int, list[int]] = {}
        self._free: list[int] = []
        self._count = 0
        self._size = 1
        self._tensors: dict[str, ov.Tensor] = {}

    def attach(self, program: _Program) -> None:
        """Be the memory of this program, with what is in it already."""
        self._program = program
        if self._tensors:
            program.take(self._tensors)
        else:
            self._grow(_FIRST_BLOCKS)

    def of(self, slot: int, length: int) -> list[int]:
        """The blocks with the first `length` tokens of a slot."""
        return self._owned.get(slot, [])[: self._num_blocks(length)]

    def reserve(self, slot: int, length: int) -> None:
        """Let a slot own blocks for so many tokens. Raises `MemoryError` if there is no memory for them."""
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
        """Take back all blocks of a slot."""
        self._free.extend(self._owned.pop(slot, []))

    def _num_blocks(self, length: int) -> int:
        return -(-length // self._size)

    def _grow(self, count: int) -> None:
        if self._program is None:
            raise AssertionError("blocks belong to a program")
        for name, port in self._program.ports.items():
            if "_cache." not in name:
                continue
            # (blocks, heads, tokens of a block, width), as the device wants them.
            shape = [size.get_length() for size in list(port.partial_shape)[1:]]
            self._size = shape[1]
            # Memory that was never written to is not taken from the system.
            grown = ov.Tensor(port.element_type, ov.Shape([count, *shape]))
            if name in self._tensors:
                grown.data[: self._count] = self._tensors[name].data
            self._tensors[name] = grown
        self._program.take(self._tensors)
        self._free.extend(range(count - 1, self._count - 1, -1))
        self._count = count


def _chooser(rows: Floats, allowed: array[int] | None) -> Callable[[int], Choice]:
    return lambda number: _choose(rows[number], allowed)


def _choose(logits: Floats, allowed: array[int] | None) -> Choice:
    """The greedy choice among the allowed ids; the log-probability is that among all."""
    if allowed is None:
        token = int(logits.argmax())
    else:
        ids = np.frombuffer(allowed, np.int64)
        token = int(ids[logits[ids].argmax()])
    highest = logits.max()
    total = np.exp(logits - highest).sum(dtype=np.float64)
    return Choice(token, float(logits[token] - highest - np.log(total)))
