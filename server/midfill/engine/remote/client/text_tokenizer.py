"""A tokenizer for servers whose vocabulary is unknown, which are sent text.

The prompt builder counts in tokens and places sentinels by id. So pieces of text, about as long as a code
model's tokens are, get ids that encode the piece itself, and sentinels get negative ids; `render` makes one
string of them. Text of a file can never become a sentinel on the server either: see `encode`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_FIRST_CONTROL = -1
_PIECE = re.compile(r" ?[^\W\d_]{1,5}|\d|_+|[ \t]+|\s|[^\w\s]{1,2}", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
# Matches the sentinels of all known families and the control tokens of most models.
_LIKE_A_SENTINEL = re.compile(
    r"<(?=[|\uff5c\[]|/?(?:s|bos|eos|pad|unk|think|filename|reponame|gh_stars|PRE|SUF|MID|EOT"
    r"|(?:fim|file|repo|issue|jupyter|commit|empty|start|end)[_-][\w-]{1,40})>)"
    r"|\[(?=(?:PREFIX|SUFFIX|MIDDLE|/?INST)\])"
)
# A server that is sent text adds the beginning-of-text token itself.
_BOS = ("<s>", "<bos>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<[begin\u2581of\u2581sentence]>")


class TextTokenizer:
    """`Tokenizer` whose ids are pieces of text."""

    def __init__(self) -> None:
        self._control: dict[str, int] = {}
        self._names: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """Return ids of plain text.

        The server reads the prompt as one string and would take text that looks like a sentinel for one. So a
        blank is inserted after the first character of such a name: `< |fim_middle|>`. Servers that take token
        ids need none of this.
        """
        safe = _LIKE_A_SENTINEL.sub(lambda match: f"{match.group()} ", _SURROGATE.sub("\ufffd", text))
        return [int.from_bytes(b"\x01" + piece.encode(), "big") for piece in _PIECE.findall(safe)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; sentinels are spelled out."""
        return "".join(self._piece(token) for token in ids)

    def render(self, ids: Sequence[int], *, bos: bool) -> str:
        """Return the prompt as text for the server; without `bos` a beginning-of-text token is left out."""
        skip = bool(ids) and not bos and self._names.get(ids[0]) in _BOS
        return self.decode(ids[int(skip) :])

    def around(self, ids: Sequence[int]) -> tuple[str, str]:
        """Return the text before and after the cursor, of a prompt in the order suffix, prefix."""
        marks = [
            at for at, token in enumerate(ids) if token in self._names and self._names[token] not in _BOS
        ]
        if len(marks) < 2:
            return self.render(ids, bos=False), ""
        return self.decode(ids[marks[1] + 1 :]), self.decode(ids[marks[0] + 1 : marks[1]])

    def token_id(self, name: str) -> int | None:
        """Return an id for a sentinel. Which sentinels the server knows is unknown here: see `probing`."""
        if name not in self._control:
            self._control[name] = _FIRST_CONTROL - len(self._control)
            self._names[self._control[name]] = name
        return self._control[name]

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of the sentinels that were requested."""
        return frozenset(self._names)

    def vocab_bytes(self) -> list[bytes]:
        """Return an empty list: the vocabulary is unknown."""
        return []

    def stream(self) -> TextTokenizer:
        """Return itself: pieces are whole, so there is no state."""
        return self

    def push(self, token: int) -> str:
        """Return the text of an id; "" for a sentinel."""
        return "" if token in self._names else self._piece(token)

    def _piece(self, token: int) -> str:
        if (name := self._names.get(token)) is not None:
            return name
        return token.to_bytes((token.bit_length() + 7) // 8, "big")[1:].decode("utf-8", "replace")
