r"""From a snapshot to the tokens that the model reads: windows, layouts, token healing, the token budget.

A KV cache can be reused up to the first token that changed, so what the user types must come last, and
what comes before it must stay as it is. The text around the cursor is frozen at an anchor: P0, whole
lines above the cursor, and S, what followed the cursor then. What was typed since is `typed`, the only
part that changes with a key; `families.Layout` says in which order the three stand.

Runs on the event loop. Knows no editor and no model but for its tokenizer.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from midfill.completion.context.collector import NOTHING, ContextBundle
from midfill.completion.context.rendering import ContextRenderer, Segment, Written
from midfill.engine.api import ModelInfo
from midfill.errors import ModelError
from midfill.fim.templates import Family, Layout, recognise_family
from midfill.settings import Settings
from midfill.text.documents import Snapshot, split_lines

_MAX_ANCHORS = 64
# No tokenizer of these families makes more characters of code into one token on average.
_MAX_CHARS_PER_TOKEN = 8
_UNFINISHED = re.compile(r"(?<=\S)[ \t]+\Z|[ \t]?(?:[^\w\s]|_)*[^\W\d_]*\Z")
# What is longer is no half of a token, and would cost many to write once more.
_MAX_HELD = 64
_BLANKS = re.compile(r"[ \t]*")
_OPENERS = (":", "{", "(", "[")
# How far up indentation is looked at.
_LINES_ABOVE = 40
_SURROGATE = re.compile("[\ud800-\udfff]")
# What editors insert behind the cursor by themselves, after Enter between brackets with the indentation.
_AUTO_CLOSED = re.compile(r"\s*[)\]}>\"'`]+[;,]?")
_MAX_AUTO_CLOSED = 64


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads for one cursor.

    Attributes:
        tokens: the ids, sentinels included.
        forced_prefix: characters just before the cursor that were held back from the prompt because
            half a token would mislead the model; its output has to begin with them (token healing).
        max_new_tokens: what was asked for and what `forced_prefix` takes, or what the model's context leaves.
        stop_ids: ids that end the output.
        layout: the order of the parts.
        segments: (source, number of tokens) in prompt order, for explaining and measuring.
    """

    tokens: tuple[int, ...]
    forced_prefix: str
    max_new_tokens: int
    stop_ids: frozenset[int]
    layout: Layout
    segments: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class _Budget:
    """Most tokens of the parts of a prompt."""

    prefix: int
    suffix: int


