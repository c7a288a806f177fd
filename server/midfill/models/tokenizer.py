"""Text to token ids and back, from a model's tokenizer.json.

Built on the `tokenizers` library alone: no transformers, no model. The engine's tokenizer differs from the
library's in four ways, because code is edited text, not a chat:

- Text can never become a control token. The library's `encode_special_tokens` does not ensure that: the
  sentinels of Qwen2.5-Coder are added tokens that are not marked special. So the encoder is built from the
  file without the control tokens, whose names are kept separately.
- Nothing is added: no BOS, no EOS, no space before the first word.
- Nothing is changed: without Unicode normalisation, `decode(encode(text)) == text`.
- Every token has bytes, whatever came before it, so that a stream can be decoded token by token.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from midfill.errors import ModelError
from midfill.system.file_errors import why_unreadable
from midfill.system.json_files import read_json

_MAX_ID = 1 << 20
"""Maximum token id: four times that of the largest vocabularies. Every id up to the highest takes memory."""
_MAX_STEPS = 100
"""Maximum number of normalisation and pre-tokenization steps; real tokenizers have less than ten."""
_MAX_GROWTH = 100

_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"

# Gemma's vocabularies have white space and HTML tags as added tokens. These are text: a model that completes
# a web page must be able to read and write them.
_TEXT_TOKEN = re.compile(
    r"[\s\u2581]+"
    r"|</?(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code)>"
)


def load_tokenizer(folder: Path) -> FastTokenizer:
    """Return the tokenizer of a model folder.

    Raises:
        ModelError: there is no tokenizer.json, it cannot be read, or it is of an unsupported kind.
    """
    path = folder / "tokenizer.json"
    try:
        description = read_json(path)
    except OSError as error:
        raise ModelError(f"The tokenizer {path} cannot be read: {why_unreadable(error)}.") from error
    except ValueError as error:
        raise ModelError(f"The tokenizer {path} cannot be used: {error}. Fetch the model again.") from error
    try:
        return FastTokenizer(description)
    except ModelError as error:
        raise ModelError(f"The tokenizer {path} cannot be used. {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ModelError(
            f"The tokenizer {path} is not a valid tokenizer.json ({type(error).__name__}). Fetch the model "
            "again."
        ) from error


class FastTokenizer:
    """A tokenizer that satisfies the engine's contract. Its methods may be called from any thread.

    Args:
        description: the content of a tokenizer.json.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer

        self._byte_level = "ByteLevel" in set(_types(description.get("decoder"))) | set(
            _types(description.get("pre_tokenizer"))
        )
        vocab = _vocab(description["model"])
        added = {token["content"]: token for token in description.get("added_tokens") or ()}
        _check_ids(vocab)
        _check_ids({text: token["id"] for text, token in added.items()})
        _check_steps(description.get("normalizer"))
        _check_steps(description.get("pre_tokenizer"))
        stray = {text for text in added if self._byte_level and len(text) == 1 and text in _BYTE_OF}
        control = {
            text: token["id"]
            for text, token in added.items()
            if text not in stray and (token.get("special") or not _TEXT_TOKEN.fullmatch(text))
        }
        ids: dict[str, int] = vocab | {text: token["id"] for text, token in added.items()}
        self._ids = ids
        self._added: dict[str, int] = {
            text: token["id"] for text, token in added.items() if text not in stray
        }
        self._control_ids = frozenset(control.values())
        self._num_ids = max(ids.values(), default=-1) + 1
        marks = [ids.get(f"<0x{byte:02X}>") for byte in _utf8(_SPACE_MARK)]
        self._mark_bytes = [] if self._byte_level else [i for i in marks if i is not None]
        encoder = _text_only(description, vocab, control, {text: added[text]["id"] for text in stray})
        try:
            self._encoder = Tokenizer.from_str(json.dumps(encoder))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and panics, which are not
            raise ModelError(f"The `tokenizers` library refuses it: {str(error)[:200]}.") from error

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; names of control tokens are encoded as ordinary characters."""
        safe = _SURROGATE.sub("\ufffd", text)
        if not self._mark_bytes or _SPACE_MARK not in safe:
            return self._encode_plain(safe)
        # SentencePiece writes spaces as this mark, so the mark itself is encoded by its bytes.
        first, *others = safe.split(_SPACE_MARK)
        ids = self._encode_plain(first)
        for part in others:
            ids += self._mark_bytes
            ids += self._encode_plain(part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; control tokens appear by name, incomplete UTF-8 becomes U+FFFD."""
        pieces = self._pieces
        return b"".join(pieces[i] for i in ids if i < len(pieces)).decode("utf-8", errors="replace")

    def token_id(self, name: str) -> int | None:
        """Return the id of the token whose text is exactly `name` (control tokens included), or None."""
        if (found := self._added.get(name)) is not None:
            return found
        if self._byte_level:
            return self._ids.get("".join(_CHARACTER_OF[byte] for byte in _utf8(name)))
        return self._ids.get(name.replace(" ", _SPACE_MARK))

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of every control token (sentinels, end of text, chat marks): never part of an answer."""
        return self._control_ids

    @property
    def num_ids(self) -> int:
        """One more than the highest id. A model's logits may be wider: the rest has no text."""
        return self._num_ids

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token; b"" for control tokens and unused ids."""
        bytes_of = self.vocab_bytes()
        return bytes_of[token] if token < len(bytes_of) else b""

    def vocab_bytes(self) -> list[bytes]:
        """Return `token_bytes` of every id from 0 to `num_ids`. Shared: do not change it."""
        return self._text_pieces

    def stream(self) -> TextStream:
        """Return a decoder for a stream of ids."""
        return TextStream(self._pieces)

    @cached_property
    def _text_pieces(self) -> list[bytes]:
        pieces = list(self._pieces)
        for token in self._control_ids:
            pieces[token] = b""
        return pieces

    @cached_property
    def _pieces(self) -> list[bytes]:
        pieces = [b""] * self._num_ids
        spell = _byte_level_piece if self._byte_level else _sentencepiece_piece
        for text, token in self._ids.items():
            pieces[token] = spell(text)
        for text, token in self._added.items():
            # Added tokens are literal, except that SentencePiece's mark is a space in text tokens.
            plain = text if token in self._control_ids else text.replace(_SPACE_MARK, " ")
            pieces[token] = _utf8(plain)
        return pieces


class TextStream:
    """Decodes tokens one by one, holding back the bytes of a character that is not complete yet."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the characters that this token completes; may be empty."""
        piece = self._pieces[token] if token < len(self._pieces) else b""
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """Return the rest at the end of a stream: U+FFFD for an incomplete character, else ""."""
        return self._decoder.decode(b"", final=True)


