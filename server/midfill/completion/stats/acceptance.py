"""Feedback: which suggestions were accepted, and which of those stayed; counted on this machine.

An editor says that an item was accepted by the item's command; editors that do not, and those that take
a word or a line of it, are found out by the edits that follow an offer. An accepted text is looked for
again after 30 seconds and after 5 minutes. Counts are kept by model and language in one small file of the
user's state folder; texts live in memory only, for those 5 minutes, and are never written anywhere.

`Feedback` is pure; `AcceptanceTracker` gives it a clock and a file, on the event loop; `add` and `read` touch the disk.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from midfill.errors import MidfillError
from midfill.system import text_files
from midfill.system.folders import state_folder
from midfill.system.json_files import read_json
from midfill.system.private import private_folder
from midfill.text.documents import Change, Document, Encoding, Point, split_lines

CHECKS = (("30s", 30.0), ("5min", 300.0))
# An accepted text is there still if so much of it can be found at its place, in order.
_KEPT_SHARE = 2 / 3
# A key inserts one character; what inserts more, and agrees with the offer, is a part of it accepted.
_MIN_PART = 2
_MAX_OFFERS = 16
_MAX_WATCHED = 256
_LOCK_S = 2.0
_WRITE_S = 30.0

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """What became of the suggestions of one model in one language.

    Attributes:
        offered: suggestions sent to the editor; one that is typed through counts once.
        accepted: taken whole.
        partly_accepted: a word or a line of it was taken.
        accepted_chars: characters taken, of both.
        checked_30s, kept_30s: accepted ones that were looked for after 30 seconds, and found.
        checked_5min, kept_5min: likewise after 5 minutes.
    """

    offered: int = 0
    accepted: int = 0
    partly_accepted: int = 0
    accepted_chars: int = 0
    checked_30s: int = 0
    kept_30s: int = 0
    checked_5min: int = 0
    kept_5min: int = 0

    def add(self, other: Counts) -> None:
        """Add another's counts to these."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


Table = dict[str, dict[str, Counts]]
"""Counts by model and language; a model with an adapter is one of its own, see `key_of`."""

_WITH = " + "
_WITHOUT = " (held out)"
_HELD_OUT = 0.1


def key_of(model: str, adapter: str | None, *, held_out: bool = False) -> str:
    """The model's name in the table; `held_out` if it had no adapter though this one was to be used."""
    return model if adapter is None else f"{model}{_WITH}{adapter}{_WITHOUT if held_out else ''}"


def adapter_of(key: str) -> tuple[str, str | None]:
    """The model and the adapter that a name in the table stands for."""
    model, _, adapter = key.partition(_WITH)
    return model, adapter or None


def is_held_out(session: str) -> bool:
    """Whether a session is one of the tenth without adapters: by its id alone, so it stays so."""
    return int.from_bytes(hashlib.sha256(session.encode()).digest()[:8]) < _HELD_OUT * 2**64


def with_and_without(key: str) -> tuple[str, bool]:
    """The key with the adapter that was to be used, and whether it was held out."""
    return key.removesuffix(_WITHOUT), key.endswith(_WITHOUT)


Sessions = dict[str, dict[str, Counts]]
"""Counts by session and key, of all languages together: what two groups of sessions are compared by."""

_MOST_SESSIONS = 2000


@dataclass(slots=True, eq=False)
class _ShownSuggestion:
    """A suggestion that the editor has, or what is left of it.

    Attributes:
        key: model and language.
        start: where `text` would go.
        num_replaced: characters behind it whose place the text would take.
        accepted, partly: whether it was counted as such.
    """

    uri: str
    key: tuple[str, str]
    start: Point
    text: str
    num_replaced: int = 0
    accepted: bool = False
    partly: bool = False

    @property
    def end(self) -> Point:
        """Where what it would replace ends."""
        return Point(self.start.line, self.start.column + self.num_replaced)


@dataclass(slots=True, eq=False)
class _Watched:
    """An accepted text, until it has been looked for the last time.

    Attributes:
        done: how many of `CHECKS` have been made.
    """

    uri: str
    key: tuple[str, str]
    start: Point
    text: str
    since_s: float
    done: int = 0

    @property
    def due_s(self) -> float:
        """When it is looked for next."""
        return self.since_s + CHECKS[self.done][1]


