r"""Suggestions made and suggestions being made, and what of them fits where the cursor is now.

A suggestion belongs to a place in a text (`Origin`). It still holds while the text is that of its origin with
a beginning of the suggestion typed in: then the rest of it is what there is to show, and no model is
asked. How the beginning came there does not matter: by keys, by accepting a word or a line, by undoing.

Brackets and quotes that an editor closes by itself stand behind the cursor before their time. To the model
they are not there (`Suggestions.bare`), and what it writes is fitted in (`fitted`): its own closers are left
out where it ends with them, and take the place of those in the document where it goes on behind them.

A suggestion that is being computed is an `InFlightCompletion`. It belongs to no request: requests wait for
it, and may come and go. It goes on while somebody waits, and for a moment longer, in which the next request
can join it; it ends at once when the text has come to contradict it.

Knows texts and places, nothing of models, prompts or LSP; what is computed is the caller's `work`. All
texts have \n. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from midfill.engine.api import Request
from midfill.text.documents import Change, Document, Point, Snapshot

LINGER_S = 0.25
"""How long a flight that nobody awaits goes on: editors take a request back at a key, and ask again some
50 to 100 ms after it."""

_MAX_DOCUMENTS = 64
_MAX_PER_DOCUMENT = 32
_MAX_INSERTED_CHARS = 4_000
# Brackets within brackets that editors close in one go.
_MAX_NESTED = 8

# What editors insert behind the cursor when an opening bracket or quote is typed.
_AUTOMATIC = re.compile(r"""[)\]}>"'`]+\Z""")
_CLOSERS, _OPENERS, _QUOTES = frozenset(")]}"), frozenset("([{"), frozenset("\"'`")

A = TypeVar("A")


