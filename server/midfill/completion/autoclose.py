r"""Auto-closed brackets: closers that the editor inserts after the cursor when the user types the opener.

The model does not see them (`AutoClosed.without`). Its text is then reconciled with them: closers at its end
are left out, and closers in the middle replace those in the document (`reconcile_auto_closed`).

Knows texts and positions, nothing of models or LSP. All texts have \n. Runs on the event loop.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from midfill.completion.closer_pairs import closer_pairs
from midfill.completion.origin import HashedText, Origin
from midfill.text.documents import Change, Snapshot

_MAX_DOCUMENTS = 64
# Nested brackets that an editor closes in one step.
_MAX_NESTED = 8

_AUTO_CLOSED = re.compile(r"""[)\]}>"'`]+\Z""")
_CLOSERS, _OPENERS, _QUOTES = frozenset(")]}"), frozenset("([{"), frozenset("\"'`")


def is_auto_closed(text: str) -> bool:
    """Return whether a text consists of closers that an editor may have inserted by itself."""
    return _AUTO_CLOSED.match(text) is not None


def reconcile_auto_closed(text: str, closed: str) -> tuple[str, int] | None:
    """Fit a text in before closers that the editor has inserted after the cursor.

    Returns the text to insert at the cursor, and how many of the closers, from the first on, it replaces:
    those that the text itself closes before it continues. Closers at the end of the text are left out
    instead. So each replaced closer can be found in the text, in order. None if `closed` contains anything
    else.
    """
    if text.endswith(closed):
        return text[: len(text) - len(closed)], 0
    if not is_auto_closed(closed):
        return None
    offsets = matched_closer_offsets(text, closed)
    while offsets and offsets[-1] == len(text) - 1:
        text = text[: offsets.pop()]
    return text, len(offsets)


def text_before_closers(text: str, replaced: str) -> str:
    """Return the part of a text that can be inserted before these closers without replacing any."""
    return text[: matched_closer_offsets(text, replaced)[0]].rstrip()


def matched_closer_offsets(text: str, closed: str) -> list[int]:
    """Return the offsets in `text` at which it closes what `closed` closes, in order.

    The list is shorter than `closed` if the text does not close the last ones.
    """
    return [closer for opener, closer in closer_pairs(text, closed) if opener < 0]


def needs_closers(typed: str, closed: str) -> bool:
    """Return whether the typed text still needs the closers that the editor inserted after it."""
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


def may_auto_close(change: Change) -> bool:
    """Return whether a change may contain closers that the editor inserted by itself."""
    inserts = change.start is not None and change.start == change.end
    return inserts and is_auto_closed(change.text.rstrip("\r\n")[-1:])


def auto_closing_changes(changes: Sequence[Change]) -> list[int]:
    """Return the indices of the changes of one edit that `AutoClosed.before_change` must be told, in order.

    A later change makes the earlier ones obsolete unless it is within the text that they inserted. So the
    last few are enough; looking at each of a thousand cursors would take seconds.
    """
    return [at for at, change in enumerate(changes) if may_auto_close(change)][-_MAX_NESTED:]


def agrees(inserted: str, expected: str) -> bool:
    """Return whether the inserted text may still become the expected one, whose end may be missing yet.

    Auto-closed brackets after the common beginning are ignored.
    """
    if expected.startswith(inserted) or inserted.startswith(expected):
        return True
    pairs = enumerate(zip(inserted, expected, strict=False))
    num_same = next(index for index, (one, other) in pairs if one != other)
    return _AUTO_CLOSED.match(inserted, num_same) is not None


@dataclass(slots=True)
class AutoClosed:
    """Recognises auto-closed brackets by comparing each document with an earlier state of it.

    That state is the text for which the model was asked last, or the text before a change that may
    auto-close. Bounded: the least recently used documents are dropped first.
    """

    _origins: OrderedDict[str, Origin] = field(default_factory=OrderedDict)

    def without(self, snapshot: Snapshot) -> tuple[Snapshot, str]:
        """Return the snapshot without the auto-closed brackets after the cursor, and those brackets."""
        origin = self._origins.get(snapshot.document.uri)
        if origin is None or not is_auto_closed(snapshot.line_after[:1]):
            return snapshot, ""
        typed, closed = origin.inserted(HashedText(snapshot.document), snapshot.cursor) or ("", "")
        # Some editors send a new line with its end.
        closed = closed.removesuffix("\n")
        if not is_auto_closed(closed) or not needs_closers(typed, closed):
            return snapshot, ""
        return snapshot.insert("", len(closed)), closed

    def before_change(self, snapshot: Snapshot) -> None:
        """Note the text before a change at the cursor that may auto-close what it opens."""
        self.remember(Origin.of(self.without(snapshot)[0]))

    def remember(self, origin: Origin) -> None:
        """Take this text, which has no auto-closed brackets, as the one to compare with."""
        self._origins[origin.uri] = origin
        self._origins.move_to_end(origin.uri)
        if len(self._origins) > _MAX_DOCUMENTS:
            self._origins.popitem(last=False)

    def forget(self, uri: str) -> None:
        """Drop what is known of a document."""
        self._origins.pop(uri, None)
