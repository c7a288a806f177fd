r"""From a snapshot to the tokens that the model reads.

Knows the FIM families (a table of data), the token budget and the layout that keeps the cursor last.

A KV cache can be reused up to the first token that changed, so what the user types must come last.
For families that were trained prefix-first the prompt is anchored: `<PRE>P0<SUF>S<MID>typed`, where
P0 ends at a line start and what was typed since follows the middle sentinel. While the user types
on, P0 and S stay as they are, token for token, and only the tail is new.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum

from midfill.documents import Snapshot, split_lines
from midfill.engine import ModelInfo, Tokenizer
from midfill.errors import ModelError
from midfill.settings import Settings

_MAX_ANCHORS = 64
# No tokenizer of these families makes more characters of code into one token on average.
_MAX_CHARS_PER_TOKEN = 8
_UNFINISHED = re.compile(r"[ \t]?(?:[^\w\s]|_)*[^\W\d_]*\Z")


class Order(StrEnum):
    """In which order a family was trained to see the prefix P and the suffix S."""

    PSM = "prefix, suffix, middle"
    SPM = "suffix, prefix, middle"


@dataclass(frozen=True, slots=True)
class Family:
    """How one line of models was trained to fill in the middle.

    Attributes:
        prefix, suffix, middle: sentinels by name; `middle` is "" where the family has none.
        order: see `Order`.
        bos: a token that must open the prompt, or "".
        architectures: values of transformers' `model_type` that the family comes in.
        name: a pattern that the model's name must match; families that share sentinels differ in it.
    """

    prefix: str
    suffix: str
    middle: str
    order: Order = Order.PSM
    bos: str = ""
    architectures: frozenset[str] = frozenset()
    name: str = ""

    @property
    def sentinels(self) -> tuple[str, ...]:
        """The names of the sentinels that the prompt needs."""
        return tuple(name for name in (self.prefix, self.suffix, self.middle, self.bos) if name)


def _starcoder_like(*architectures: str, name: str = "") -> Family:
    return Family(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        architectures=frozenset(architectures),
        name=name,
    )


def _piped(*architectures: str, name: str = "", bos: str = "") -> Family:
    return Family(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        architectures=frozenset(architectures),
        name=name,
        bos=bos,
    )


# Forms from the models' cards and papers; `check_family` asserts the sentinels against the tokenizer.
FAMILIES: dict[str, Family] = {
    "starcoder": _starcoder_like("gpt_bigcode"),
    "starcoder2": _starcoder_like("starcoder2"),
    "santacoder": Family(
        "<fim-prefix>", "<fim-suffix>", "<fim-middle>", architectures=frozenset({"gpt_bigcode", "gpt2"})
    ),
    "refact": _starcoder_like("gpt_refact", "llama", name="refact"),
    "granite-code": _starcoder_like("llama", "granite", name="granite"),
    "stable-code": _starcoder_like("stablelm"),
    "deepseek-coder": Family(
        "<｜fim▁begin｜>",
        "<｜fim▁hole｜>",
        "<｜fim▁end｜>",
        bos="<｜begin▁of▁sentence｜>",
        architectures=frozenset({"llama", "deepseek_v2"}),
    ),
    "qwen2.5-coder": _piped("qwen2"),
    "qwen3-coder": _piped("qwen3", "qwen3_moe", name="coder"),
    "codegemma": _piped("gemma", bos="<bos>"),
    "granite": _piped("granite", "granitemoehybrid", name="granite"),
    "codestral": Family(
        "[PREFIX]",
        "[SUFFIX]",
        "",
        order=Order.SPM,
        bos="<s>",
        architectures=frozenset({"mistral"}),
        name="codestral",
    ),
    "mellum": Family(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        order=Order.SPM,
        architectures=frozenset({"llama"}),
        name="mellum",
    ),
    "seed-coder": Family(
        "<[fim-prefix]>",
        "<[fim-suffix]>",
        "<[fim-middle]>",
        order=Order.SPM,
        bos="<[begin▁of▁sentence]>",
        architectures=frozenset({"llama"}),
    ),
}


def recognise_family(model: ModelInfo, named: str | None = None) -> tuple[str, Family]:
    """The family of a model: the one that settings or catalogue name, else the only one that fits.

    A family fits if its sentinels are single tokens of the vocabulary and its architecture and name
    agree. Raises `ModelError` that lists the families: no model ever gets another family's template.
    """
    named = named or model.family
    if named is not None:
        family = FAMILIES.get(named)
        if family is None:
            raise ModelError(f"Unknown FIM family {named!r}. Known families: {', '.join(FAMILIES)}.")
        check_family(named, family, model.tokenizer)
        return named, family
    fitting = [
        name
        for name, family in FAMILIES.items()
        if model.architecture in family.architectures
        and re.search(family.name, model.name, re.IGNORECASE)
        and all(model.tokenizer.token_id(sentinel) is not None for sentinel in family.sentinels)
    ]
    if len(fitting) != 1:
        what = f"fits {' and '.join(fitting)}" if fitting else "fits none of them"
        raise ModelError(
            f"The FIM family of {model.name!r} ({model.architecture}) is not known: it {what}. "
            f'If you know it, set `family = "..."` to one of: {", ".join(FAMILIES)}.'
        )
    return fitting[0], FAMILIES[fitting[0]]


def check_family(name: str, family: Family, tokenizer: Tokenizer) -> None:
    """Assert that every sentinel is one control token. Raises `ModelError` naming the one that is not.

    Where a tokenizer maps unknown names to `<unk>` or end-of-text, a missing sentinel would silently
    end the prompt instead; `Tokenizer.token_id` knows exact spellings only.
    """
    for sentinel in family.sentinels:
        if tokenizer.token_id(sentinel) is None:
            raise ModelError(
                f"The model's tokenizer has no single token {sentinel!r}, which the FIM family {name!r} "
                "needs. Choose a base model of that family, or the right `family`."
            )


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads for one cursor.

    Attributes:
        tokens: the ids, sentinels included.
        starts_with: characters just before the cursor that were held back from the prompt because
            half a token would mislead the model; its output has to begin with them (token healing).
        segments: (source, number of tokens) in prompt order, for explaining and measuring.
    """

    tokens: tuple[int, ...]
    starts_with: str
    segments: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class _Anchor:
    """P0 and S, frozen, and where they were taken from."""

    first_line: int
    line: int
    head: str
    head_tokens: tuple[int, ...]
    tail: str
    tail_tokens: tuple[int, ...]


