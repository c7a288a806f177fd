"""FIM templates: one row for each family of fill-in-the-middle models, and checks of the rows.

Sentinels are given by name and resolved to ids when a model is loaded; each must be a single control token. A
model that fits no row is refused with the list of families, or probed (`probing`); it never gets another
family's template. Knows no documents and no windows: `completion.prompt` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from midfill.engine.api import ModelInfo, Tokenizer
from midfill.errors import ModelError


class Layout(StrEnum):
    """The order of a prompt's parts.

    P0 is whole lines above the cursor, `typed` is the text after them up to the cursor, S is the text after
    it.
    """

    PSM = "psm"
    ANCHORED = "anchored"
    APPENDING = "appending"
    SPM = "spm"


# Three of the parts are sentinels, in angle brackets; a family may lack the last one.
_PARTS: dict[Layout, tuple[str, ...]] = {
    # The order of training; every key makes the suffix new for the KV cache.
    Layout.PSM: ("<prefix>", "head", "typed", "<suffix>", "tail", "<middle>"),
    # PSM whose prefix ends at a line start: the text typed since is at the beginning of the middle.
    Layout.ANCHORED: ("<prefix>", "head", "<suffix>", "tail", "<middle>", "typed"),
    # "SPM variant 2" of the StarCoder and Code Llama papers: typing appends.
    Layout.APPENDING: ("<prefix>", "<suffix>", "tail", "<middle>", "head", "typed"),
    Layout.SPM: ("<suffix>", "tail", "<prefix>", "head", "typed", "<middle>"),
}


@dataclass(frozen=True, slots=True)
class CrossFile:
    """How a family's training data shows other files of a repository before the file with the hole.

    Attributes:
        file: marker before a file's path: a sentinel, or plain text.
        repository: a sentinel before the repository's name at the very start, or "".
        after_repository: text after that name.
        after_path: text between a path and the file's text.
        own_path: the file with the hole is preceded by its path too.
    """

    file: str
    repository: str = ""
    after_repository: str = ""
    after_path: str = "\n"
    own_path: bool = True


@dataclass(frozen=True, slots=True)
class Family:
    """The FIM template of one family of models.

    Attributes:
        prefix, suffix, middle: names of the sentinels; `middle` is "" if the family has none.
        stops: control tokens that end the middle; those that a vocabulary has are used. The first is
            required.
        layouts: the supported ones; the first is used by default.
        bos: a token that must open the prompt, exactly once, or "".
        prefix_lead: text before the prefix in training data (SentencePiece's dummy blank).
        needs_suffix: without a suffix the model ends at once, so it then gets the prefix alone.
        cross_file: see `CrossFile`; None if other files can only be shown as comments.
        architectures: values of transformers' `model_type` in which the family exists.
        name: a pattern that the model's name must match; families with the same sentinels differ in it.
    """

    prefix: str
    suffix: str
    middle: str
    stops: tuple[str, ...]
    layouts: tuple[Layout, ...] = (Layout.ANCHORED, Layout.PSM)
    bos: str = ""
    prefix_lead: str = ""
    needs_suffix: bool = False
    cross_file: CrossFile | None = None
    architectures: frozenset[str] = frozenset()
    name: str = ""

    @property
    def sentinels(self) -> tuple[str, ...]:
        """The names of the sentinels that every prompt needs."""
        return tuple(name for name in (self.prefix, self.suffix, self.middle, self.bos) if name)

    @property
    def file_marks(self) -> tuple[str, ...]:
        """The names of the sentinels that introduce other files; plain text like "#" is not one."""
        marks = (self.cross_file.repository, self.cross_file.file) if self.cross_file else ()
        return tuple(mark for mark in marks if mark.startswith("<"))

    @property
    def never_text(self) -> tuple[str, ...]:
        """Names that are sentinels and nothing else, however a model spells them; `</s>` is HTML too."""
        stops = (name for name in self.stops if "|" in name or "｜" in name)
        return tuple(dict.fromkeys((*filter(None, (self.prefix, self.suffix, self.middle)), *stops)))

    def parts(self, layout: Layout) -> Iterator[tuple[str, str]]:
        """Yield (kind, name) for the parts of a prompt in order, BOS first.

        ("sentinel", its name), ("text", "head"), ("text", "typed") or ("text", "tail").
        """
        if self.bos:
            yield "sentinel", self.bos
        names = {"<prefix>": self.prefix, "<suffix>": self.suffix, "<middle>": self.middle}
        for part in _PARTS[layout]:
            if part not in names:
                yield "text", part
            elif names[part]:
                yield "sentinel", names[part]


_STARCODER_FILES = CrossFile("<filename>", repository="<reponame>")
_QWEN_FILES = CrossFile("<|file_sep|>", repository="<|repo_name|>", after_repository="\n")
# Qwen's tokenizers do not call the last six special; a model that rambles continues with one of them.
_QWEN_STOPS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)


def _starcoder_like(*architectures: str, stop: str = "<|endoftext|>", name: str = "") -> Family:
    return Family(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        stops=(stop,),
        architectures=frozenset(architectures),
        name=name,
    )


# Forms from the models' cards, papers and reference code; `check_family` asserts the names against the
# tokenizer. The first layout of a family is the one with the best measured result
# (server/docs/experiments/009-prompt-order.md), else the
# anchored form of its training order.
FAMILIES: dict[str, Family] = {
    "starcoder": Family(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        stops=("<|endoftext|>", "<filename>", "<reponame>", "<gh_stars>"),
        layouts=(Layout.ANCHORED, Layout.APPENDING, Layout.PSM),
        cross_file=_STARCODER_FILES,
        architectures=frozenset({"gpt_bigcode"}),
        # Granite's larger code models share architecture and vocabulary.
        name="^(?!.*granite)",
    ),
    "santacoder": Family(
        "<fim-prefix>",
        "<fim-suffix>",
        "<fim-middle>",
        stops=("<|endoftext|>",),
        layouts=(Layout.ANCHORED, Layout.APPENDING, Layout.PSM),
        architectures=frozenset({"gpt_bigcode", "gpt2"}),
    ),
    "starcoder2": Family(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        stops=("<|endoftext|>", "<file_sep>", "<repo_name>"),
        cross_file=CrossFile("<file_sep>", repository="<repo_name>"),
        architectures=frozenset({"starcoder2"}),
    ),
    "refact": _starcoder_like("gpt_refact", "llama", name="refact"),
    "granite-code": _starcoder_like("llama", "granite", "gpt_bigcode", name="granite.*code"),
    "stable-code": _starcoder_like("stablelm"),
    "codellama": Family(
        "▁<PRE>",
        "▁<SUF>",
        "▁<MID>",
        stops=("▁<EOT>", "</s>"),
        layouts=(Layout.ANCHORED, Layout.APPENDING, Layout.PSM),
        bos="<s>",
        prefix_lead=" ",
        needs_suffix=True,
        architectures=frozenset({"llama"}),
    ),
    "deepseek-coder": Family(
        "<｜fim▁begin｜>",
        "<｜fim▁hole｜>",
        "<｜fim▁end｜>",
        stops=("<｜end▁of▁sentence｜>",),
        bos="<｜begin▁of▁sentence｜>",
        cross_file=CrossFile("#"),
        architectures=frozenset({"llama", "deepseek_v2"}),
    ),
    "qwen2.5-coder": Family(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        stops=_QWEN_STOPS,
        layouts=(Layout.APPENDING, Layout.ANCHORED, Layout.PSM),
        cross_file=_QWEN_FILES,
        architectures=frozenset({"qwen2"}),
    ),
    "qwen3-coder": Family(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        stops=(*_QWEN_STOPS, "<think>"),
        cross_file=_QWEN_FILES,
        architectures=frozenset({"qwen3", "qwen3_moe"}),
        name="coder",
    ),
    "codegemma": Family(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        stops=("<eos>", "<|file_separator|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        bos="<bos>",
        cross_file=CrossFile("<|file_separator|>"),
        architectures=frozenset({"gemma"}),
    ),
    "granite": Family(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        stops=("<|end_of_text|>",),
        architectures=frozenset({"granite", "granitemoe", "granitemoehybrid"}),
        name="granite",
    ),
    "codestral": Family(
        "[PREFIX]",
        "[SUFFIX]",
        "",
        stops=("</s>",),
        layouts=(Layout.SPM,),
        bos="<s>",
        prefix_lead=" ",
        cross_file=CrossFile("+++++ "),
        architectures=frozenset({"mistral"}),
        name="codestral",
    ),
    "mellum": Family(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        stops=("<|endoftext|>", "<filename>"),
        layouts=(Layout.SPM,),
        cross_file=CrossFile("<filename>"),
        architectures=frozenset({"llama"}),
        name="mellum",
    ),
    "seed-coder": Family(
        "<[fim-prefix]>",
        "<[fim-suffix]>",
        "<[fim-middle]>",
        stops=("<[end▁of▁sentence]>",),
        layouts=(Layout.SPM,),
        bos="<[begin▁of▁sentence]>",
        architectures=frozenset({"llama"}),
    ),
}


def recognise_family(model: ModelInfo, named: str | None = None) -> tuple[str, Family]:
    """Return a model's family: the one named by settings or catalogue, else the only one that fits.

    A family fits if its sentinels are single tokens of the vocabulary and its architecture and name agree.
    Raises `ModelError` with the list of families: no model ever gets another family's template.
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
        and not problems(family, model.tokenizer)
    ]
    if len(fitting) != 1:
        what = f"fits {' and '.join(fitting)}" if fitting else "fits none of the families"
        raise ModelError(
            f"The FIM family of {model.name!r} ({model.architecture}) is not known: the model {what}. "
            f'If you know it, set `family = "..."` to one of: {", ".join(FAMILIES)}.'
        )
    return fitting[0], FAMILIES[fitting[0]]