def _byte_alphabet() -> dict[int, str]:
    """Return the printable character that stands for each byte in GPT-2's byte-level vocabularies.

    Source: `bytes_to_unicode` of https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in alphabet)
    return alphabet | {byte: chr(256 + i) for i, byte in enumerate(others)}


_CHARACTER_OF = _byte_alphabet()
_BYTE_OF = {character: byte for byte, character in _CHARACTER_OF.items()}
_TO_LATIN_1 = {ord(character): byte for character, byte in _BYTE_OF.items()}


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


def _byte_level_piece(text: str) -> bytes:
    try:
        return text.translate(_TO_LATIN_1).encode("latin-1")
    except UnicodeEncodeError:  # not in the byte alphabet: a sentinel with other characters
        return _utf8(text)


def _sentencepiece_piece(text: str) -> bytes:
    if byte := _BYTE_PIECE.fullmatch(text):
        return bytes.fromhex(byte[1])
    return _utf8(text.replace(_SPACE_MARK, " "))


def _types(node: Any) -> Iterator[str]:
    """Iterate over the types of a pipeline step and of the steps inside it."""
    if isinstance(node, Mapping):
        yield str(node.get("type"))
        for inner in node.values():
            for step in inner if isinstance(inner, list) else [inner]:
                yield from _types(step)


def _vocab(model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    if model.get("type") == "Unigram" or isinstance(vocab, list):
        return {piece: i for i, (piece, _) in enumerate(vocab)}
    if model.get("type") == "WordPiece":
        raise ModelError("It is a WordPiece vocabulary, which cannot spell source code.")
    return dict(vocab)


def _check_ids(ids: Mapping[Any, Any]) -> None:
    """Raise `ModelError` if a token is not a string, or an id not a valid number."""
    for text, token in ids.items():
        if type(text) is not str or type(token) is not int or not 0 <= token < _MAX_ID:
            raise ModelError(
                f"Its token {str(text)[:40]!r} has the id {str(token)[:40]}; ids must be integers from 0 to "
                f"{_MAX_ID - 1}."
            )


def _check_steps(step: Any) -> None:
    """Raise `ModelError` if a step, with its nested steps, is too slow or makes a text many times longer."""
    num_steps = sum(1 for _ in _types(step))
    if num_steps > _MAX_STEPS:
        raise ModelError(f"It has {num_steps} normalisation steps; the maximum is {_MAX_STEPS}.")
    if (growth := math.prod(_growths(step))) > _MAX_GROWTH:
        raise ModelError(f"It makes a text up to {growth} times longer; the maximum is {_MAX_GROWTH}.")


def _growths(step: Any) -> Iterator[int]:
    """Iterate over the factors by which the steps, one after the other, can lengthen a text."""
    if not isinstance(step, Mapping):
        return
    if step.get("type") == "ByteLevel":
        yield 2  # a letter beyond ASCII becomes a character for each of its bytes, at least
    if isinstance(content := step.get("content"), str):
        pattern = step.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, Mapping) else None
        # An expression may match the empty string between all letters.
        length = len(replaced) if isinstance(replaced, str) and replaced else 0
        yield -(-len(content) // length) if length else len(content) + 1
    for inner in step.values():
        for one in inner if isinstance(inner, list) else [inner]:
            yield from (growth for growth in _growths(one) if growth > 1)


def _text_only(
    description: Mapping[str, Any],
    vocab: Mapping[str, int],
    control: Mapping[str, int],
    stray: dict[str, int],
) -> dict[str, Any]:
    """Return the tokenizer's description without anything that produces control tokens or changes the text.

    `stray` are single characters of the byte alphabet that some files (DeepSeek-Coder's) list as added
    tokens. As added tokens they would match the character itself and decode to a broken byte; they stand
    for bytes that valid UTF-8 never has, and belong in the vocabulary.
    """
    model = dict(description["model"])
    added = []
    if isinstance(model["vocab"], dict):
        added = [
            token
            for token in description.get("added_tokens") or ()
            if token["content"] not in control and token["content"] not in stray
        ]
        # The library renumbers added tokens unless the vocabulary has them.
        kept = {token["content"]: token["id"] for token in added}
        model["vocab"] = {text: i for text, i in vocab.items() if text not in control} | kept | stray
        if model.get("unk_token") not in model["vocab"]:
            model["unk_token"] = None
    if model.get("merges") and any(text in vocab for text in control):
        # "</" + "s>" may merge into "</s>" although that is not an added token any more.
        model["merges"] = [merge for merge in model["merges"] if not _names(merge, control)]
    return {
        "version": description.get("version", "1.0"),
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _unchanging(description.get("normalizer")),
        "pre_tokenizer": _unchanging(description.get("pre_tokenizer")),
        "post_processor": None,
        "decoder": None,
        "model": model,
    }


def _names(merge: str | Sequence[str], control: Mapping[str, int]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left + right in control or left in control or right in control


def _unchanging(step: Any) -> Any:
    """Return a normaliser or pre-tokenizer without the parts that add a space or rewrite characters."""
    if not isinstance(step, Mapping):
        return step
    kind = step.get("type")
    if kind in {"NFC", "NFD", "NFKC", "NFKD", "Prepend", "Strip", "StripAccents", "Lowercase"}:
        return None
    if kind == "Sequence":
        name = "normalizers" if "normalizers" in step else "pretokenizers"
        kept = [inner for inner in map(_unchanging, step[name]) if inner is not None]
        return {"type": "Sequence", name: kept} if kept else None
    if kind == "Metaspace":
        plain = {key: value for key, value in step.items() if key != "add_prefix_space"}
        return plain | {"prepend_scheme": "never"}
    if kind == "ByteLevel":
        return dict(step) | {"add_prefix_space": False}
    return step
