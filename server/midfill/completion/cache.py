r"""The cache of suggestions, and which part of them fits at the cursor's present position.

A suggestion belongs to a position in a text (`Origin`). It holds as long as the text is that of its origin
plus a beginning of the suggestion: then its remainder is shown, and no model is asked. It does not matter how
the beginning was inserted: by keys, by accepting a word or a line, or by undoing.

Knows nothing of engines or LSP. All texts have \n. Runs on the event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from midfill.completion.answer import Answer
from midfill.completion.autoclose import is_auto_closed, needs_closers, reconcile_auto_closed
from midfill.completion.context.bundle import ContextBundle
from midfill.completion.generation import Generation
from midfill.completion.origin import HashedText, Origin
from midfill.text.documents import Snapshot

_MAX_DOCUMENTS = 64
_MAX_PER_DOCUMENT = 32


@dataclass(frozen=True, slots=True)
class Computed:
    """The result of asking the model once.

    Attributes:
        answer: the answer at the origin, as the request's trigger got it.
        output: everything that the model wrote.
        context: the pieces of other files in the prompt.
    """

    answer: Answer
    output: Generation
    context: ContextBundle

    @property
    def lasting(self) -> bool:
        """Whether the same request would get the same result: it would not after a fault."""
        return self.output.failure is None


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A suggestion for a position, or the knowledge that there is none.

    Attributes:
        explicit: the user asked for it. If not, it does not answer a user who asks.
        is_prefetched: it was computed before anybody asked.
    """

    origin: Origin
    computed: Computed
    explicit: bool = False
    is_prefetched: bool = False

    @property
    def text(self) -> str:
        """The text to insert at the origin; "" for nothing."""
        return self.computed.answer.text


@dataclass(frozen=True, slots=True)
class Match:
    """A suggestion that holds at a cursor, and the text inserted at its origin since.

    Attributes:
        typed: the part of the inserted text before the cursor.
        closed: the part after the cursor.
    """

    suggestion: Suggestion
    typed: str = ""
    closed: str = ""

    @property
    def exact(self) -> bool:
        """Whether the text is that of the origin, auto-closed brackets aside."""
        return not self.typed and (not self.closed or is_auto_closed(self.closed))

    @property
    def remainder(self) -> tuple[str, int]:
        """The text to insert at the cursor to complete the suggestion, as `reconcile_auto_closed` returns it.

        The text is "" if nothing fits, or nothing is left.
        """
        text = self.suggestion.text
        if not text.startswith(self.typed) or not needs_closers(self.typed, self.closed):
            return "", 0
        remainder = reconcile_auto_closed(text[len(self.typed) :], self.closed)
        return remainder if remainder is not None and remainder[0].strip() else ("", 0)

    @property
    def continuation(self) -> str:
        """The model's text after everything typed, if all of the suggestion was typed; else ""."""
        raw = self.suggestion.computed.output.raw
        passed = self.typed.startswith(self.suggestion.text) and raw.startswith(self.typed)
        return raw[len(self.typed) :] if passed and not self.closed else ""


def fits_trigger(inserted: tuple[str, str], *, made_explicit: bool, explicit: bool) -> bool:
    """Return whether a suggestion made for one trigger may serve the other: only if it is typed through."""
    return explicit is made_explicit or bool(inserted[0])


@dataclass(slots=True)
class SuggestionCache:
    """Suggestions by document. Bounded: the least recently used are dropped first."""

    _kept: OrderedDict[str, OrderedDict[tuple[Origin, bool], Suggestion]] = field(default_factory=OrderedDict)

    def matches(self, snapshot: Snapshot, *, explicit: bool) -> Iterator[Match]:
        """Yield the suggestions that hold at a cursor, the most recently used first."""
        text = HashedText(snapshot.document)
        for suggestion in reversed(self._kept.get(snapshot.document.uri, {}).copy().values()):
            if explicit and not suggestion.explicit:
                continue
            inserted = suggestion.origin.inserted(text, snapshot.cursor)
            if inserted is not None and fits_trigger(
                inserted, made_explicit=suggestion.explicit, explicit=explicit
            ):
                yield Match(suggestion, *inserted)

    def keep(self, suggestion: Suggestion) -> None:
        """Store a suggestion, or mark a stored one as the most recently used."""
        uri = suggestion.origin.uri
        own = self._kept.setdefault(uri, OrderedDict())
        self._kept.move_to_end(uri)
        key = suggestion.origin, suggestion.explicit
        own[key] = suggestion
        own.move_to_end(key)
        if len(own) > _MAX_PER_DOCUMENT:
            own.popitem(last=False)
        if len(self._kept) > _MAX_DOCUMENTS:
            self._kept.popitem(last=False)

    def forget(self, uri: str) -> None:
        """Drop the suggestions of a document."""
        self._kept.pop(uri, None)

    def clear(self) -> None:
        """Drop all suggestions."""
        self._kept.clear()