class Feedback:
    """Follows offers through the edits of their documents. Times are those of one clock, in seconds."""

    def __init__(self) -> None:
        self._table: Table = {}
        self._offers: OrderedDict[int, _ShownSuggestion] = OrderedDict()
        self._current: dict[str, int] = {}
        self._watched: list[_Watched] = []
        self._next_id = 1

    def offer(self, document: Document, start: Point, text: str, model: str, num_replaced: int = 0) -> int:
        """A suggestion goes out; returns the id for its item's command.

        What is left of a suggestion that the user types through is the same one still.
        """
        text = _plain(text)
        id_ = self._current.get(document.uri, 0)
        current = self._offers.get(id_)
        if current is not None and (current.start, current.text) == (start, text):
            return id_
        offer = _ShownSuggestion(document.uri, (model, document.language_id), start, text, num_replaced)
        self._counts(offer.key).offered += 1
        id_, self._next_id = self._next_id, self._next_id + 1
        self._offers[id_] = offer
        self._current[document.uri] = id_
        if len(self._offers) > _MAX_OFFERS:
            self._offers.popitem(last=False)
        return id_

    def accept(self, id_: int, now_s: float) -> None:
        """The editor says that an offer was accepted; unknown ones and those known already do not count."""
        if (offer := self._offers.get(id_)) is not None:
            self._accept(offer, offer.start, now_s)

    def edit(self, uri: str, start: Point, end: Point, text: str, now_s: float) -> None:
        """An edit of a document, in the places of the document before it."""
        text = _plain(text)
        current = self._offers.get(self._current.get(uri, 0))
        touched = current is not None and end in {current.start, current.end}
        places: list[_ShownSuggestion | _Watched] = [*self._offers.values(), *self._watched]
        for place in places:
            if place.uri == uri and not (touched and place is current):
                place.start = _moved(place.start, start, end, text)
        if current is not None and touched:
            self._take(current, start, end, text, now_s)

    def follows(self, uri: str) -> bool:
        """Whether edits of a document matter."""
        return uri in self._current or any(watched.uri == uri for watched in self._watched)

    def check(self, documents: Mapping[str, Document], now_s: float) -> float | None:
        """Look for accepted texts that are due. Returns when the next one is, or None."""
        for watched in self._watched:
            while watched.done < len(CHECKS) and watched.due_s <= now_s:
                name, _ = CHECKS[watched.done]
                watched.done += 1
                if (document := documents.get(watched.uri)) is not None:
                    self._look(watched, document, name)
        self._watched = [watched for watched in self._watched if watched.done < len(CHECKS)]
        return min((watched.due_s for watched in self._watched), default=None)

    def close(self, uri: str) -> None:
        """A document was closed: what was accepted there is not looked for any more."""
        self._current.pop(uri, None)
        self._watched = [watched for watched in self._watched if watched.uri != uri]

    @property
    def has_counts(self) -> bool:
        """Whether `collect` would give any."""
        return bool(self._table)

    def collect(self) -> Table:
        """The counts since the last call."""
        table, self._table = self._table, {}
        return table

    def restore(self, table: Table) -> None:
        """Take back what `collect` gave, which could not be written."""
        for model, languages in table.items():
            for language, counts in languages.items():
                self._counts((model, language)).add(counts)

    def _counts(self, key: tuple[str, str]) -> Counts:
        model, language = key
        return self._table.setdefault(model, {}).setdefault(language, Counts())

    def _take(self, offer: _ShownSuggestion, start: Point, end: Point, text: str, now_s: float) -> None:
        """An edit that ends where the offer would go: the offer accepted, a part of it, or other text."""
        if len(text) >= _MIN_PART and text.endswith(offer.text):
            # Editors may replace the word before the cursor along with it.
            self._accept(offer, _after(start, text[: len(text) - len(offer.text)]), now_s)
        elif text and start == end and offer.text.startswith(text):
            offer.start, offer.text = _after(start, text), offer.text[len(text) :]
            if len(text) >= _MIN_PART:
                counts = self._counts(offer.key)
                counts.partly_accepted += not offer.partly
                counts.accepted_chars += len(text)
                offer.partly = True
        else:
            offer.start = _after(start, text)
            del self._current[offer.uri]

    def _accept(self, offer: _ShownSuggestion, start: Point, now_s: float) -> None:
        if self._current.get(offer.uri) is not None and self._offers.get(self._current[offer.uri]) is offer:
            del self._current[offer.uri]
        if offer.accepted or not offer.text:
            return
        offer.accepted = True
        counts = self._counts(offer.key)
        counts.accepted += 1
        counts.accepted_chars += len(offer.text)
        self._watched.append(_Watched(offer.uri, offer.key, start, offer.text, now_s))
        del self._watched[:-_MAX_WATCHED]

    def _look(self, watched: _Watched, document: Document, name: str) -> None:
        counts = self._counts(watched.key)
        kept = _share_kept(watched.text, document, watched.start) >= _KEPT_SHARE
        if name == "30s":
            counts.checked_30s += 1
            counts.kept_30s += kept
        else:
            counts.checked_5min += 1
            counts.kept_5min += kept


