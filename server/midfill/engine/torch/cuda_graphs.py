"""Captured passes with the next token chosen on the device, and decode steps that run ahead of their reader.

A captured pass reads its inputs (ids, slots, starts) from tensors that stay where they are, and leaves there
the inputs of the decode step that follows it: the token it has chosen, one place further. So the next step
can be launched before anybody has seen this one's token. While the engine thread turns a token into text, the
device is at work on the following ones (`_MOST_AHEAD`); results come back by copies that nobody waits for
before they are needed. What was computed ahead for nothing, because the output ended or was cancelled, is
ignored: it lies behind the tokens that count, and costs the device at most that many steps.

`Device` is what this module needs of CUDA; a test has its own, which calls the pass instead of replaying it.
Runs on the engine thread only.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from midfill.engine.scheduler import Choice, Chunk
from midfill.engine.torch import graph_shapes as graphs
from midfill.engine.torch.graph_shapes import Graphs, Shape
from midfill.engine.torch.kv_cache import FixedMemory, Kernel, Rows
from midfill.engine.torch.lora import Branches
from midfill.engine.torch.runner import choose

_MOST_AHEAD = 2
"""Decode steps launched beyond the one that is waited for. One hides the engine thread's work on a token, two
also its waiting for the interpreter; more would only be in the way of the next request."""

_QUICK_S = 0.002
"""Of steps that take longer than this only one is launched ahead: a cancelled request still costs them."""

MARGIN = graphs.WIDTHS[-1]
"""Room behind the context, where padding and passes that are being captured may write."""

Forward = Callable[[torch.Tensor, torch.Tensor, Rows, torch.Tensor | int | None], Any]
"""A forward pass; see `Runner.run`."""


class Fetch(Protocol):
    """A copy to the host that is under way."""

    def wait(self) -> list[list[float]]:
        """The values, as soon as they are there."""
        ...


class Device(Protocol):
    """What captures and replays."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run once, and record; returns what runs it again. Raises `MemoryError` for want of memory."""
        ...

    def fetch(self, tensor: torch.Tensor) -> Fetch:
        """Begin to copy the tensor (rows x columns), as it is after what was launched so far."""
        ...

    def has_room(self) -> bool:
        """Whether there is memory for another graph."""
        ...


@dataclass(slots=True)
class _Flight:
    """A pass that was launched.

    Attributes:
        shape: of the captured pass.
        places: slot, start and adapter of each row that counts.
        lengths: tokens of each of them.
        fetch: its results.
        tokens: what each row computes; None as long as only the device knows.
    """

    shape: Shape
    places: list[tuple[int, int, str | None]]
    lengths: list[int]
    fetch: Fetch
    tokens: list[list[int]] | None = None