def infill(
    model: ModelInfo, named: str | None, before: str, after: str
) -> tuple[tuple[int, ...], frozenset[int]]:
    """Return the prompt for a hole between two texts, in the order of the family's training.

    It contains the whole texts: no window, no token healing. Returns the ids, and the ids that end the
    middle. Raises `ModelError` if the model's family is not known.
    """
    _, family = recognise_family(model, named)
    tokenizer = model.tokenizer
    layout = Layout.PSM if Layout.PSM in family.layouts else family.layouts[0]
    texts = {"head": family.prefix_lead + before, "typed": "", "tail": after}
    parts = list(family.parts(layout))
    if family.needs_suffix and not after:
        parts = [part for part in parts if part[1] in (family.bos, "head", "typed")]
    ids: list[int] = []
    for kind, name in parts:
        if kind == "text":
            ids += tokenizer.encode(texts[name]) if texts[name] else []
        elif (token := tokenizer.token_id(name)) is not None:
            ids.append(token)
    stops = (tokenizer.token_id(name) for name in family.stops)
    return tuple(ids), frozenset(token for token in stops if token is not None)


def family_in_name(name: str) -> str | None:
    """Return the family in a served model's name, such as "Qwen/Qwen2.5-Coder-7B"; None if there is none."""
    known = [family for family in FAMILIES if family in name.casefold()]
    return max(known, key=len, default=None)


