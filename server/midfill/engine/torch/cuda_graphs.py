"""Run captured CUDA graphs: choose the next token on the device, and run decode steps ahead of the host.

A captured pass reads its inputs (ids, slots, starts) from tensors with fixed addresses and writes the inputs
of the following decode step to the same tensors: the token it has chosen, one position further. So the next
step can be launched before the host has seen this one's token. While the engine thread turns a token into
text, the device works on the following ones (`_MAX_RUN_AHEAD`); results return by asynchronous copies. Steps
that ran ahead in vain, because the output ended or was cancelled, are ignored: their keys and values lie
after the tokens that count, and they cost the device at most that many steps.

Requests without an adapter use graphs of the base model, so adapters cost them nothing.

`GraphDevice` is the part of CUDA that this module needs; tests implement it by calling the pass instead of
replaying it. Runs on the engine thread only.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from midfill.engine.scheduler import Choice, Chunk
from midfill.engine.torch import graph_shapes
from midfill.engine.torch.graph_shapes import GraphCache, GraphShape
from midfill.engine.torch.kv_cache import FixedKVCache, FixedShapePast, Kernel
from midfill.engine.torch.lora import LoraLayers
from midfill.engine.torch.sampling import choose

_MAX_RUN_AHEAD = 2
"""Decode steps launched beyond the one that the host waits for.

One hides the engine thread's work on a token, two also its wait for the interpreter lock; more would only
delay the next request.
"""

_RECAPTURE_S = 1.0
"""How long a new adapter may hold up the engine to capture the graphs that every step needs."""

_FAST_STEP_S = 0.002
"""If a decode step takes longer, only one runs ahead: a cancelled request still pays for those launched."""

MARGIN = graph_shapes.WIDTHS[-1]
"""Room after the context, written by padding and by passes that are being captured."""

Forward = Callable[[torch.Tensor, torch.Tensor, FixedShapePast, torch.Tensor | int | None], Any]
"""A forward pass; see `TorchRunner.run`."""


class PendingCopy(Protocol):
    """A copy to the host in progress."""

    def wait(self) -> list[list[float]]:
        """Wait for the copy and return the values."""
        ...


class GraphDevice(Protocol):
    """A device that captures and replays graphs."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run once and capture; return what replays the run. Raises `MemoryError` if memory is short."""
        ...

    def fetch(self, tensor: torch.Tensor, *, sleeps: bool) -> PendingCopy:
        """Start to copy a tensor (rows x columns) as it is after everything launched so far.

        If it `sleeps`, whoever waits gives up the CPU. Otherwise it polls, which is quicker.
        """
        ...

    def has_room(self) -> bool:
        """Return whether there is memory for another graph."""
        ...


@dataclass(slots=True)
class _LaunchedPass:
    """A pass that was launched and whose results have not been read.

    Attributes:
        shape: shape of the captured graph.
        row_positions: slot, start and adapter of each row that counts.
        lengths: number of tokens of each of these rows.
        fetch: the copy of the results.
        tokens: the tokens of each row; None while only the device knows them.
    """

    shape: GraphShape
    row_positions: list[tuple[int, int, str | None]]
    lengths: list[int]
    fetch: PendingCopy
    tokens: list[list[int]] | None = None


