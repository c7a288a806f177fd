"""A stand-in for a vocabulary that is not known: for served engines that are sent text.

The prompt builder counts in tokens and places sentinels by id. So pieces of text get ids that hold the
piece itself, about as long as a code model's tokens are, and sentinels get ids of their own; `render` makes
one string of them. What a file says can never become a sentinel on the server's side either: see `encode`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_FIRST_CONTROL = -1
_PIECE = re.compile(r" ?[^\W\d_]{1,5}|\d|_+|[ \t]+|\s|[^\w\s]{1,2}", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
# What the sentinels of all known families look like, and the control tokens of most models.
_LIKE_A_SENTINEL = re.compile(
    r"<(?=[|\uff5c\[]|/?(?:s|bos|eos|pad|unk|think|filename|reponame|gh_stars|PRE|SUF|MID|EOT"
    r"|(?:fim|file|repo|issue|jupyter|commit|empty|start|end)[_-][\w-]{1,40})>)"
    r"|\[(?=(?:PREFIX|SUFFIX|MIDDLE|/?INST)\])"
)
# A server that is sent text puts the beginning of text before it by itself.
_BOS = ("<s>", "<bos>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<[begin\u2581of\u2581sentence]>")


class RenderedTokenizer:
    """See the module. Satisfies `Tokenizer`."""

    def __init__(self) -> None:
        self._control: dict[str, int] = {}
        self._names: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text.

        The server reads the prompt as one string and takes what looks like a sentinel for one. So behind the
        first character of such a name stands a blank: `< |fim_middle|>`. A server that takes token ids needs
        none of this.
        """
        safe = _LIKE_A_SENTINEL.sub(lambda match: f"{match.group()} ", _SURROGATE.sub("\ufffd", text))
        return [int.from_bytes(b"\x01" + piece.encode(), "big") for piece in _PIECE.findall(safe)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; sentinels are spelled out."""
        return "".join(self._piece(token) for token in ids)

    def render(self, ids: Sequence[int], *, bos: bool) -> str:
        """The prompt as the server shall read it; without `bos` a beginning-of-text token is left out."""
        skip = bool(ids) and not bos and self._names.get(ids[0]) in _BOS
        return self.decode(ids[int(skip) :])

    def around(self, ids: Sequence[int]) -> tuple[str, str]:
        """The text before the cursor and that after it, of a prompt in the order suffix, prefix."""
        marks = [
            at for at, token in enumerate(ids) if token in self._names and self._names[token] not in _BOS
        ]
        if len(marks) < 2:
            return self.render(ids, bos=False), ""
        return self.decode(ids[marks[1] + 1 :]), self.decode(ids[marks[0] + 1 : marks[1]])

    def token_id(self, name: str) -> int | None:
        """An id for a sentinel. Which of them the server knows is not known here: see `probing`."""
        if name not in self._control:
            self._control[name] = _FIRST_CONTROL - len(self._control)
            self._names[self._control[name]] = name
        return self._control[name]

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of the sentinels that were asked for."""
        return frozenset(self._names)

    def vocab_bytes(self) -> list[bytes]:
        """Not known."""
        return []

    def stream(self) -> RenderedTokenizer:
        """Pieces are whole, so there is nothing to remember."""
        return self

    def push(self, token: int) -> str:
        """See `TextStream.push`."""
        return "" if token in self._names else self._piece(token)

    def _piece(self, token: int) -> str:
        if (name := self._names.get(token)) is not None:
            return name
        return token.to_bytes((token.bit_length() + 7) // 8, "big")[1:].decode("utf-8", "replace")
