"""Renders context as tokens: in the form that a FIM family was trained with, else as comments.

Knows families and tokenizers; `prompt` puts the result into the prompt. Runs on the event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from midfill.completion.context.bundle import ContextBundle, Snippet
from midfill.engine.api import Tokenizer
from midfill.fim.templates import Family
from midfill.text.documents import Document

Segment = tuple[str, tuple[int, ...]]

_MAX_REMEMBERED = 64
# The marker of a comment up to the end of the line; "#" in all other languages.
_COMMENTS = {
    **dict.fromkeys(
        [
            *("c", "cpp", "csharp", "dart", "go", "java", "javascript", "javascriptreact", "kotlin"),
            *("php", "rust", "scala", "swift", "typescript", "typescriptreact", "zig"),
        ],
        "//",
    ),
    **dict.fromkeys(("lua", "sql", "haskell"), "--"),
}


@dataclass(frozen=True, slots=True)
class RenderedContext:
    """Context as segments of a prompt.

    Attributes:
        at_start: segments for the prompt's beginning, after BOS.
        in_prefix: comments for the beginning of the prefix.
    """

    at_start: tuple[Segment, ...] = ()
    in_prefix: tuple[Segment, ...] = ()

    @property
    def num_tokens(self) -> int:
        """The number of tokens in all segments."""
        return sum(len(ids) for _, ids in self.at_start + self.in_prefix)


@dataclass(slots=True)
class ContextRenderer:
    """Renders context for one model; encodes the same context of a document only once."""

    family: Family
    tokenizer: Tokenizer
    _rendered: OrderedDict[str, tuple[object, int, RenderedContext]] = field(default_factory=OrderedDict)

    def render(self, document: Document, context: ContextBundle, budget: int) -> RenderedContext:
        """Return what fits of a document's context into `budget` tokens: the last pieces first, in order."""
        if not context.snippets:
            return RenderedContext()
        uri = document.uri
        known = self._rendered.get(uri)
        if known is not None and known[0] is context and known[1] == budget:
            return known[2]
        if self._has_marks():
            rendered = self._as_files(context, budget)
        else:
            rendered = self._as_comments(document.language_id, context.snippets, budget)
        self._rendered[uri] = context, budget, rendered
        self._rendered.move_to_end(uri)
        if len(self._rendered) > _MAX_REMEMBERED:
            self._rendered.popitem(last=False)
        return rendered

    def _has_marks(self) -> bool:
        marks = self.family.file_marks
        return self.family.cross_file is not None and all(
            self.tokenizer.token_id(mark) is not None for mark in marks
        )

    def _as_files(self, context: ContextBundle, budget: int) -> RenderedContext:
        form = self.family.cross_file
        if form is None:
            return RenderedContext()
        parts: list[Segment] = []
        if form.repository:
            name = self._encode(context.repository + form.after_repository)
            parts.append(("repository", (*self._mark(form.repository), *name)))
        own: list[Segment] = []
        if form.own_path:
            own.append(("path", (*self._mark(form.file), *self._encode(context.path + form.after_path))))
        budget -= sum(len(ids) for _, ids in parts + own)
        pieces = [
            (
                f"context: {snippet.source}",
                (*self._mark(form.file), *self._encode(f"{snippet.path}{form.after_path}{snippet.text}\n")),
            )
            for snippet in context.snippets
        ]
        fitting = _fitting(pieces, budget)
        return RenderedContext((*parts, *fitting, *own)) if fitting else RenderedContext()

    def _as_comments(self, language_id: str, snippets: Sequence[Snippet], budget: int) -> RenderedContext:
        mark = _COMMENTS.get(language_id, "#")
        pieces = [
            (
                f"context: {snippet.source}",
                self._encode(
                    "".join(f"{mark} {line}\n" for line in (f"{snippet.path}:", *snippet.text.split("\n")))
                ),
            )
            for snippet in snippets
        ]
        return RenderedContext(in_prefix=_fitting(pieces, budget))

    def _mark(self, name: str) -> tuple[int, ...]:
        token = self.tokenizer.token_id(name)
        return self._encode(name) if token is None or name not in self.family.file_marks else (token,)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text))


def _fitting(pieces: Sequence[Segment], budget: int) -> tuple[Segment, ...]:
    """Return as many pieces as fit, chosen from the last, which are the best; in their order."""
    chosen: list[Segment] = []
    for piece in reversed(pieces):
        if len(piece[1]) <= budget:
            budget -= len(piece[1])
            chosen.append(piece)
    return tuple(reversed(chosen))
