"""Acceptance: which suggestions were accepted, and which of those stayed; counted on this machine.

Editors report an acceptance by the item's command. For those that do not, and for words and lines accepted
from a suggestion, the edits that follow it are compared with it. An accepted text is looked for again after
30 seconds and after 5 minutes. Counts are kept by model and language in one small file of the user's state
folder; texts live in memory only, for those 5 minutes, and are never written anywhere.

`AcceptanceStats` is pure; `AcceptanceTracker` gives it a clock and a file, on the event loop; `add` and
`read` touch the disk.
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
# An accepted text is still there if this share of it is found at its position, in order.
_KEPT_SHARE = 2 / 3
# A key inserts one character; a longer insertion that agrees with the suggestion accepts a part of it.
_MIN_PART = 2
_MAX_SHOWN = 16
_MAX_WATCHED = 256
_LOCK_S = 2.0
_WRITE_S = 30.0

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class AcceptanceCounts:
    """Counts of the suggestions of one model in one language.

    Attributes:
        offered: suggestions sent to the editor; one that is typed through counts once.
        accepted: accepted as a whole.
        partly_accepted: a word or a line of it was accepted.
        accepted_chars: characters accepted, of both.
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

    def add(self, other: AcceptanceCounts) -> None:
        """Add another's counts to these."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


Table = dict[str, dict[str, AcceptanceCounts]]
"""Counts by model and language; a model with an adapter has its own name, see `key_of`."""

_WITH = " + "
_WITHOUT = " (held out)"
_HELD_OUT = 0.1


def key_of(model: str, adapter: str | None, *, held_out: bool = False) -> str:
    """Return the model's name in the table; `held_out` if the adapter was withheld for comparison."""
    return model if adapter is None else f"{model}{_WITH}{adapter}{_WITHOUT if held_out else ''}"


def adapter_of(key: str) -> tuple[str, str | None]:
    """Return the model and the adapter for a name in the table."""
    model, _, adapter = key.partition(_WITH)
    return model, adapter or None


def is_held_out(session: str) -> bool:
    """Return whether a session is in the tenth without adapters. Depends on its id alone."""
    return int.from_bytes(hashlib.sha256(session.encode()).digest()[:8]) < _HELD_OUT * 2**64


def with_and_without(key: str) -> tuple[str, bool]:
    """Return the key with the adapter, and whether that was withheld."""
    return key.removesuffix(_WITHOUT), key.endswith(_WITHOUT)


Sessions = dict[str, dict[str, AcceptanceCounts]]
"""Counts by session and key, of all languages together: for comparing two groups of sessions."""

_MOST_SESSIONS = 2000