class Text:
    """A document as suggestions look at it; remembers what it has computed of it."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self._digests: dict[tuple[int, int], int] = {}

    def digest(self, start: int, end: int) -> int:
        """A number that stands for these lines. Unchanged lines have their own hashes ready."""
        if (digest := self._digests.get((start, end))) is None:
            digest = self._digests[start, end] = hash(tuple(self.document.lines[start:end]))
        return digest


@dataclass(frozen=True, slots=True)
class Origin:
    """A place in a text, and that text as far as it must stay the same. Holds two of its lines at most.

    Attributes:
        before, after: the line up to the place, and from there on with its terminator.
        above, below: digests of all lines above and below it.
        num_lines, num_chars: of the whole text.
    """

    uri: str
    line: int
    before: str
    after: str
    above: int
    below: int
    num_lines: int
    num_chars: int

    @staticmethod
    def of(snapshot: Snapshot) -> Origin:
        """The place of a cursor."""
        document, cursor = snapshot.document, snapshot.cursor
        text = Text(document)
        line, num_lines = document.lines[cursor.line], len(document.lines)
        return Origin(
            document.uri,
            cursor.line,
            line[: cursor.column],
            line[cursor.column :],
            text.digest(0, cursor.line),
            text.digest(cursor.line + 1, num_lines),
            num_lines,
            document.num_chars,
        )

    def inserted(self, text: Text, cursor: Point | None = None) -> tuple[str, str] | None:
        """What a later text has at this place, before and behind the cursor; None if it differs elsewhere.

        Without a cursor, all of it counts as before it.
        """
        document = text.document
        grown = len(document.lines) - self.num_lines
        size = document.num_chars - self.num_chars
        if grown < 0 or not 0 <= size <= _MAX_INSERTED_CHARS or document.uri != self.uri:
            return None
        last = self.line + grown
        if cursor is not None and not self.line <= cursor.line <= last:
            return None
        # With both ends in place, what is between them has the right size by itself.
        lines = document.lines[self.line : last + 1]
        if not lines[0].startswith(self.before) or not lines[-1].endswith(self.after):
            return None
        if grown == 0 and len(lines[0]) < len(self.before) + len(self.after):
            return None
        if text.digest(0, self.line) != self.above:
            return None
        if text.digest(last + 1, len(document.lines)) != self.below:
            return None
        whole = "".join(lines)
        whole = whole[len(self.before) : len(whole) - len(self.after)]
        split = len(whole)
        if cursor is not None:
            split = sum(map(len, lines[: cursor.line - self.line])) + cursor.column - len(self.before)
            if not 0 <= split <= len(whole):
                return None
        return _plain(whole[:split]), _plain(whole[split:])


def _fits(inserted: tuple[str, str], made_explicit: bool, explicit: bool) -> bool:
    """Whether what was made for the one trigger may serve the other: only as what is typed through."""
    return explicit is made_explicit or bool(inserted[0])


@dataclass(frozen=True, slots=True)
class Computed(Generic[A]):
    """What the model made of a place.

    Attributes:
        text: the suggestion; "" if there is none.
        raw: all that the model wrote there, which may go on behind the suggestion's end.
        made: whatever the caller wants to know of it later.
        lasting: whether it would come out the same again; a fault would not.
    """

    text: str
    raw: str
    made: A
    lasting: bool = True


@dataclass(frozen=True, slots=True)
class Suggestion(Generic[A]):
    """A suggestion, or that there is none, at a place.

    Attributes:
        explicit: whether it was asked for explicitly; if not, it is no answer to who does.
        context: what else it was made from; one of another context is no answer at its origin.
        ahead: whether it was computed before anybody asked.
    """

    origin: Origin
    computed: Computed[A]
    explicit: bool = False
    context: Hashable = None
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class Match(Generic[A]):
    """A suggestion, and what of the text at its origin has come since.

    Attributes:
        typed: what stands there before the cursor.
        closed: what stands there behind the cursor.
    """

    suggestion: Suggestion[A]
    typed: str = ""
    closed: str = ""

    @property
    def exact(self) -> bool:
        """Whether the text is that of the origin, but for what the editor closed by itself."""
        return not self.typed and (not self.closed or _AUTOMATIC.match(self.closed) is not None)

    @property
    def rest(self) -> tuple[str, int]:
        """What is still to come at the cursor to get the suggestion, as `fitted` gives it.

        The text is "" if nothing fits, or nothing is left.
        """
        text = self.suggestion.computed.text
        if not text.startswith(self.typed) or not _awaits(self.typed, self.closed):
            return "", 0
        rest = fitted(text[len(self.typed) :], self.closed)
        return rest if rest is not None and rest[0].strip() else ("", 0)

    @property
    def beyond(self) -> str:
        """What the model wrote after all that is typed, if that is the suggestion at least; else ""."""
        computed = self.suggestion.computed
        passed = self.typed.startswith(computed.text) and computed.raw.startswith(self.typed)
        return computed.raw[len(self.typed) :] if passed and not self.closed else ""


def fitted(text: str, closed: str) -> tuple[str, int] | None:
    """How a text gets where an editor has closed brackets and quotes behind the cursor already.

    Returns what to insert at the cursor and how many of the closers, from the first on, it replaces: those
    that it closes itself before it goes on. Closers at its end are left out instead. So what is replaced can
    be found in the text, in order. None if what stands there is something else.
    """
    if text.endswith(closed):
        return text[: len(text) - len(closed)], 0
    if _AUTOMATIC.match(closed) is None:
        return None
    places = matched_closer_offsets(text, closed)
    while places and places[-1] == len(text) - 1:
        text = text[: places.pop()]
    return text, len(places)


def text_before_closers(text: str, replaced: str) -> str:
    """What of a text can be inserted before these closers without replacing them."""
    return text[: matched_closer_offsets(text, replaced)[0]].rstrip()


def matched_closer_offsets(text: str, closed: str) -> list[int]:
    """Where a text closes, in their order, what these closers close; the last of them it may not."""
    places: list[int] = []
    depth = 0
    for at, char in enumerate(text):
        if len(places) < len(closed) and not depth and char == closed[len(places)]:
            places.append(at)
        elif char in _OPENERS:
            depth += 1
        elif char in _CLOSERS:
            depth = max(0, depth - 1)
    return places


def _awaits(typed: str, closed: str) -> bool:
    """Whether what was typed still needs the closers that the editor put behind it."""
    if not closed:
        return True
    if closed[0] in _QUOTES:
        count = typed.count(closed[0])
        return count == 0 or count % 2 == 1
    depth = 0
    for char in typed:
        depth += (char in _OPENERS) - (char in _CLOSERS)
        if depth < 0:
            return False
    return True


def may_close(change: Change) -> bool:
    """Whether a change may put something behind the cursor that the editor closes by itself."""
    inserts = change.start is not None and change.start == change.end
    return inserts and _AUTOMATIC.match(change.text.rstrip("\r\n")[-1:]) is not None


def auto_closing_changes(changes: Sequence[Change]) -> list[int]:
    """The numbers of those changes, made at once, that have to be told by `Suggestions.closing`, in order.

    A later one takes the place of the earlier ones, unless it is within what they have put in. So the last
    few are enough; to look at each of a thousand cursors would take seconds.
    """
    return [at for at, change in enumerate(changes) if may_close(change)][-_MAX_NESTED:]


def agrees(inserted: str, expected: str) -> bool:
    """Whether what stands at a place may still become what is expected there; its end may be missing yet."""
    if expected.startswith(inserted) or inserted.startswith(expected):
        return True
    pairs = enumerate(zip(inserted, expected, strict=False))
    num_same = next(index for index, (one, other) in pairs if one != other)
    return _AUTOMATIC.match(inserted, num_same) is not None


class InFlightCompletion(Generic[A]):
    """A suggestion that is being computed.

    Args:
        base: the place in the text as it was.
        assumed: what is assumed to be inserted there, as if it had been accepted already; "" as a rule.
        origin: the place that the suggestion is for: `base`, with `assumed` inserted.

    Attributes:
        text: what the model has written so far; the work keeps it up to date by `push`.
        waiters: who waits, with what stands at the origin in their text.
    """

    def __init__(
        self, base: Origin, assumed: str, origin: Origin, *, explicit: bool, context: Hashable
    ) -> None:
        self.base = base
        self.assumed = assumed
        self.origin = origin
        self.explicit = explicit
        self.context = context
        self.text = ""
        self.waiters: dict[asyncio.Future[Match[A] | None], tuple[str, str]] = {}
        self.task: asyncio.Task[Computed[A]] | None = None
        self._inserted = ""
        self._request: Request | None = None
        self._linger: asyncio.TimerHandle | None = None

    @property
    def awaited(self) -> bool:
        """Whether somebody waits."""
        return bool(self.waiters)

    @property
    def ending(self) -> bool:
        """Whether it is being cancelled, and so of no use to anybody."""
        return self.task is not None and self.task.cancelling() > 0

    def run_as(self, request: Request) -> None:
        """Name the engine's request, which is idle work while nobody waits for this flight."""
        self._request = request
        request.set_idle(not self.awaited)

    def push(self, text: str) -> None:
        """The model has written this so far. Who waits but has typed something else has to look elsewhere."""
        self.text = text
        for waiter, (typed, closed) in list(self.waiters.items()):
            if not waiter.done() and not agrees(typed + closed, text):
                waiter.set_result(None)
        if not agrees(self._inserted, self.assumed + text):
            self.cancel()

    def follow(self, document: Document) -> bool:
        """The document is so now: go on if that agrees, else cancel. Returns whether it goes on."""
        inserted = self.base.inserted(Text(document))
        if inserted is None or not agrees(inserted[0], self.assumed + self.text):
            self.cancel()
            return False
        self._inserted = inserted[0]
        if self._linger is not None:
            self.linger()
        return True

    def serves(self, snapshot: Snapshot) -> bool:
        """Whether it is, or may become, of use for who is here now."""
        inserted = self.base.inserted(Text(snapshot.document), snapshot.cursor)
        return inserted is not None and agrees("".join(inserted), self.assumed + self.text)

    async def wait(self, inserted: tuple[str, str]) -> Match[A] | None:
        """The result, for a text in which this stands at the origin; None once the flight contradicts it.

        Raises `asyncio.CancelledError` too if the newest text contradicts the flight.
        """
        waiter: asyncio.Future[Match[A] | None] = asyncio.get_running_loop().create_future()
        self.waiters[waiter] = inserted
        self._attend()
        try:
            return await waiter
        finally:
            del self.waiters[waiter]
            if not self.awaited and self.task is not None and not self.task.done():
                self.linger()

    def linger(self) -> None:
        """Go on for a moment although nobody waits."""
        self._attend()
        self._linger = asyncio.get_running_loop().call_later(LINGER_S, self.cancel)

    def cancel(self) -> None:
        """End it at once; those who wait are cancelled."""
        if self.task is not None:
            self.task.cancel()

    def settle(self, suggestion: Suggestion[A] | None, error: BaseException | None = None) -> None:
        """It has ended: with a suggestion, or an error, or it was cancelled."""
        if self._linger is not None:
            self._linger.cancel()
        for waiter, (typed, closed) in self.waiters.items():
            if waiter.done():
                continue
            if suggestion is not None:
                waiter.set_result(Match(suggestion, typed, closed))
            elif error is not None:
                waiter.set_exception(error)
            else:
                waiter.cancel()

    def _attend(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._request is not None:
            self._request.set_idle(not self.awaited)


@dataclass(slots=True)
class Suggestions(Generic[A]):
    """What was suggested, by document, and the flights. Bounded: the least recently used go first."""

    _kept: OrderedDict[str, OrderedDict[tuple[Origin, bool, Hashable], Suggestion[A]]] = field(
        default_factory=OrderedDict
    )
    _flights: list[InFlightCompletion[A]] = field(default_factory=list)
    _bases: OrderedDict[str, Origin] = field(default_factory=OrderedDict)

    def bare(self, snapshot: Snapshot) -> tuple[Snapshot, str]:
        """A snapshot without the closers that the editor has put behind the cursor by itself, and those.

        They are known by what was there when the model was asked last, or before a change that may close.
        """
        base = self._bases.get(snapshot.document.uri)
        if base is None or _AUTOMATIC.match(snapshot.line_after[:1]) is None:
            return snapshot, ""
        typed, closed = base.inserted(Text(snapshot.document), snapshot.cursor) or ("", "")
        # Some editors send a new line with its end.
        closed = closed.removesuffix("\n")
        if _AUTOMATIC.match(closed) is None or not _awaits(typed, closed):
            return snapshot, ""
        return snapshot.insert("", len(closed)), closed

    def closing(self, snapshot: Snapshot) -> None:
        """A change is about to be made here that may close what it opens."""
        self._begin(Origin.of(self.bare(snapshot)[0]))

    def _begin(self, base: Origin) -> None:
        self._bases[base.uri] = base
        self._bases.move_to_end(base.uri)
        if len(self._bases) > _MAX_DOCUMENTS:
            self._bases.popitem(last=False)

    def matches(self, snapshot: Snapshot, *, explicit: bool) -> Iterator[Match[A]]:
        """The suggestions that hold at a cursor, the most recently used first."""
        text = Text(snapshot.document)
        for suggestion in reversed(self._kept.get(snapshot.document.uri, {}).copy().values()):
            if explicit and not suggestion.explicit:
                continue
            inserted = suggestion.origin.inserted(text, snapshot.cursor)
            if inserted is not None and _fits(inserted, suggestion.explicit, explicit):
                yield Match(suggestion, *inserted)

    def keep(self, suggestion: Suggestion[A]) -> None:
        """Remember a suggestion, or that it was used just now."""
        uri = suggestion.origin.uri
        own = self._kept.setdefault(uri, OrderedDict())
        self._kept.move_to_end(uri)
        key = suggestion.origin, suggestion.explicit, suggestion.context
        own[key] = suggestion
        own.move_to_end(key)
        if len(own) > _MAX_PER_DOCUMENT:
            own.popitem(last=False)
        if len(self._kept) > _MAX_DOCUMENTS:
            self._kept.popitem(last=False)

    def launch(
        self,
        snapshot: Snapshot,
        work: Callable[[InFlightCompletion[A]], Awaitable[Computed[A]]],
        *,
        explicit: bool = False,
        context: Hashable = None,
        ahead_of: Snapshot | None = None,
    ) -> InFlightCompletion[A]:
        """Begin to compute a suggestion at a cursor.

        `ahead_of`: the snapshot is what this one becomes if something is inserted at its cursor.
        """
        origin = Origin.of(snapshot)
        base, assumed = origin, ""
        if ahead_of is None:
            self._begin(origin)
        else:
            base = Origin.of(ahead_of)
            assumed = "".join(base.inserted(Text(snapshot.document), snapshot.cursor) or ())
        flight = InFlightCompletion[A](base, assumed, origin, explicit=explicit, context=context)
        flight.task = asyncio.ensure_future(work(flight))
        flight.task.add_done_callback(partial(self._landed, flight))
        self._flights.append(flight)
        return flight

    def join(
        self, snapshot: Snapshot, *, explicit: bool
    ) -> tuple[InFlightCompletion[A], tuple[str, str]] | None:
        """A flight that agrees with what was typed, and what was; the newest if there are several."""
        text = Text(snapshot.document)
        for flight in reversed(self._flights):
            if flight.ending or (explicit and not flight.explicit):
                continue
            inserted = flight.origin.inserted(text, snapshot.cursor)
            if inserted is None or not _fits(inserted, flight.explicit, explicit):
                continue
            if agrees("".join(inserted), flight.text):
                return flight, inserted
        return None

    def edited(self, document: Document) -> None:
        """A document has changed: end the flights that it contradicts."""
        for flight in self._of(document.uri):
            flight.follow(document)

    def computes(self, uri: str) -> bool:
        """Whether something is being computed for a document."""
        return bool(self._of(uri))

    def moved(self, snapshot: Snapshot) -> None:
        """The user is here now: end the flights that are of no use here and that nobody waits for."""
        for flight in self._of(snapshot.document.uri):
            if not flight.awaited and not flight.serves(snapshot):
                flight.cancel()

    def forget(self, uri: str) -> None:
        """Drop what there is of a document."""
        self._kept.pop(uri, None)
        self._bases.pop(uri, None)
        for flight in self._of(uri):
            flight.cancel()

    def clear(self) -> None:
        """Drop everything. Who waits gets an answer, which is not kept."""
        self._kept.clear()
        for flight in self._flights:
            if not flight.awaited:
                flight.cancel()
        self._flights.clear()

    def _of(self, uri: str) -> list[InFlightCompletion[A]]:
        return [flight for flight in self._flights if flight.origin.uri == uri and not flight.ending]

    def _landed(self, flight: InFlightCompletion[A], task: asyncio.Task[Computed[A]]) -> None:
        current = flight in self._flights
        if current:
            self._flights.remove(flight)
        if task.cancelled():
            flight.settle(None)
        elif (error := task.exception()) is not None:
            flight.settle(None, error)
        else:
            computed = task.result()
            suggestion = Suggestion(
                flight.origin, computed, flight.explicit, flight.context, ahead=bool(flight.assumed)
            )
            if current and computed.lasting:
                self.keep(suggestion)
            flight.settle(suggestion)


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