class Replays:
    """The captured passes of one model and what is under way.

    Args:
        forward: the model.
        memory: keys and values; room for `MARGIN` tokens more than `context`.
        context: the most tokens of one sequence.
        vocab_size: the number of logits.
        kernel: how rows attend.
        branches: the model's adapters.
        device: see `Device`.
        place: where the tensors are.
    """

    def __init__(  # noqa: PLR0913 - the model, its memory, its device
        self,
        forward: Forward,
        memory: FixedMemory,
        *,
        context: int,
        vocab_size: int,
        kernel: Kernel,
        branches: Branches,
        device: Device,
        place: torch.device,
    ) -> None:
        self._forward = forward
        self._memory = memory
        self._context = context
        self._kernel = kernel
        self._branches = branches
        self._device = device
        self._graphs: Graphs[Callable[[], None]] = Graphs(context + MARGIN, self._capture, device.has_room)
        most_rows = graphs.ROWS[-1]
        # One upload fills them all: ids, slots, starts, the index of each row's last token, and its adapter.
        self._inputs = torch.zeros(MARGIN + 4 * most_rows, dtype=torch.int64, device=place)
        self._ids = self._inputs[:MARGIN]
        self._slots, self._starts, self._last, self._adapters = self._inputs[MARGIN:].view(4, most_rows)
        # Ids and log-probabilities. fp64 holds both exactly, so that one copy fetches them.
        self._results = torch.zeros((2, graphs.MOST_SAMPLED), dtype=torch.float64, device=place)
        # For a choice among some tokens only, which is made after the pass.
        self._logits = torch.zeros((most_rows, vocab_size), device=place)
        self._ahead: deque[_Flight] = deque()
        self._most_ahead = _MOST_AHEAD
        self._reading: Fetch | None = None  # the pass of a prompt that nobody has waited for

    @property
    def num_captured(self) -> int:
        """How many passes there are."""
        return len(self._graphs)

    @property
    def num_waiting(self) -> int:
        """How many are still to be captured."""
        return self._graphs.num_waiting

    def capture_next(self) -> bool:
        """Capture one more pass; see `Graphs.capture_next`."""
        self._ahead.clear()
        return self._graphs.capture_next()

    def pace(self, step_s: float) -> None:
        """Note how long a decode step takes, which decides how many are launched ahead."""
        self._most_ahead = _MOST_AHEAD if step_s <= _QUICK_S else 1

    def drop(self) -> None:
        """Free the memory of all captured passes, for good."""
        self._ahead.clear()
        self._graphs.drop()

    def restart(self) -> None:
        """The model is another one now: capture all passes anew, when there is time."""
        self._ahead.clear()
        self._graphs.restart()

    def forget(self) -> None:
        """What runs ahead is not wanted: the slots change otherwise."""
        self._ahead.clear()

    def compute(
        self, chunks: Sequence[Chunk], allowed: Sequence[array[int] | None], *, alone: bool
    ) -> list[list[Choice]] | None:
        """Compute chunks in one captured pass.

        Args:
            chunks: see `Runner.forward`.
            allowed: see there.
            alone: whether these are all chunks of the step, so that the next one may follow at once.

        Returns:
            See `Runner.forward`; None if no captured pass fits. Nothing was computed then.
        """
        rows = self._land(chunks, allowed)
        if rows is None:
            self._ahead.clear()
            flight = self._launch(chunks)
            rows = list(range(len(chunks)))
        else:
            flight = self._ahead.popleft()
        if flight is None:
            return None
        if not any(chunk.samples for chunk in chunks):
            self._read(flight)
            return [[] for _ in chunks]
        # The pass has chosen among all tokens. Where only some are allowed, its logits are asked again.
        demanded = {
            row: choose(self._logits[row], ids)
            for row, ids in zip(rows, allowed, strict=True)
            if ids is not None
        }
        # After guesses the device does not know where the sequence goes on.
        certain = all(chunk.samples and not chunk.num_guesses for chunk in chunks)
        if alone and certain and not demanded:
            self._follow(flight)
        results = flight.fetch.wait()
        choices: list[list[Choice]] = [
            _verified(flight, row, chunk, results, demanded.get(row)) if chunk.samples else []
            for row, chunk in zip(rows, chunks, strict=True)
        ]
        if self._ahead:
            self._ahead[0].tokens = [
                [_choice(flight, row, length - 1, results).id] for row, length in enumerate(flight.lengths)
            ]
        return choices

    def _read(self, flight: _Flight) -> None:
        """Wait for a pass that chooses nothing; if passes are quick, for the one before it instead.

        So the device has the next part of a prompt when it is done with one, and never more than that.
        """
        before, self._reading = self._reading, None
        if self._most_ahead == 1:
            flight.fetch.wait()
            return
        self._reading = flight.fetch
        if before is not None:
            before.wait()

    def _land(self, chunks: Sequence[Chunk], allowed: Sequence[array[int] | None]) -> list[int] | None:
        """The rows of the next pass under way that compute just these chunks; None if it does not."""
        if not self._ahead or (flight := self._ahead[0]).tokens is None:
            return None
        rows = []
        for chunk, ids in zip(chunks, allowed, strict=True):
            place = (chunk.slot, chunk.start, chunk.sequence.key)
            if ids is not None or place not in flight.places:
                return None
            row = flight.places.index(place)
            if chunk.tokens != flight.tokens[row]:
                return None
            rows.append(row)
        return rows

    def _launch(self, chunks: Sequence[Chunk]) -> _Flight | None:
        """Upload the inputs of a pass and replay it; None if none is captured."""
        lengths = [len(chunk.tokens) for chunk in chunks]
        starts = [chunk.start for chunk in chunks]
        found = self._find(lengths, max(starts), head=any(chunk.samples for chunk in chunks))
        if found is None:
            return None
        shape, replay = found
        keys = [chunk.sequence.key for chunk in chunks]
        self._load(shape, [chunk.tokens for chunk in chunks], [chunk.slot for chunk in chunks], starts, keys)
        replay()
        places = [(chunk.slot, chunk.start, chunk.sequence.key) for chunk in chunks]
        return _Flight(shape, places, lengths, self._device.fetch(self._results))

    def _find(
        self, lengths: Sequence[int], start: int, *, head: bool
    ) -> tuple[Shape, Callable[[], None]] | None:
        size = graphs.fit(lengths)
        if size is None:
            return None
        rows, width = size
        found = self._graphs.find(self._graphs.shape(rows, width, start + width, head=head))
        if found is not None and found[0].keys < start + found[0].width:
            # A wider one ends later; it must be long enough for its own padding.
            rows, width = found[0].rows, found[0].width
            found = self._graphs.find(self._graphs.shape(rows, width, start + width, head=head))
        return found

    def _follow(self, flight: _Flight) -> None:
        """Launch the decode steps after `flight`: each leaves the inputs of the next where it reads them."""
        last = self._ahead[-1] if self._ahead else flight
        while len(self._ahead) < self._most_ahead:
            places = [
                (slot, start + length, key)
                for (slot, start, key), length in zip(last.places, last.lengths, strict=True)
            ]
            furthest = max(start for _, start, _ in places)
            if furthest >= self._context:
                return
            found = self._find([1] * len(places), furthest, head=True)
            # More rows, or wider ones, have inputs that the pass before has not left there.
            if found is None or found[0].width > 1 or found[0].rows > last.shape.rows:
                return
            shape, replay = found
            replay()
            last = _Flight(shape, places, [1] * len(places), self._device.fetch(self._results))
            self._ahead.append(last)

    def _load(
        self,
        shape: Shape,
        tokens: Sequence[list[int]],
        slots: Sequence[int],
        starts: Sequence[int],
        keys: Sequence[str | None],
    ) -> None:
        """Upload inputs. Rows that are not needed repeat the first, which writes the same where it does."""
        spare = shape.rows - len(tokens)
        tokens = [*tokens, *[tokens[0]] * spare]
        ids: list[int] = []
        for row in tokens:
            ids += row + [0] * (shape.width - len(row))
        ids += [0] * (MARGIN - len(ids))
        unused = [0] * (graphs.ROWS[-1] - shape.rows)
        adapters = [self._branches.index(key) for key in keys]
        values = [
            *ids,
            *(*slots, *[slots[0]] * spare, *unused),
            *(*starts, *[starts[0]] * spare, *unused),
            *(*(len(row) - 1 for row in tokens), *unused),
            *(*adapters, *[adapters[0]] * spare, *unused),
        ]
        # Pinned memory is not reused before it is copied, so that the copy can wait its turn on the device.
        host = torch.tensor(values, dtype=torch.int64, pin_memory=self._inputs.is_cuda)
        self._inputs.copy_(host, non_blocking=True)

    def _capture(self, shape: Shape) -> Callable[[], None]:
        # Behind the context, where no slot has anything.
        rows = range(shape.rows)
        tokens = [[0] * shape.width for _ in rows]
        nothing = [0 for _ in rows]
        self._load(shape, tokens, nothing, [self._context for _ in rows], [None for _ in rows])
        return self._device.capture(lambda: self._run(shape))

    def _run(self, shape: Shape) -> None:
        """The pass that is captured."""
        rows, width = shape.rows, shape.width
        slots, starts, last = self._slots[:rows], self._starts[:rows], self._last[:rows]
        past = Rows(self._memory, slots, starts, shape, self._kernel)
        self._branches.choose_rows(self._adapters[:rows], width)
        ids = self._ids[None, : rows * width]
        # Padding may lie behind the last position that the model knows.
        positions = past.positions.clamp(max=self._context - 1).view(1, -1)
        if not shape.head:
            self._forward(ids, positions, past, None)
            return
        ends = torch.arange(0, rows * width, width, device=last.device) + last
        if _samples_all(shape):
            logits = self._forward(ids, positions, past, 0)
        else:
            guesses = torch.arange(-graphs.MOST_GUESSES, 1, device=last.device)
            logits = self._forward(ids, positions, past, (ends[:, None] + guesses).clamp(min=0).flatten())
            ends = torch.arange(1, rows + 1, device=last.device) * len(guesses) - 1
        chosen = logits.argmax(dim=1)
        logprobs = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(dim=1)
        self._results[0, : len(logits)] = chosen
        self._results[1, : len(logits)] = logprobs
        self._logits[:rows] = logits[ends]
        # The inputs of the decode step after this.
        self._ids[:rows] = chosen[ends]
        starts += last + 1
        last.zero_()


def _samples_all(shape: Shape) -> bool:
    return shape.rows * shape.width <= graphs.MOST_SAMPLED


def _choice(flight: _Flight, row: int, index: int, results: list[list[float]]) -> Choice:
    """What follows token `index` of a row: one of its last ones, if the pass is a long one."""
    if _samples_all(flight.shape):
        at = row * flight.shape.width + index
    else:
        at = (row + 1) * (graphs.MOST_GUESSES + 1) - (flight.lengths[row] - index)
    return Choice(int(results[0][at]), results[1][at])


def _verified(
    flight: _Flight, row: int, chunk: Chunk, results: list[list[float]], demanded: Choice | None
) -> list[Choice]:
    """What follows the last known token of a chunk, and each guess that came true."""
    if demanded is not None:
        return [demanded]
    known = len(chunk.tokens) - chunk.num_guesses
    return chunk.verify(lambda number: _choice(flight, row, known - 1 + number, results))