@dataclass(frozen=True, slots=True)
class _Anchor:
    """P0 and S, frozen, and where they were taken from.

    Attributes:
        first_line, line: P0 is the lines from the one up to the other, without it.
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
    """Builds prompts for one model; remembers each document's anchor.

    Args:
        model: the model that runs.
        settings: the ones in force.
        family: name and row, if they are known already; else the model is recognised.

    Raises:
        ModelError: the model's family is not known, cannot have the wanted layout, or the model's context
            has no room for a prompt.
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
                f"The context of {model.name!r} ({model.context} tokens) leaves no room for a prompt: "
                f"lower `max_new_tokens` ({settings.max_new_tokens})."
            )
        self._anchors: OrderedDict[str, _Anchor] = OrderedDict()
        self._writer = ContextRenderer(self.family, model.tokenizer)

    def build(
        self,
        snapshot: Snapshot,
        context: ContextBundle = NOTHING,
        *,
        max_new_tokens: int | None = None,
    ) -> Prompt:
        """Make the prompt of a snapshot, so that it and `max_new_tokens` fit into the model's context.

        Args:
            snapshot: the document and the cursor.
            context: what other files contribute.
            max_new_tokens: the most that this request may write; by default the setting.
        """
        return self._build(snapshot, context, max_new_tokens or self._settings.max_new_tokens)

    def _build(self, snapshot: Snapshot, context: ContextBundle, max_new_tokens: int, spare: int = 0) -> Prompt:
        """See `build`; leaves `spare` tokens of the budget before the cursor unused."""
        room = max(self._room(max_new_tokens), 2)
        written = self._writer.write(
            snapshot.document, context, min(self._settings.context_tokens, room // 2)
        )
        room -= written.num_tokens
        prefix = min(self._settings.prefix_tokens, room - room // 3)
        budget = _Budget(max(1, prefix - spare), min(self._settings.suffix_tokens, room - prefix))
        anchor, typed, held = self._place(snapshot, budget)
        self._remember(snapshot.document.uri, anchor)
        texts = {"head": anchor.head_tokens, "typed": typed, "tail": anchor.tail_tokens}
        parts = list(self.family.parts(self.layout))
        if self.family.needs_suffix and not anchor.tail_tokens:
            parts = [part for part in parts if part[1] in (self.family.bos, "head", "typed")]
        segments = [
            (_SOURCES.get(name, name), (self._ids[name],) if kind == "sentinel" else texts[name])
            for kind, name in parts
        ]
        segments = _with_context(segments, written, after_bos=bool(self.family.bos))
        tokens = tuple(token for _, ids in segments for token in ids)
        # What was held back is written once more, on top of what was asked for.
        again = len(self._tokenizer.encode(held)) if held else 0
        return Prompt(
            tokens,
            held,
            max(1, min(max_new_tokens + again, self._context - len(tokens))),
            self._stop_ids,
            self.layout,
            tuple((name, len(ids)) for name, ids in segments if ids),
        )

    def settle(self, snapshot: Snapshot, context: ContextBundle = NOTHING) -> Prompt:
        """The prompt for a place where the user rests.

        An anchor that is nearly used up is given up here, so that it need not be in the middle of a word,
        where somebody waits for the new one to be computed.
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
        """Tokens of text that fit beside the sentinels and the output."""
        return self._context - max_new_tokens - len(self.family.sentinels)

    def _remember(self, uri: str, anchor: _Anchor) -> None:
        self._anchors[uri] = anchor
        self._anchors.move_to_end(uri)
        if len(self._anchors) > _MAX_ANCHORS:
            self._anchors.popitem(last=False)

    def _place(self, snapshot: Snapshot, budget: _Budget) -> tuple[_Anchor, tuple[int, ...], str]:
        """The anchor to use, the tokens typed since, and the characters held back."""
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
        """The line up to the cursor, and the column where it begins.

        That is 0 but for a line beyond the budget: of that, what fills half of it is taken. Half, so that the
        window stays where it is for a while.
        """
        before = _clean(snapshot.line_before)
        near = before[-budget * _MAX_CHARS_PER_TOKEN :]
        if len(near) == len(before) and len(self._encode_head(before)) <= budget:
            return before, 0
        size = self._longest(len(near), budget // 2, lambda size: near[len(near) - size :])
        return near[len(near) - size :], len(before) - size

    def _heal(self, typed: str, head: str, snapshot: Snapshot) -> tuple[tuple[int, ...], str]:
        """Tokens of what was typed, without what may be half a token; and that, as text.

        Tokenizers join a blank or marks to the word behind them (" return", ".loads", "(self"):
        "json.lo" is `json`, `.lo`, never the beginning of `json`, `.loads`, so a prompt that ends so has
        no likely continuation. Held back is the last word with the marks and the blank before it.
        Digits are tokens of their own.

        Likewise an indentation is all but its last blank in one token, so a prompt with half of it would
        have to go on at that width. Held back whole it costs a token to write, so only where it is needed.
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
        """Tokens of the prefix from its beginning on."""
        return tuple(self._tokenizer.encode(self.family.prefix_lead + text))

    def _still_holds(self, anchor: _Anchor, snapshot: Snapshot, budget: _Budget) -> bool:
        """Whether the text around the cursor still begins and ends with what the anchor froze."""
        lines = snapshot.document.lines
        return (
            anchor.line <= snapshot.cursor.line
            and len(anchor.tail_tokens) <= budget.suffix
            and (anchor.line < snapshot.cursor.line or anchor.cut_at <= snapshot.cursor.column)
            and _clean("".join(lines[anchor.first_line : anchor.line])) == anchor.head
            and _continues(_text_after(snapshot, len(anchor.tail) + _MAX_AUTO_CLOSED), anchor.tail)
        )

    def _head(self, snapshot: Snapshot, budget: int, old: _Anchor | None) -> tuple[int, str]:
        """P0 and its first line: whole lines above the cursor's, from a line that stays the same for a while.

        A window that slid by a line each time the user goes to the next one would make every token of it
        new. So it keeps its first line while it can; when it has to move, it starts at a multiple of `step`
        lines and leaves a quarter of the budget to what will be typed.
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
        """S: the text after the cursor, cut to the budget, at a line's end where possible."""
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
        """The largest size up to `most` whose piece of text has at most `budget` tokens; 0 always fits."""
        sizes = range(1, most + 1)
        return bisect_right(sizes, budget, key=lambda size: len(self._tokenizer.encode(piece(size))))


# What users call the parts of a prompt.
_SOURCES = {"head": "prefix", "typed": "typed", "tail": "suffix"}


def _layout(name: str, family: Family, wanted: str) -> Layout:
    """The layout that settings name, or the family's first. Raises `ModelError` if it cannot have it."""
    if wanted == "auto":
        return family.layouts[0]
    if wanted not in family.layouts:
        raise ModelError(
            f"Models of the family {name!r} do not understand the layout {wanted!r}; "
            f"they can have {', '.join(family.layouts)}. Change `layout`."
        )
    return Layout(wanted)


def _is_half_indented(snapshot: Snapshot) -> bool:
    """Whether all before the cursor is indentation, and not as wide as it will probably be."""
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
    """Whether the text after the cursor is the frozen one still, save for what the editor closed by itself.

    Each bracket and quote that is typed changes the text after the cursor in most editors. Left out
    of the prompt until the anchor moves, the closer costs nothing: without it the model closes what was
    opened, and `trim` knows what stands there.
    """
    at = after.find(tail) if tail else len(after)
    return at == 0 or (0 < at <= _MAX_AUTO_CLOSED and _AUTO_CLOSED.fullmatch(after, 0, at) is not None)


def _with_context(segments: list[Segment], context: Written, *, after_bos: bool) -> list[Segment]:
    """Other files behind BOS; comments where the text of the file begins."""
    place = int(after_bos)
    head = next(index for index, (name, _) in enumerate(segments) if name in {"prefix", "typed"})
    return [
        *segments[:place],
        *context.at_start,
        *segments[place:head],
        *context.in_prefix,
        *segments[head:],
    ]


def _text_after(snapshot: Snapshot, max_chars: int) -> str:
    """At most `max_chars` characters from the cursor on, as the model sees them."""
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
    r"""The model has learned \n only, and no surrogate halves; the answer gets the file's line ends back."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)