class AcceptanceTracker:
    """`Feedback` with a clock and a file. Runs on the event loop; writes in a thread.

    Args:
        documents: the open ones, as they are at any time.

    Attributes:
        counts: whether anything is counted.
        session: the id under which what adapters do is counted by session too; None if it is not.
    """

    def __init__(self, documents: Mapping[str, Document]) -> None:
        self.counts = False
        self.session: str | None = None
        self._documents = documents
        self._feedback = Feedback()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._writing: asyncio.Task[None] | None = None
        self._failed = False

    def offer(
        self, document: Document, start: Point, text: str, model: str, num_replaced: int = 0
    ) -> int | None:
        """See `Feedback.offer`; None if nothing is counted."""
        if not self.counts:
            return None
        id_ = self._feedback.offer(document, start, text, model, num_replaced)
        self._see_to_it()
        return id_

    def accept(self, id_: int) -> None:
        """See `Feedback.accept`."""
        self._feedback.accept(id_, time.monotonic())
        self._see_to_it()

    def edit(self, before: Document, after: Document, changes: Sequence[Change], encoding: Encoding) -> None:
        """A document was edited."""
        if not self._feedback.follows(after.uri):
            return
        change = changes[0] if len(changes) == 1 else None
        if change is not None and change.start is not None and change.end is not None:
            start, end = sorted(before.point(place, encoding) for place in (change.start, change.end))
            self._feedback.edit(after.uri, start, end, change.text, time.monotonic())
        else:
            self._feedback.edit(after.uri, *difference(before, after), time.monotonic())
        self._see_to_it()

    def close(self, uri: str) -> None:
        """See `Feedback.close`."""
        self._feedback.close(uri)

    def end(self) -> None:
        """Write what is still to be written."""
        for timer in self._timers.values():
            timer.cancel()
        self._write(self._feedback.collect())

    def _see_to_it(self) -> None:
        """Look for accepted texts, and write counts, in time; there is no timer if there are none."""
        now_s = time.monotonic()
        due_s = self._feedback.check(self._documents, now_s)
        if due_s is not None:
            self._later("check", due_s - now_s, self._see_to_it)
        if self._feedback.has_counts:
            self._later("write", _WRITE_S, self._write_soon)

    def _later(self, what: str, in_s: float, call: Callable[[], None]) -> None:
        """Call something later, once, however often this is asked for."""

        def run() -> None:
            del self._timers[what]
            call()

        if what not in self._timers:
            self._timers[what] = asyncio.get_running_loop().call_later(in_s, run)

    def _write_soon(self) -> None:
        self._writing = asyncio.create_task(self.write())

    async def write(self) -> None:
        """Add the counts to the file. Those that cannot be written are kept, and tried again later."""
        table = self._feedback.collect()
        if not await asyncio.to_thread(self._write, table):
            # The disk may have room the next time.
            self._feedback.restore(table)
            self._later("write", _WRITE_S, self._write_soon)

    def _write(self, table: Table) -> bool:
        """Add counts to the file. Returns whether they are there; if not, that is logged, once."""
        try:
            if table:
                add(counts_path(), table, self.session)
        except MidfillError as error:
            if not self._failed:
                _LOG.warning("%s", error)
            self._failed = True
            return False
        self._failed = False
        return True


def difference(before: Document, after: Document) -> tuple[Point, Point, str]:
    """Two versions of a document as one edit: the places it replaces in the first, and by what."""
    first = next(
        (at for at, (a, b) in enumerate(zip(before.lines, after.lines, strict=False)) if a != b),
        min(len(before.lines), len(after.lines)) - 1,
    )
    last = 0
    while last < min(len(before.lines), len(after.lines)) - first - 1:
        if before.lines[-1 - last] != after.lines[-1 - last]:
            break
        last += 1
    old = "".join(before.lines[first : len(before.lines) - last])
    new = "".join(after.lines[first : len(after.lines) - last])
    head = _num_shared(old, new)
    tail = _num_shared(old[head:][::-1], new[head:][::-1])
    start = _after(Point(first, 0), old[:head])
    return start, _after(start, old[head : len(old) - tail]), new[head : len(new) - tail]