@dataclass(slots=True, eq=False)
class _ShownSuggestion:
    """A suggestion that the editor shows, or the remainder of one.

    Attributes:
        key: model and language.
        start: where `text` would be inserted.
        num_replaced: characters after `start` that the text would replace.
        accepted, partly: it was counted as such.
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
        """The end of the range that it would replace."""
        return Point(self.start.line, self.start.column + self.num_replaced)


@dataclass(slots=True, eq=False)
class _Watched:
    """An accepted text, until the last check of whether it is still there.

    Attributes:
        done: number of `CHECKS` made.
    """

    uri: str
    key: tuple[str, str]
    start: Point
    text: str
    since_s: float
    done: int = 0

    @property
    def due_s(self) -> float:
        """The time of the next check, in seconds."""
        return self.since_s + CHECKS[self.done][1]


class AcceptanceStats:
    """Follows shown suggestions through the edits of their documents. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._table: Table = {}
        self._suggestions: OrderedDict[int, _ShownSuggestion] = OrderedDict()
        self._current: dict[str, int] = {}
        self._watched: list[_Watched] = []
        self._next_id = 1

    def shown(self, document: Document, start: Point, text: str, model: str, num_replaced: int = 0) -> int:
        """Note that a suggestion is shown. Returns the id for its item's command.

        The remainder of a suggestion that the user types through is not a new one.
        """
        text = _plain(text)
        id_ = self._current.get(document.uri, 0)
        current = self._suggestions.get(id_)
        if current is not None and (current.start, current.text) == (start, text):
            return id_
        suggestion = _ShownSuggestion(document.uri, (model, document.language_id), start, text, num_replaced)
        self._counts(suggestion.key).offered += 1
        id_, self._next_id = self._next_id, self._next_id + 1
        self._suggestions[id_] = suggestion
        self._current[document.uri] = id_
        if len(self._suggestions) > _MAX_SHOWN:
            self._suggestions.popitem(last=False)
        return id_

    def accept(self, id_: int, now_s: float) -> None:
        """Note the editor's report of an acceptance. Unknown ids and repeated reports do not count."""
        if (suggestion := self._suggestions.get(id_)) is not None:
            self._accept(suggestion, suggestion.start, now_s)

    def edit(self, uri: str, start: Point, end: Point, text: str, now_s: float) -> None:
        """Take an edit of a document; the positions are those before it."""
        text = _plain(text)
        current = self._suggestions.get(self._current.get(uri, 0))
        touched = current is not None and end in {current.start, current.end}
        tracked: list[_ShownSuggestion | _Watched] = [*self._suggestions.values(), *self._watched]
        for one in tracked:
            if one.uri == uri and not (touched and one is current):
                one.start = _moved(one.start, start, end, text)
        if current is not None and touched:
            self._take(current, start, end, text, now_s)

    def follows(self, uri: str) -> bool:
        """Return whether edits of a document matter."""
        return uri in self._current or any(watched.uri == uri for watched in self._watched)

    def check(self, documents: Mapping[str, Document], now_s: float) -> float | None:
        """Look for accepted texts that are due. Returns the time of the next check, or None."""
        for watched in self._watched:
            while watched.done < len(CHECKS) and watched.due_s <= now_s:
                name, _ = CHECKS[watched.done]
                watched.done += 1
                if (document := documents.get(watched.uri)) is not None:
                    self._look(watched, document, name)
        self._watched = [watched for watched in self._watched if watched.done < len(CHECKS)]
        return min((watched.due_s for watched in self._watched), default=None)

    def close(self, uri: str) -> None:
        """Stop following a document that was closed."""
        self._current.pop(uri, None)
        self._watched = [watched for watched in self._watched if watched.uri != uri]

    @property
    def has_counts(self) -> bool:
        """Whether `collect` would return any counts."""
        return bool(self._table)

    def collect(self) -> Table:
        """Return the counts since the last call."""
        table, self._table = self._table, {}
        return table

    def restore(self, table: Table) -> None:
        """Put back counts from `collect` that could not be written."""
        for model, languages in table.items():
            for language, counts in languages.items():
                self._counts((model, language)).add(counts)

    def _counts(self, key: tuple[str, str]) -> AcceptanceCounts:
        model, language = key
        return self._table.setdefault(model, {}).setdefault(language, AcceptanceCounts())

    def _take(self, suggestion: _ShownSuggestion, start: Point, end: Point, text: str, now_s: float) -> None:
        """Judge an edit that ends at a suggestion's position: it accepts all or a part, or is other text."""
        if len(text) >= _MIN_PART and text.endswith(suggestion.text):
            # Editors may replace the word before the cursor together with it.
            self._accept(suggestion, _after(start, text[: len(text) - len(suggestion.text)]), now_s)
        elif text and start == end and suggestion.text.startswith(text):
            suggestion.start, suggestion.text = _after(start, text), suggestion.text[len(text) :]
            if len(text) >= _MIN_PART:
                counts = self._counts(suggestion.key)
                counts.partly_accepted += not suggestion.partly
                counts.accepted_chars += len(text)
                suggestion.partly = True
        else:
            suggestion.start = _after(start, text)
            del self._current[suggestion.uri]

    def _accept(self, suggestion: _ShownSuggestion, start: Point, now_s: float) -> None:
        if (
            self._current.get(suggestion.uri) is not None
            and self._suggestions.get(self._current[suggestion.uri]) is suggestion
        ):
            del self._current[suggestion.uri]
        if suggestion.accepted or not suggestion.text:
            return
        suggestion.accepted = True
        counts = self._counts(suggestion.key)
        counts.accepted += 1
        counts.accepted_chars += len(suggestion.text)
        self._watched.append(_Watched(suggestion.uri, suggestion.key, start, suggestion.text, now_s))
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
    """`AcceptanceStats` with a clock and a file. Runs on the event loop; writes in a thread.

    Args:
        documents: the open documents; kept up to date by the caller.

    Attributes:
        counts: whether anything is counted.
        session: the id under which adapters are counted by session too; None if they are not.
    """

    def __init__(self, documents: Mapping[str, Document]) -> None:
        self.counts = False
        self.session: str | None = None
        self._documents = documents
        self._stats = AcceptanceStats()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._writing: asyncio.Task[None] | None = None
        self._failed = False

    def shown(
        self, document: Document, start: Point, text: str, model: str, num_replaced: int = 0
    ) -> int | None:
        """Note a shown suggestion as `AcceptanceStats.shown` does. Returns None if nothing is counted."""
        if not self.counts:
            return None
        id_ = self._stats.shown(document, start, text, model, num_replaced)
        self._see_to_it()
        return id_

    def accept(self, id_: int) -> None:
        """Note the editor's report of an acceptance."""
        self._stats.accept(id_, time.monotonic())
        self._see_to_it()

    def edit(self, before: Document, after: Document, changes: Sequence[Change], encoding: Encoding) -> None:
        """Take an edit of a document."""
        if not self._stats.follows(after.uri):
            return
        change = changes[0] if len(changes) == 1 else None
        if change is not None and change.start is not None and change.end is not None:
            start, end = sorted(before.point(position, encoding) for position in (change.start, change.end))
            self._stats.edit(after.uri, start, end, change.text, time.monotonic())
        else:
            self._stats.edit(after.uri, *difference(before, after), time.monotonic())
        self._see_to_it()

    def close(self, uri: str) -> None:
        """Stop following a document that was closed."""
        self._stats.close(uri)

    def end(self) -> None:
        """Write the counts that are not written yet."""
        for timer in self._timers.values():
            timer.cancel()
        self._write(self._stats.collect())

    def _see_to_it(self) -> None:
        """Schedule the next check and the next write; no timer runs if there is nothing to do."""
        now_s = time.monotonic()
        due_s = self._stats.check(self._documents, now_s)
        if due_s is not None:
            self._later("check", due_s - now_s, self._see_to_it)
        if self._stats.has_counts:
            self._later("write", _WRITE_S, self._write_soon)

    def _later(self, what: str, in_s: float, call: Callable[[], None]) -> None:
        """Call something later, once, however often it is scheduled."""

        def run() -> None:
            del self._timers[what]
            call()

        if what not in self._timers:
            self._timers[what] = asyncio.get_running_loop().call_later(in_s, run)

    def _write_soon(self) -> None:
        self._writing = asyncio.create_task(self.write())

    async def write(self) -> None:
        """Add the counts to the file. If that fails, keep them and try again later."""
        table = self._stats.collect()
        if not await asyncio.to_thread(self._write, table):
            # The disk may have room next time.
            self._stats.restore(table)
            self._later("write", _WRITE_S, self._write_soon)

    def _write(self, table: Table) -> bool:
        """Add counts to the file. Returns whether that succeeded; the first failure in a row is logged."""
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
    """Return two versions of a document as one edit: the range in the first one, and its new text."""
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
    """Return how many characters two texts share at the beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        # Comparing halves is much faster than comparing characters.
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _after(start: Point, text: str) -> Point:
    """Return the position after `text` that begins at `start`."""
    *above, last = split_lines(text)
    return Point(start.line + len(above), len(last) + (0 if above else start.column))


def _moved(position: Point, start: Point, end: Point, text: str) -> Point:
    """Return a position as it is after an edit; inside the replaced text it moves to its start."""
    if position <= start:
        return position
    if position < end:
        return start
    new_end = _after(start, text)
    if position.line > end.line:
        return Point(position.line + new_end.line - end.line, position.column)
    return Point(new_end.line, new_end.column + position.column - end.column)


def _share_kept(text: str, document: Document, start: Point) -> float:
    """Return the share of a text, 0 to 1, found in order from `start` on, within half as much text again."""
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
    """Return the counts of a file; none if there is no file. Raises `MidfillError` if it cannot be read."""
    return _read(path)[0]


def read_sessions(path: Path) -> Sessions:
    """Return the counts by session, oldest first. Raises as `read` does."""
    return _read(path)[1]


def _read(path: Path) -> tuple[Table, Sessions]:
    try:
        values = read_json(path)
        counts, sessions = (
            {
                str(one): {str(key): AcceptanceCounts(**counts) for key, counts in group.items()}
                for one, group in part.items()
            }
            for part in (values["counts"], values.get("sessions", {}))
        )
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MidfillError(
            f"Cannot read the acceptance counts in {path} ({type(error).__name__}): "
            "delete the file to start again."
        ) from error
    return counts, sessions


def add(path: Path, new: Table, session: str | None = None) -> None:
    """Add counts to a file that other servers write too; it is replaced as a whole or not at all.

    Counts of adapters are added to the session of that id too. Raises `MidfillError` if the file cannot be
    written.
    """
    try:
        private_folder(path.parent, tighten="MIDFILL_STATE" not in os.environ)
        with FileLock(path.with_suffix(".lock"), timeout=_LOCK_S, mode=0o600):
            table, sessions = _read(path)
            for model, languages in new.items():
                for language, counts in languages.items():
                    table.setdefault(model, {}).setdefault(language, AcceptanceCounts()).add(counts)
                    if session is not None and adapter_of(model)[1] is not None:
                        sessions.setdefault(session, {}).setdefault(model, AcceptanceCounts()).add(counts)
            latest = dict(list(sessions.items())[-_MOST_SESSIONS:])
            content = {"counts": as_dict(table), "sessions": as_dict(latest)}
            text_files.replace(path, json.dumps(content, indent=1), private=True)
    except (OSError, Timeout) as error:
        raise MidfillError(
            f"Cannot write the acceptance counts to {path} ({type(error).__name__})."
        ) from error


def as_dict(table: Table) -> dict[str, dict[str, dict[str, int]]]:
    """Return a table for JSON: counts by model and language."""
    return {
        model: {language: asdict(counts) for language, counts in languages.items()}
        for model, languages in table.items()
    }


def table(counts: Table) -> Any:
    """Return counts as a rich table for the user, or a sentence if there are none."""
    from rich.table import Table as Grid

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