class GraphRunner:
    """The captured graphs of one model, and the passes that run ahead.

    Args:
        forward: the model.
        cache: keys and values, with room for `MARGIN` more tokens than `context`.
        context: maximum number of tokens of one sequence.
        vocab_size: number of logits.
        kernel: attention of the captured passes.
        lora: the model's adapters.
        device: captures and replays.
        tensor_device: where the tensors are.
    """

    def __init__(
        self,
        forward: Forward,
        cache: FixedKVCache,
        *,
        context: int,
        vocab_size: int,
        kernel: Kernel,
        lora: LoraLayers,
        device: GraphDevice,
        tensor_device: torch.device,
    ) -> None:
        self._forward = forward
        self._cache = cache
        self._context = context
        self._kernel = kernel
        self._lora = lora
        self._device = device
        self._pinned = tensor_device.type == "cuda"
        self._base_graphs: GraphCache[Callable[[], None]] = GraphCache(
            context + MARGIN, self._capture, device.has_room
        )
        self._lora_graphs: GraphCache[Callable[[], None]] = GraphCache(
            context + MARGIN, partial(self._capture, adapters=True), device.has_room
        )
        self._lora_graphs.clear()  # until there are adapters
        most_rows = graph_shapes.ROWS[-1]
        # Filled by one upload: ids, slots, starts, the index of each row's last token, and its adapter.
        self._inputs = torch.zeros(MARGIN + 4 * most_rows, dtype=torch.int64, device=tensor_device)
        self._ids = self._inputs[:MARGIN]
        self._slots, self._starts, self._last, self._adapters = self._inputs[MARGIN:].view(4, most_rows)
        # Ids and log-probabilities. fp64 holds both exactly, so that one copy fetches them.
        self._results = torch.zeros((2, graph_shapes.MOST_SAMPLED), dtype=torch.float64, device=tensor_device)
        # For a choice among some tokens only, made after the pass.
        self._logits = torch.zeros((most_rows, vocab_size), device=tensor_device)
        self._run_ahead: deque[_LaunchedPass] = deque()
        self._max_run_ahead = _MAX_RUN_AHEAD
        self._unread_prefill: PendingCopy | None = None  # a prefill pass not yet waited for

    @property
    def num_captured(self) -> int:
        """Number of captured graphs."""
        return len(self._base_graphs) + len(self._lora_graphs)

    @property
    def num_waiting(self) -> int:
        """Number of shapes still to be captured."""
        return self._base_graphs.num_waiting + self._lora_graphs.num_waiting

    def capture_next(self) -> bool:
        """Capture one more graph; see `GraphCache.capture_next`."""
        self._run_ahead.clear()
        # First what every step needs, then what makes some steps faster.
        both = sorted((self._lora_graphs, self._base_graphs), key=lambda graphs: graphs.serves_every_step)
        return any(graphs.capture_next() for graphs in both)

    def set_step_duration(self, step_s: float) -> None:
        """Set how long a decode step takes, which decides how many run ahead."""
        self._max_run_ahead = _MAX_RUN_AHEAD if step_s <= _FAST_STEP_S else 1

    def pause(self) -> None:
        """Capture no more for a while: memory ran out. The graphs stay, because replays need no memory."""
        self._run_ahead.clear()
        for graphs in (self._base_graphs, self._lora_graphs):
            graphs.pause()

    def replace_adapters(self) -> None:
        """Discard the graphs with adapters: their layers or buffers were replaced.

        Those that every step needs are captured at once, if that is quick, so that answers do not slow down
        until the next pause. The graphs of the base model stay: what they run is still in memory.
        """
        self._run_ahead.clear()
        self._lora_graphs.clear()
        if not self._lora:
            return
        self._lora_graphs.restart()
        began = time.monotonic()
        while not self._lora_graphs.serves_every_step and time.monotonic() - began < _RECAPTURE_S:
            if not self._lora_graphs.capture_next():
                return

    def discard_run_ahead(self) -> None:
        """Ignore the passes that run ahead: the slots are changed by other means."""
        self._run_ahead.clear()

    def compute(
        self, chunks: Sequence[Chunk], allowed: Sequence[array[int] | None], *, alone: bool
    ) -> list[list[Choice]] | None:
        """Compute chunks in one captured pass.

        Args:
            chunks: see `TorchRunner.forward`.
            allowed: see `TorchRunner.forward`.
            alone: these are all chunks of the step, so that the next decode step may run ahead.

        Returns:
            See `TorchRunner.forward`. None, and nothing computed, if no captured graph fits.
        """
        rows = self._match(chunks, allowed)
        if rows is None:
            self._run_ahead.clear()
            launched = self._launch(chunks)
            rows = list(range(len(chunks)))
        else:
            launched = self._run_ahead.popleft()
        if launched is None:
            return None
        if not any(chunk.samples for chunk in chunks):
            self._await_prefill(launched)
            return [[] for _ in chunks]
        # The pass chose among all tokens. Where only some are allowed, choose again from its logits.
        constrained = {
            row: choose(self._logits[row], ids)
            for row, ids in zip(rows, allowed, strict=True)
            if ids is not None
        }
        # With draft tokens the device does not know where the sequence continues.
        certain = all(chunk.samples and not chunk.num_draft_tokens for chunk in chunks)
        if alone and certain and not constrained:
            self._launch_ahead(launched)
        results = launched.fetch.wait()
        choices: list[list[Choice]] = [
            _verified(launched, row, chunk, results, constrained.get(row)) if chunk.samples else []
            for row, chunk in zip(rows, chunks, strict=True)
        ]
        if self._run_ahead:
            self._run_ahead[0].tokens = [
                [_choice(launched, row, length - 1, results).id]
                for row, length in enumerate(launched.lengths)
            ]
        return choices

    def _await_prefill(self, launched: _LaunchedPass) -> None:
        """Wait for a pass that chooses no token; if steps are fast, for the previous one instead.

        So the device has the next part of a prompt queued when one is done, and never more than that.
        """
        before, self._unread_prefill = self._unread_prefill, None
        if self._max_run_ahead == 1:
            launched.fetch.wait()
            return
        self._unread_prefill = launched.fetch
        if before is not None:
            before.wait()

    def _match(self, chunks: Sequence[Chunk], allowed: Sequence[array[int] | None]) -> list[int] | None:
        """Return the rows of the next run-ahead pass that compute exactly these chunks, or None."""
        if not self._run_ahead or (launched := self._run_ahead[0]).tokens is None:
            return None
        rows = []
        for chunk, ids in zip(chunks, allowed, strict=True):
            position = (chunk.slot, chunk.start, chunk.sequence.key)
            if ids is not None or position not in launched.row_positions:
                return None
            row = launched.row_positions.index(position)
            if chunk.tokens != launched.tokens[row]:
                return None
            rows.append(row)
        return rows

    def _launch(self, chunks: Sequence[Chunk]) -> _LaunchedPass | None:
        """Upload the inputs of a pass and replay its graph. Return None if no graph fits."""
        lengths = [len(chunk.tokens) for chunk in chunks]
        starts = [chunk.start for chunk in chunks]
        keys = [chunk.sequence.key for chunk in chunks]
        found = self._find_graph(
            lengths, max(starts), head=any(chunk.samples for chunk in chunks), adapters=any(keys)
        )
        if found is None:
            return None
        shape, replay = found
        self._upload(
            shape, [chunk.tokens for chunk in chunks], [chunk.slot for chunk in chunks], starts, keys
        )
        replay()
        row_positions = [(chunk.slot, chunk.start, chunk.sequence.key) for chunk in chunks]
        return _LaunchedPass(shape, row_positions, lengths, self._fetch())

    def _find_graph(
        self, lengths: Sequence[int], start: int, *, head: bool, adapters: bool
    ) -> tuple[GraphShape, Callable[[], None]] | None:
        graphs = self._lora_graphs if adapters else self._base_graphs
        size = graph_shapes.fit(lengths)
        if size is None:
            return None
        rows, width = size
        found = graphs.find(graphs.shape(rows, width, start + width, head=head))
        if found is not None and found[0].keys < start + found[0].width:
            # A wider graph ends later, and must be long enough for its own padding.
            rows, width = found[0].rows, found[0].width
            found = graphs.find(graphs.shape(rows, width, start + width, head=head))
        return found

    def _launch_ahead(self, launched: _LaunchedPass) -> None:
        """Launch the decode steps after `launched`. Each reads the inputs that the one before has written."""
        last = self._run_ahead[-1] if self._run_ahead else launched
        while len(self._run_ahead) < self._max_run_ahead:
            row_positions = [
                (slot, start + length, key)
                for (slot, start, key), length in zip(last.row_positions, last.lengths, strict=True)
            ]
            furthest = max(start for _, start, _ in row_positions)
            if furthest >= self._context:
                return
            adapters = any(key for _, _, key in row_positions)
            found = self._find_graph([1] * len(row_positions), furthest, head=True, adapters=adapters)
            # The previous pass has written no inputs for more or wider rows.
            if found is None or found[0].width > 1 or found[0].rows > last.shape.rows:
                return
            shape, replay = found
            replay()
            last = _LaunchedPass(shape, row_positions, [1] * len(row_positions), self._fetch())
            self._run_ahead.append(last)

    def _fetch(self) -> PendingCopy:
        """Start to copy the results of the pass launched last."""
        # While a slow step runs, a core that polls would be busy most of the time.
        return self._device.fetch(self._results, sleeps=self._max_run_ahead == 1)

    def _upload(
        self,
        shape: GraphShape,
        tokens: Sequence[list[int]],
        slots: Sequence[int],
        starts: Sequence[int],
        keys: Sequence[str | None],
    ) -> None:
        """Upload inputs. Surplus rows repeat the first row, and write the same values to the same place."""
        spare = shape.rows - len(tokens)
        tokens = [*tokens, *[tokens[0]] * spare]
        ids: list[int] = []
        for row in tokens:
            ids += row + [0] * (shape.width - len(row))
        ids += [0] * (MARGIN - len(ids))
        unused = [0] * (graph_shapes.ROWS[-1] - shape.rows)
        adapters = [self._lora.index(key) for key in keys]
        values = [
            *ids,
            *(*slots, *[slots[0]] * spare, *unused),
            *(*starts, *[starts[0]] * spare, *unused),
            *(*(len(row) - 1 for row in tokens), *unused),
            *(*adapters, *[adapters[0]] * spare, *unused),
        ]
        # Pinned memory is not reused before it has been copied, so the copy may be asynchronous.
        host = torch.tensor(values, dtype=torch.int64, pin_memory=self._pinned)
        self._inputs.copy_(host, non_blocking=True)

    def _capture(self, shape: GraphShape, *, adapters: bool = False) -> Callable[[], None]:
        # After the context, where no slot holds anything.
        rows = range(shape.rows)
        tokens = [[0] * shape.width for _ in rows]
        nothing = [0 for _ in rows]
        self._upload(shape, tokens, nothing, [self._context for _ in rows], [None for _ in rows])
        return self._device.capture(lambda: self._run(shape, adapters=adapters))

    def _run(self, shape: GraphShape, *, adapters: bool = False) -> None:
        """The pass that is captured."""
        rows, width = shape.rows, shape.width
        slots, starts, last = self._slots[:rows], self._starts[:rows], self._last[:rows]
        past = FixedShapePast(self._cache, slots, starts, shape, self._kernel)
        self._lora.choose_rows(self._adapters[:rows] if adapters else None, width)
        ids = self._ids[None, : rows * width]
        # Padding may lie after the last position that the model knows.
        positions = past.positions.clamp(max=self._context - 1).view(1, -1)
        if not shape.head:
            self._forward(ids, positions, past, None)
            return
        ends = torch.arange(0, rows * width, width, device=last.device) + last
        if _samples_all(shape):
            logits = self._forward(ids, positions, past, 0)
        else:
            drafts = torch.arange(-graph_shapes.MAX_DRAFT_TOKENS, 1, device=last.device)
            logits = self._forward(ids, positions, past, (ends[:, None] + drafts).clamp(min=0).flatten())
            ends = torch.arange(1, rows + 1, device=last.device) * len(drafts) - 1
        chosen = logits.argmax(dim=1)
        logprobs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=1)
        self._results[0, : len(logits)] = chosen
        self._results[1, : len(logits)] = logprobs
        self._logits[:rows] = logits[ends]
        # The inputs of the decode step after this.
        self._ids[:rows] = chosen[ends]
        starts += last + 1
        last.zero_()


def _samples_all(shape: GraphShape) -> bool:
    return shape.rows * shape.width <= graph_shapes.MOST_SAMPLED


def _choice(launched: _LaunchedPass, row: int, index: int, results: list[list[float]]) -> Choice:
    """Return the choice after token `index` of a row; of a long pass only its last tokens have one."""
    if _samples_all(launched.shape):
        at = row * launched.shape.width + index
    else:
        at = (row + 1) * (graph_shapes.MAX_DRAFT_TOKENS + 1) - (launched.lengths[row] - index)
    return Choice(int(results[0][at]), results[1][at])


def _verified(
    launched: _LaunchedPass, row: int, chunk: Chunk, results: list[list[float]], constrained: Choice | None
) -> list[Choice]:
    """Return the choices after the last known token of a chunk and after each accepted draft token."""
    if constrained is not None:
        return [constrained]
    known = len(chunk.tokens) - chunk.num_draft_tokens
    return chunk.verify(lambda number: _choice(launched, row, known - 1 + number, results))
