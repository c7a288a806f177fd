r"""FIM families: how each line of models was trained to fill in the middle. A table of data, and its checks.

A family's sentinels are known by name and resolved to ids when a model is loaded; each must be a single
control token. A model that fits no row is refused with the list, or probed (`probing`); it never gets
another family's template. Knows no documents and no windows: see `prompt`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from midfill.engine.api import ModelInfo, Tokenizer
from midfill.errors import ModelError


class Layout(StrEnum):
    """In which order the parts of a prompt stand.

    P0 is whole lines above the cursor, `typed` is what follows them up to the cursor, S is the text after it.
    """

    PSM = "psm"
    ANCHORED = "anchored"
    APPENDING = "appending"
    SPM = "spm"


# Three of the parts are sentinels, in brackets; a family may lack the last one.
_PARTS: dict[Layout, tuple[str, ...]] = {
    # As trained; every key makes the suffix new for the KV cache.
    Layout.PSM: ("<prefix>", "head", "typed", "<suffix>", "tail", "<middle>"),
    # PSM whose prefix ends at a line start: what was typed since stands where the middle begins.
    Layout.ANCHORED: ("<prefix>", "head", "<suffix>", "tail", "<middle>", "typed"),
    # "SPM variant 2" of the StarCoder and Code Llama papers: typing appends.
    Layout.APPENDING: ("<prefix>", "<suffix>", "tail", "<middle>", "head", "typed"),
    Layout.SPM: ("<suffix>", "tail", "<prefix>", "head", "typed", "<middle>"),
}


@dataclass(frozen=True, slots=True)
class CrossFile:
    r"""How a family was shown other files of a repository before the file with the hole.

    Attributes:
        file: what stands before a file's path: a sentinel, or plain text.
        repository: a sentinel before the repository's name at the very start, or "".
        after_repository: what follows that name.
        after_path: what stands between a path and the file's text.
        own_path: whether the file with the hole is introduced by its path as well.
    """

    file: str
    repository: str = ""
    after_repository: str = ""
    after_path: str = "\n"
    own_path: bool = True


@dataclass(frozen=True, slots=True)
class Family:
    """How one line of models was trained to fill in the middle.

    Attributes:
        prefix, suffix, middle: sentinels by name; `middle` is "" where the family has none.
        stops: control tokens that end the middle; those of them that a vocabulary has. The first is required.
        layouts: those that the family understands; the first is the one that is served.
        bos: a token that must open the prompt, exactly once, or "".
        prefix_lead: text that stands before the prefix in training data (SentencePiece's dummy blank).
        needs_suffix: without a suffix the model ends at once, so it then gets the prefix alone.
        cross_file: see `CrossFile`; None where other files can only be shown as comments.
        architectures: values of transformers' `model_type` that the family comes in.
        name: a pattern that the model's name must match; families that share sentinels differ in it.
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
        """The names of the sentinels that introduce other files; plain text like "#" is none."""
        marks = (self.cross_file.repository, self.cross_file.file) if self.cross_file else ()
        return tuple(mark for mark in marks if mark.startswith("<"))

    @property
    def never_text(self) -> tuple[str, ...]:
        """Names that mean nothing but a sentinel, however a model spells them; `</s>` is HTML as well."""
        stops = (name for name in self.stops if "|" in name or "｜" in name)
        return tuple(dict.fromkeys((*filter(None, (self.prefix, self.suffix, self.middle)), *stops)))

    def parts(self, layout: Layout) -> Iterator[tuple[str, str]]:
        """The parts of a prompt in order, BOS first, with their kinds.

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
# Qwen's tokenizers do not call the last six special; a model that rambles goes on with one of them.
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
# tokenizer. What is served first for a family is what was measured best for it (server/LOG.md), else
# the anchored form of what it was trained on.
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
        and not problems(family, model.tokenizer)
    ]
    if len(fitting) != 1:
        what = f"fits {' and '.join(fitting)}" if fitting else "fits none of them"
        raise ModelError(
            f"The FIM family of {model.name!r} ({model.architecture}) is not known: it {what}. "
            f'If you know it, set `family = "..."` to one of: {", ".join(FAMILIES)}.'
        )
    return fitting[0], FAMILIES[fitting[0]]


def infill(
    model: ModelInfo, named: str | None, before: str, after: str
) -> tuple[tuple[int, ...], frozenset[int]]:
    """A prompt with a hole between two texts, in the order that the family was trained on.

    The whole texts stand in it: no window, no token healing. Returns the ids, and those that end the middle.
    Raises `ModelError` if the model's family is not known.
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
    """The family that a model's name holds, as names of served models do: "Qwen/Qwen2.5-Coder-7B"."""
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
    """Why a vocabulary is not one of this family, a clause each; none if it is.

    Where a tokenizer maps unknown names to `<unk>` or end-of-text, a missing sentinel would silently
    end the prompt instead (StarCoder's unknown token is its end-of-text), so ids must be different ones;
    and a sentinel that is no control token could come out of a file's text.
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