def _num_shared(one: str, other: str) -> int:
    """How many characters two texts have in common at the beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        # Comparing halves is much faster than comparing characters.
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _after(start: Point, text: str) -> Point:
    """The place behind `text` that begins at `start`."""
    *above, last = split_lines(text)
    return Point(start.line + len(above), len(last) + (0 if above else start.column))


def _moved(place: Point, start: Point, end: Point, text: str) -> Point:
    """Where a place is after an edit; inside the replaced text it goes to its start."""
    if place <= start:
        return place
    if place < end:
        return start
    new_end = _after(start, text)
    if place.line > end.line:
        return Point(place.line + new_end.line - end.line, place.column)
    return Point(new_end.line, new_end.column + place.column - end.column)


def _share_kept(text: str, document: Document, start: Point) -> float:
    """How much of a text, 0 to 1, can be found in order from `start` on, in half as much text again."""
    if start.line >= len(document.lines):
        return 0.0
    size = len(text) + len(text) // 2 + 8
    window = document.lines[start.line][start.column : start.column + size]
    for line in document.lines[start.line + 1 :]:
        if len(window) >= size:
            break
        window += line
    matcher = difflib.SequenceMatcher(None, text, _plain(window)[:size], autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()) / len(text)


def counts_path() -> Path:
    """Return the file of this user's counts. `MIDFILL_STATE` names another folder."""
    return state_folder() / "feedback.json"


def read(path: Path) -> Table:
    """The counts of a file; none where there is no file. Raises `MidfillError` if it cannot be read."""
    return _read(path)[0]


def read_sessions(path: Path) -> Sessions:
    """The counts by session, oldest first. Raises as `read` does."""
    return _read(path)[1]


def _read(path: Path) -> tuple[Table, Sessions]:
    try:
        values = read_json(path)
        counts, sessions = (
            {
                str(one): {str(key): Counts(**counts) for key, counts in group.items()}
                for one, group in part.items()
            }
            for part in (values["counts"], values.get("sessions", {}))
        )
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MidfillError(
            f"Cannot read the counts in {path} ({type(error).__name__}): delete the file."
        ) from error
    return counts, sessions


def add(path: Path, new: Table, session: str | None = None) -> None:
    """Add counts to a file that other servers write as well; it is replaced whole or not at all.

    Those of adapters are added to the session of that id too. Raises `MidfillError` if that cannot be done.
    """
    try:
        private_folder(path.parent, tighten="MIDFILL_STATE" not in os.environ)
        with FileLock(path.with_suffix(".lock"), timeout=_LOCK_S, mode=0o600):
            table, sessions = _read(path)
            for model, languages in new.items():
                for language, counts in languages.items():
                    table.setdefault(model, {}).setdefault(language, Counts()).add(counts)
                    if session is not None and adapter_of(model)[1] is not None:
                        sessions.setdefault(session, {}).setdefault(model, Counts()).add(counts)
            latest = dict(list(sessions.items())[-_MOST_SESSIONS:])
            content = {"counts": as_dict(table), "sessions": as_dict(latest)}
            text_files.replace(path, json.dumps(content, indent=1), private=True)
    except (OSError, Timeout) as error:
        raise MidfillError(f"Cannot write the counts to {path} ({type(error).__name__}).") from error


def as_dict(table: Table) -> dict[str, dict[str, dict[str, int]]]:
    """For JSON: counts by model and language."""
    return {
        model: {language: asdict(counts) for language, counts in languages.items()}
        for model, languages in table.items()
    }


def table(counts: Table) -> Any:
    """Counts for a person: a rich table, or a sentence if there are none."""
    from rich.table import Table as Grid  # noqa: PLC0415 - only a person needs it

    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for title in (
        "model",
        "language",
        "offered",
        "accepted",
        "partly",
        "characters",
        "there after 30 s",
        "5 min",
    ):
        grid.add_column(title, justify="left" if title in {"model", "language"} else "right")
    for model, languages in counts.items():
        for language, one in languages.items():
            grid.add_row(
                model,
                language,
                str(one.offered),
                f"{one.accepted} ({_share(one.accepted, one.offered)})",
                str(one.partly_accepted),
                str(one.accepted_chars),
                f"{one.kept_30s} of {one.checked_30s}",
                f"{one.kept_5min} of {one.checked_5min}",
            )
    return grid if counts else "No suggestion has been counted yet."


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"
