"""Prompts: from a snapshot to the tokens that the model reads. Windows, layouts, token healing, token budget.

A KV cache can be reused up to the first changed token, so the typed text must come last and the text before
it must stay as it is. Therefore the text around the cursor is frozen at an anchor: P0, whole lines above the
cursor, and S, the text that followed the cursor then. The text typed since is `typed`, the only part that
changes with a key; `fim.templates.Layout` gives the order of the three.

Runs on the event loop. Knows no editor, and of the model only its tokenizer.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from midfill.completion.context.bundle import EMPTY_BUNDLE, ContextBundle
from midfill.completion.context.rendering import ContextRenderer, RenderedContext, Segment
from midfill.engine.api import ModelInfo
from midfill.errors import ModelError
from midfill.fim.templates import Family, Layout, recognise_family
from midfill.settings import Settings
from midfill.text.documents import Snapshot, split_lines

_MAX_ANCHORS = 64
# No tokenizer of these families packs more characters of code into one token on average.
_MAX_CHARS_PER_TOKEN = 8
_UNFINISHED = re.compile(r"(?<=\S)[ \t]+\Z|[ \t]?(?:[^\w\s]|_)*[^\W\d_]*\Z")
# Longer text is not half of a token, and writing it again would cost many tokens.
_MAX_HELD = 64
_BLANKS = re.compile(r"[ \t]*")
_OPENERS = (":", "{", "(", "[")
# Number of lines above the cursor whose indentation is compared.
_LINES_ABOVE = 40
_SURROGATE = re.compile("[\ud800-\udfff]")
# Auto-closed brackets after the cursor, after Enter between brackets with the indentation before them.
_AUTO_CLOSED = re.compile(r"\s*[)\]}>\"'`]+[;,]?")
_MAX_AUTO_CLOSED = 64


@dataclass(frozen=True, slots=True)
class Prompt:
    """The model's input for one cursor.

    Attributes:
        tokens: ids, sentinels included.
        forced_prefix: the characters just before the cursor that were held back from the prompt, because half
            a token would mislead the model; the output has to begin with them (token healing).
        max_new_tokens: the requested number plus the tokens of `forced_prefix`, within the context window.
        stop_ids: ids that end the output.
        layout: the order of the parts.
        segments: (source, number of tokens) in prompt order, for explanations and measurements.
    """

    tokens: tuple[int, ...]
    forced_prefix: str
    max_new_tokens: int
    stop_ids: frozenset[int]
    layout: Layout
    segments: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class _Budget:
    """Maximum number of tokens in the parts of a prompt."""

    prefix: int
    suffix: int


@dataclass(frozen=True, slots=True)
class _Anchor:
    """The frozen text around the cursor (P0 and S), and where it was taken from.

    Attributes:
        first_line, line: P0 consists of the lines from `first_line` up to `line`, which is excluded.
        head, head_tokens: P0.
        tail, tail_tokens: S.
        cut_at: the column at which `typed` begins in a line that is too long for the budget, else 0.
    """

    first_line: int
    line: int
    head: str
    head_tokens: tuple[int, ...]
    tail: str
    tail_tokens: tuple[int, ...]
    cut_at: int


class PromptBuilder:
    """Builds prompts for one model; keeps each document's anchor.

    Args:
        model: the model that runs.
        settings: the ones in force.
        family: name and row of the FIM template if known; by default the model is recognised.

    Raises:
        ModelError: the model's family is not known or does not support the wanted layout, or the context
            window has no room for a prompt.
    """

    def __init__(
        self, model: ModelInfo, settings: Settings, family: tuple[str, Family] | None = None
    ) -> None:
        self.family_name, self.family = family or recognise_family(model, settings.family)
        self.layout = _layout(self.family_name, self.family, settings.layout)
        self._tokenizer = model.tokenizer
        self._context = model.context
        self._settings = settings
        self._ids = {
            name: token
            for name in (*self.family.sentinels, *self.family.stops)
            if (token := model.tokenizer.token_id(name)) is not None
        }
        self._stop_ids = frozenset(self._ids[name] for name in self.family.stops if name in self._ids)
        if self._room(settings.max_new_tokens) < 2:
            raise ModelError(
                f"The context window of {model.name!r} ({model.context} tokens) has no room for a prompt: "
                f"set `max_new_tokens` (now {settings.max_new_tokens}) to a lower number."
            )
        self._anchors: OrderedDict[str, _Anchor] = OrderedDict()
        self._renderer = ContextRenderer(self.family, model.tokenizer)

    def build(
        self,
        snapshot: Snapshot,
        context: ContextBundle = EMPTY_BUNDLE,
        *,
        max_new_tokens: int | None = None,
    ) -> Prompt:
        """Return the prompt of a snapshot: it and `max_new_tokens` fit into the model's context window.

        Args:
            snapshot: the document and the cursor.
            context: pieces of other files.
            max_new_tokens: the maximum for this request; by default the setting.
        """
        return self._build(snapshot, context, max_new_tokens or self._settings.max_new_tokens)

    def _build(
        self, snapshot: Snapshot, context: ContextBundle, max_new_tokens: int, spare: int = 0
    ) -> Prompt:
        """Build the prompt as `build` does, leaving `spare` tokens of the budget before the cursor unused."""
        room = max(self._room(max_new_tokens), 2)
        rendered = self._renderer.render(
            snapshot.document, context, min(self._settings.context_tokens, room // 2)
        )
        room -= rendered.num_tokens
        prefix = min(self._settings.prefix_tokens, room - room // 3)
        budget = _Budget(max(1, prefix - spare), min(self._settings.suffix_tokens, room - prefix))
        anchor, typed, held = self._anchor_for(snapshot, budget)
        self._remember(snapshot.document.uri, anchor)
        texts = {"head": anchor.head_tokens, "typed": typed, "tail": anchor.tail_tokens}
        parts = list(self.family.parts(self.layout))
        if self.family.needs_suffix and not anchor.tail_tokens:
            parts = [part for part in parts if part[1] in (self.family.bos, "head", "typed")]
        segments = [
            (_SOURCES.get(name, name), (self._ids[name],) if kind == "sentinel" else texts[name])
            for kind, name in parts
        ]
        segments = _with_context(segments, rendered, after_bos=bool(self.family.bos))
        tokens = tuple(token for _, ids in segments for token in ids)
        # The held-back characters are written again, in addition to the requested tokens.
        again = len(self._tokenizer.encode(held)) if held else 0
        return Prompt(
            tokens,
            held,
            max(1, min(max_new_tokens + again, self._context - len(tokens))),
            self._stop_ids,
            self.layout,
            tuple((name, len(ids)) for name, ids in segments if ids),
        )

    def build_moving_anchor(self, snapshot: Snapshot, context: ContextBundle = EMPTY_BUNDLE) -> Prompt:
        """Return the prompt for a cursor at which the user pauses.

        Moves an anchor that is nearly used up now, so that it need not move in the middle of a word while a
        request waits for the new prompt.
        """
        prompt = self.build(snapshot, context)
        before = sum(size for name, size in prompt.segments if name in {_SOURCES["head"], _SOURCES["typed"]})
        if before > self._settings.prefix_tokens * 7 // 8:
            self.forget(snapshot.document.uri)
            spare = self._settings.prefix_tokens // 4
            prompt = self._build(snapshot, context, self._settings.max_new_tokens, spare)
        return prompt

    def forget(self, uri: str) -> None:
        """Drop the anchor of a document that was closed."""
        self._anchors.pop(uri, None)

    def _room(self, max_new_tokens: int) -> int:
        """Return how many tokens of text fit beside the sentinels and the output."""
        return self._context - max_new_tokens - len(self.family.sentinels)

    def _remember(self, uri: str, anchor: _Anchor) -> None:
        self._anchors[uri] = anchor
        self._anchors.move_to_end(uri)
        if len(self._anchors) > _MAX_ANCHORS:
            self._anchors.popitem(last=False)

    def _anchor_for(self, snapshot: Snapshot, budget: _Budget) -> tuple[_Anchor, tuple[int, ...], str]:
        """Return the anchor to use, the tokens typed since, and the held-back characters."""
        old = self._anchors.get(snapshot.document.uri)
        if old is not None and self._still_holds(old, snapshot, budget):
            above = "".join(snapshot.document.lines[old.line : snapshot.cursor.line])
            typed = _clean(above + snapshot.line_before)[old.cut_at :]
            tokens, held = self._heal(typed, old.head, snapshot)
            if len(old.head_tokens) + len(tokens) <= budget.prefix:
                return old, tokens, held
        typed, cut_at = self._typed(snapshot, budget.prefix)
        tokens, held = self._heal(typed, "", snapshot)
        first_line, head = snapshot.cursor.line, ""
        if not cut_at:
            first_line, head = self._head(snapshot, budget.prefix - len(tokens), old)
            tokens, held = self._heal(typed, head, snapshot)
        tail, tail_tokens = self._tail(snapshot, budget.suffix)
        head_tokens = self._encode_head(head) if head else ()
        return (
            _Anchor(first_line, snapshot.cursor.line, head, head_tokens, tail, tail_tokens, cut_at),
            tokens,
            held,
        )

    def _typed(self, snapshot: Snapshot, budget: int) -> tuple[str, int]:
        """Return the line up to the cursor, and the column at which this text begins.

        The column is 0 except in a line beyond the budget: its last part is returned then, as much as fills
        half of the budget. Half, so that the window stays for a while.
        """
        before = _clean(snapshot.line_before)
        near = before[-budget * _MAX_CHARS_PER_TOKEN :]
        if len(near) == len(before) and len(self._encode_head(before)) <= budget:
            return before, 0
        size = self._longest(len(near), budget // 2, lambda size: near[len(near) - size :])
        return near[len(near) - size :], len(before) - size

    def _heal(self, typed: str, head: str, snapshot: Snapshot) -> tuple[tuple[int, ...], str]:
        """Return the tokens of the typed text without what may be half a token, and that part as text.

        Tokenizers join a space or punctuation to the word after it (" return", ".loads", "(self"): "json.lo"
        is `json`, `.lo`, never the beginning of `json`, `.loads`, so a prompt that ends like this has no
        likely continuation. Held back is the last word with the punctuation and the space before it. Digits
        are tokens by themselves.

        Likewise, one token holds an indentation but for its last space, so a prompt with half of it would
        have to continue at that width. Holding it back costs a token to write, so this is done only where it
        is needed.
        """
        held = ""
        if self._settings.healing:
            match = _UNFINISHED.search(typed)
            held = match.group() if match else ""
            if held.isspace() and _is_half_indented(snapshot):
                held = typed[len(typed.rstrip(" \t")) :]
            if len(held) > _MAX_HELD:
                held = ""
        kept = typed[: len(typed) - len(held)]
        if head or self.layout is Layout.ANCHORED:
            return tuple(self._tokenizer.encode(kept)), held
        return self._encode_head(kept), held

    def _encode_head(self, text: str) -> tuple[int, ...]:
        """Return the tokens of the prefix from its beginning on."""
        return tuple(self._tokenizer.encode(self.family.prefix_lead + text))

    def _still_holds(self, anchor: _Anchor, snapshot: Snapshot, budget: _Budget) -> bool:
        """Return whether the text around the cursor still begins and ends with the anchor's frozen text."""
        lines = snapshot.document.lines
        return (
            anchor.line <= snapshot.cursor.line
            and len(anchor.tail_tokens) <= budget.suffix
            and (anchor.line < snapshot.cursor.line or anchor.cut_at <= snapshot.cursor.column)
            and _clean("".join(lines[anchor.first_line : anchor.line])) == anchor.head
            and _continues(_text_after(snapshot, len(anchor.tail) + _MAX_AUTO_CLOSED), anchor.tail)
        )

    def _head(self, snapshot: Snapshot, budget: int, old: _Anchor | None) -> tuple[int, str]:
        """Return P0 and its first line: whole lines above the cursor's, from a line that stays for a while.

        A window that slid by one line with each new line would make all of its tokens new. So its first line
        stays as long as possible; when the window has to move, it begins at a multiple of `step` lines and
        leaves a quarter of the budget to the text typed later.
        """
        lines = snapshot.document.lines
        end = snapshot.cursor.line
        step = max(1, self._settings.prefix_tokens // 64)
        starts: list[int] = []
        chars = 0
        for line in range(end - 1, -1, -1):
            chars += len(lines[line])
            if chars > budget * _MAX_CHARS_PER_TOKEN:
                break
            if line % step == 0 or end - line < step:
                starts.append(line)

        def num_tokens(start: int) -> int:
            return len(self._encode_head(_clean("".join(lines[start:end]))))

        fitting = bisect_right(starts, budget, key=num_tokens)
        if fitting and starts[fitting - 1] == 0:
            start = 0
        elif old is not None and old.first_line in starts[fitting // 2 : fitting]:
            start = old.first_line
        else:
            fitting = bisect_right(starts, budget - budget // 4, key=num_tokens) or fitting
            start = starts[fitting - 1] if fitting else end
        return start, _clean("".join(lines[start:end]))

    def _tail(self, snapshot: Snapshot, budget: int) -> tuple[str, tuple[int, ...]]:
        """Return S: the text after the cursor, cut to the budget, at the end of a line where possible."""
        text = _text_after(snapshot, budget * _MAX_CHARS_PER_TOKEN)
        tokens = tuple(self._tokenizer.encode(text))
        if len(tokens) <= budget:
            return text, tokens
        rows = split_lines(text)
        text = "".join(rows[: self._longest(len(rows), budget, lambda count: "".join(rows[:count]))])
        if not text:
            text = rows[0][: self._longest(len(rows[0]), budget, lambda size: rows[0][:size])]
        return text, tuple(self._tokenizer.encode(text))

    def _longest(self, most: int, budget: int, piece: Callable[[int], str]) -> int:
        """Return the largest size up to `most` whose text has at most `budget` tokens; 0 always fits."""
        sizes = range(1, most + 1)
        return bisect_right(sizes, budget, key=lambda size: len(self._tokenizer.encode(piece(size))))


# The names of the prompt's parts that users see.
_SOURCES = {"head": "prefix", "typed": "typed", "tail": "suffix"}


def _layout(name: str, family: Family, wanted: str) -> Layout:
    """Return the layout from the settings, or the family's first. Raises `ModelError` if unsupported."""
    if wanted == "auto":
        return family.layouts[0]
    if wanted not in family.layouts:
        raise ModelError(
            f"The FIM family {name!r} does not support the prompt layout {wanted!r}. "
            f"Set `layout` to auto or one of: {', '.join(family.layouts)}."
        )
    return Layout(wanted)


def _is_half_indented(snapshot: Snapshot) -> bool:
    """Return whether only indentation precedes the cursor, and probably less than the line will have."""
    own = snapshot.line_before
    if not own or not own.isspace():
        return False
    line = snapshot.cursor.line
    above = [text for text in snapshot.document.lines[max(0, line - _LINES_ABOVE) : line] if text.strip()]
    leads = [match.group() for text in above if (match := _BLANKS.match(text))]
    if not above:
        return False
    if above[-1].rstrip().endswith(_OPENERS):
        return len(own.expandtabs()) <= len(leads[-1].expandtabs())
    return own not in leads


def _continues(after: str, tail: str) -> bool:
    """Return whether the text after the cursor is still the frozen one, auto-closed brackets aside.

    In most editors each typed bracket or quote changes the text after the cursor. The closer may be missing
    from the prompt until the anchor moves: without it the model closes what was opened, and `clean` knows the
    closer that the file has.
    """
    at = after.find(tail) if tail else len(after)
    return at == 0 or (0 < at <= _MAX_AUTO_CLOSED and _AUTO_CLOSED.fullmatch(after, 0, at) is not None)


def _with_context(segments: list[Segment], context: RenderedContext, *, after_bos: bool) -> list[Segment]:
    """Return the segments with other files after BOS, and comments at the beginning of the file's text."""
    start = int(after_bos)
    head = next(index for index, (name, _) in enumerate(segments) if name in {"prefix", "typed"})
    return [
        *segments[:start],
        *context.at_start,
        *segments[start:head],
        *context.in_prefix,
        *segments[head:],
    ]


def _text_after(snapshot: Snapshot, max_chars: int) -> str:
    """Return at most `max_chars` characters from the cursor on, as the model reads them."""
    lines = snapshot.document.lines
    first = lines[snapshot.cursor.line]
    parts = [first[snapshot.cursor.column : snapshot.cursor.column + max_chars + 1]]
    size = len(parts[0])
    for line in range(snapshot.cursor.line + 1, len(lines)):
        if size > max_chars:
            break
        parts.append(lines[line])
        size += len(lines[line])
    return _clean("".join(parts))[:max_chars]


def _clean(text: str) -> str:
    r"""Return the text as the model knows it: \n for line ends, and no surrogate halves."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)