class PromptBuilder:
    """Builds prompts for one model; remembers each document's anchor. Runs on the event loop."""

    def __init__(self, model: ModelInfo, settings: Settings) -> None:
        self.family_name, self.family = recognise_family(model, settings.family)
        self._tokenizer = model.tokenizer
        self._ids = {name: model.tokenizer.token_id(name) for name in self.family.sentinels}
        room = model.context - settings.max_new_tokens - len(self._ids)
        self._prefix_tokens = min(settings.prefix_tokens, room * 2 // 3)
        self._suffix_tokens = min(settings.suffix_tokens, room // 3)
        if self._prefix_tokens < 1:
            raise ModelError(
                f"The context of {model.name!r} ({model.context} tokens) leaves no room for a prompt: "
                f"lower `max_new_tokens` ({settings.max_new_tokens})."
            )
        self._anchors: OrderedDict[str, _Anchor] = OrderedDict()

    def build(self, snapshot: Snapshot) -> Prompt:
        """Make the prompt of a snapshot, within the token budget."""
        anchor, typed_tokens, held = self._place(snapshot)
        self._remember(snapshot.document.uri, anchor)
        head = ("prefix", anchor.head_tokens)
        tail = ("suffix", anchor.tail_tokens)
        rest = ("typed", typed_tokens)
        prefix, suffix, middle = (
            (name, (self._ids[name],) if name else ())
            for name in (self.family.prefix, self.family.suffix, self.family.middle)
        )
        if self.family.order is Order.PSM:
            parts = [prefix, head, suffix, tail, middle, rest]
        else:
            parts = [suffix, tail, prefix, head, rest, middle]
        if self.family.bos:
            parts.insert(0, (self.family.bos, (self._ids[self.family.bos],)))
        tokens = tuple(token for _, ids in parts for token in ids if token is not None)
        segments = tuple((name, len(ids)) for name, ids in parts if ids)
        return Prompt(tokens, held, segments)

    def forget(self, uri: str) -> None:
        """Drop the anchor of a document that was closed."""
        self._anchors.pop(uri, None)

    def _remember(self, uri: str, anchor: _Anchor) -> None:
        self._anchors[uri] = anchor
        self._anchors.move_to_end(uri)
        if len(self._anchors) > _MAX_ANCHORS:
            self._anchors.popitem(last=False)

    def _place(self, snapshot: Snapshot) -> tuple[_Anchor, tuple[int, ...], str]:
        """The anchor to use, the tokens typed since, and the characters held back."""
        old = self._anchors.get(snapshot.document.uri)
        if old is not None and self._still_holds(old, snapshot):
            above = "".join(snapshot.document.lines[old.line : snapshot.cursor.line])
            tokens, held = self._heal(_clean(above) + snapshot.line_before)
            if len(old.head_tokens) + len(tokens) <= self._prefix_tokens:
                return old, tokens, held
        # Of a very long line, the part next to the cursor is kept.
        tokens, held = self._heal(snapshot.line_before[-self._prefix_tokens * _MAX_CHARS_PER_TOKEN :])
        tokens = tokens[-self._prefix_tokens :]
        first_line, head, head_tokens = self._head(snapshot, self._prefix_tokens - len(tokens))
        tail, tail_tokens = self._tail(snapshot)
        anchor = _Anchor(first_line, snapshot.cursor.line, head, head_tokens, tail, tail_tokens)
        return anchor, tokens, held

    def _heal(self, typed: str) -> tuple[tuple[int, ...], str]:
        """Tokens of what was typed, without what may be half a token; and that, as text.

        Tokenizers join a blank or marks to the word behind them (" return", ".loads", "(self"):
        "json.lo" is `json`, `.lo`, never the beginning of `json`, `.loads`, so a prompt that ends so has
        no likely continuation. Held back is the last word with the marks and the blank before it.
        Digits are tokens of their own.
        """
        match = _UNFINISHED.search(typed)
        held = match.group() if match else ""
        return tuple(self._tokenizer.encode(typed[: len(typed) - len(held)])), held

    def _still_holds(self, anchor: _Anchor, snapshot: Snapshot) -> bool:
        """Whether the text around the cursor still begins and ends with what the anchor froze."""
        lines = snapshot.document.lines
        return (
            anchor.line <= snapshot.cursor.line
            and _clean("".join(lines[anchor.first_line : anchor.line])) == anchor.head
            and _text_after(snapshot, max(len(anchor.tail), 1)).startswith(anchor.tail)
            and bool(anchor.tail) == bool(_text_after(snapshot, 1))
        )

    def _head(self, snapshot: Snapshot, budget: int) -> tuple[int, str, tuple[int, ...]]:
        """P0: whole lines above the cursor's, from a line number that stays the same for a while.

        The window starts at a multiple of `step` lines, so that it does not slide by a line each time
        the user goes to the next one, which would make every token of it new.
        """
        lines = snapshot.document.lines
        end = snapshot.cursor.line
        step = max(1, self._prefix_tokens // 32)
        starts: list[int] = []
        chars = 0
        for line in range(end - 1, -1, -1):
            chars += len(lines[line])
            if chars > budget * _MAX_CHARS_PER_TOKEN:
                break
            if line % step == 0 or end - line < step:
                starts.append(line)
        starts = starts[: self._num_fitting([lines[start:end] for start in starts], budget)]
        start = starts[-1] if starts else end
        head = _clean("".join(lines[start:end]))
        return start, head, tuple(self._tokenizer.encode(head))

    def _tail(self, snapshot: Snapshot) -> tuple[str, tuple[int, ...]]:
        """S: the text after the cursor, cut to the budget, at a line's end where possible."""
        text = _text_after(snapshot, self._suffix_tokens * _MAX_CHARS_PER_TOKEN)
        tokens = tuple(self._tokenizer.encode(text))
        if len(tokens) <= self._suffix_tokens:
            return text, tokens
        # Shrink by whole lines until it fits; a single line that does not fit is cut inside.
        rows = split_lines(text)
        fitting = self._num_fitting([rows[: count + 1] for count in range(len(rows))], self._suffix_tokens)
        text = "".join(rows[:fitting]) or text[: self._suffix_tokens]
        return text, tuple(self._tokenizer.encode(text))[: self._suffix_tokens]

    def _num_fitting(self, texts: list[list[str]], budget: int) -> int:
        """How many of the texts, each longer than the one before, have at most `budget` tokens."""
        return bisect_right(
            texts, budget, key=lambda rows: len(self._tokenizer.encode(_clean("".join(rows))))
        )


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
    r"""The model has learned \n only; the answer gets the file's own line ends back."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