def check_family(name: str, family: Family, tokenizer: Tokenizer) -> None:
    """Raise `ModelError` with the first of `problems`."""
    for problem in problems(family, tokenizer):
        raise ModelError(
            f"The FIM family {name!r} does not fit the model: {problem}. "
            "Use a base model of that family, or correct the setting `family`."
        )


def problems(family: Family, tokenizer: Tokenizer) -> list[str]:
    """Return why a vocabulary does not fit a family, a clause for each reason; empty if it fits.

    If a tokenizer maps unknown names to `<unk>` or end-of-text, a missing sentinel would silently end the
    prompt (StarCoder's unknown token is its end-of-text), so ids must differ; and a sentinel that is not a
    control token could come from a file's text.
    """
    found = []
    seen: dict[int, str] = {}
    ends = {tokenizer.token_id(name) for name in family.stops}
    for name in (*family.sentinels, *family.file_marks, family.stops[0]):
        token = tokenizer.token_id(name)
        if token is None:
            found.append(f"its tokenizer has no single token {name!r}")
        elif token not in tokenizer.control_ids:
            found.append(f"{name!r} is ordinary text in its tokenizer, not a control token")
        elif token in seen:
            found.append(f"{name!r} and {seen[token]!r} are the same token in its tokenizer")
        elif token in ends and name not in family.stops:
            found.append(f"{name!r} is an end-of-text token in its tokenizer")
        else:
            seen[token] = name
    return found
