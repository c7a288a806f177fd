"""Make a tokenizer.json from the vocabulary inside a GGUF file.

Knows the tokenizer keys of GGUF and which steps of the `tokenizers` library correspond to llama.cpp's
pre-tokenizer names; nothing of weights. The JSON is built directly: through transformers the vocabulary of
Qwen2.5-Coder takes 22 s, this takes well under a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midfill.errors import ModelError

# Token types of `tokenizer.ggml.token_type`: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_MAX_TOKENS = 1 << 20
# Maximum sum of the squared lengths of the tokens, to which the search for merges is proportional.
_MAX_MERGE_WORK = 1 << 27

_SPACE_MARK = "\u2581"

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_DIGITS = {"type": "Digits", "individual_digits": True}

# Pre-tokenization by `tokenizer.ggml.pre`: the steps of the original tokenizer.json.
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(use_regex=True)],
    "starcoder": [_DIGITS, _byte_level(use_regex=True)],
    "refact": [_DIGITS, _byte_level(use_regex=True)],
    "smollm": [_DIGITS, _byte_level(use_regex=True)],
    "qwen2": [_split(_QWEN2), _byte_level(use_regex=False)],
    "llama-bpe": [_split(_LLAMA3), _byte_level(use_regex=False)],
    "deepseek-coder": [
        _split(r"[\r\n]"),
        _split(r"\s?\p{L}+"),
        _split(r"\s?\p{P}+"),
        _split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
        _DIGITS,
        _byte_level(use_regex=False),
    ],
}


def tokenizer_json(metadata: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the content of a tokenizer.json with the same ids as the GGUF file.

    Placeholders that only pad the vocabulary to the embedding's size ("[PAD151665]") are skipped.

    Args:
        metadata: the file's metadata.
        source: the file's name, for messages.

    Raises:
        ModelError: the vocabulary is missing, inconsistent, or of an unsupported kind.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(text, str) for text in tokens):
        raise ModelError(f"{source} has no vocabulary, so it cannot be used as a model.")
    if len(tokens) > _MAX_TOKENS:
        raise ModelError(
            f"The vocabulary of {source} has {len(tokens)} tokens; the maximum is {_MAX_TOKENS}."
        )
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ModelError(f"The vocabulary of {source} is damaged: tokens and their types differ in number.")
    # If two ids have the same text (seen in padded vocabularies), the first is used.
    kinds: dict[str, tuple[int, int]] = {}
    for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if text != f"[PAD{i}]":
            kinds.setdefault(text, (i, kind))
    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        return _byte_level_bpe(metadata, kinds, source)
    if model == "llama":
        return _sentencepiece_bpe(metadata, kinds, source)
    raise ModelError(
        f"The vocabulary of {source} is of the kind {model!r}; midfill can convert gpt2 (byte-level BPE) and "
        "llama (SentencePiece BPE). Use the model's safetensors version."
    )


def _byte_level_bpe(
    metadata: Mapping[str, Any], kinds: Mapping[str, tuple[int, int]], source: str
) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    steps = _PRE_TOKENIZERS.get(pre) if isinstance(pre, str) else None
    if steps is None:
        raise ModelError(
            f"{source} has the pre-tokenizer {pre!r}, which midfill does not know; it knows "
            f"{', '.join(sorted(_PRE_TOKENIZERS))}. Use the model's safetensors version."
        )
    listed = metadata.get("tokenizer.ggml.merges")
    merges = [str(merge).split(" ") for merge in listed] if isinstance(listed, list) else []
    if not merges or any(len(pair) != 2 for pair in merges):
        raise ModelError(f"The vocabulary of {source} is damaged: its list of merges is missing or broken.")
    # A single character of user-defined type (DeepSeek-Coder has 13) is a byte, not an added token.
    added = {text: kind for text, kind in kinds.items() if len(text) > 1 or kind[1] == _CONTROL}
    return _description(
        kinds,
        added,
        pre_tokenizer=steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        decoder=_byte_level(use_regex=True),
        merges=merges,
        ignore_merges=pre == "llama-bpe",
    )


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], kinds: Mapping[str, tuple[int, int]], source: str
) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(metadata["tokenizer.ggml.tokens"])
        or not all(isinstance(score, int | float) for score in scores)
    ):
        raise ModelError(f"The vocabulary of {source} is damaged: some tokens have no score.")
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_MARK}
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE_MARK})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = next((text for text, (_, kind) in kinds.items() if kind == _UNKNOWN), None)
    return _description(
        kinds,
        kinds,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        decoder={"type": "Sequence", "decoders": decoders},
        merges=_merges_by_score(kinds, scores, source),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )


def _merges_by_score(
    kinds: Mapping[str, tuple[int, int]], scores: list[float], source: str
) -> list[list[str]]:
    """Return SentencePiece's BPE as a list of merges: any two pieces that make a piece, best score first.

    Raises `ModelError` if that would take too long.

    The order within one piece follows `transformers.tokenization_utils_sentencepiece`: left part's id,
    then right part's id.
    """
    if sum(len(text) ** 2 for text in kinds) > _MAX_MERGE_WORK:
        longest = max(map(len, kinds))
        raise ModelError(f"The vocabulary of {source} is damaged: a token has {longest} characters.")
    text_ids = {text: i for text, (i, kind) in kinds.items() if kind in (_NORMAL, _USER_DEFINED)}
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for whole, i in text_ids.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in text_ids and right in text_ids:
                ranked.append((-scores[i], i, text_ids[left], text_ids[right], left, right))
    ranked.sort()
    return [[left, right] for *_, left, right in ranked]


def _description(
    kinds: Mapping[str, tuple[int, int]],
    may_be_added: Mapping[str, tuple[int, int]],
    *,
    pre_tokenizer: dict[str, Any] | None = None,
    normalizer: dict[str, Any] | None = None,
    decoder: dict[str, Any],
    **model: Any,
) -> dict[str, Any]:
    added = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (_UNKNOWN, _CONTROL),
        }
        for text, (i, kind) in sorted(may_be_added.items(), key=lambda item: item[1][0])
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    bpe: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {text: i for text, (i, _) in kinds.items()},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": bpe | model,
    }
