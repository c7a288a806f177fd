"""Characters that are not safe to show: control, bidirectional and invisible ones. Pure.

They can hide from the user what a suggestion does, or send commands to a terminal that prints it.
"""

from __future__ import annotations

import re

# Never allowed: C0 and C1 controls except tab and line feed, halves of surrogate pairs, tags.
_CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\U000e0000-\U000e007f"
# Allowed only if the file has the same one near the cursor: bidirectional controls; characters without width
# and invisible letters; line ends that editors do not show; variation selectors; blanks other than the space;
# private use characters, which fonts show in any way, many not at all.
_BIDIRECTIONAL = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_INVISIBLE = (
    "\xad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200d\u2028\u2029\u2060-\u2065\u206a-\u206f\u2800\u3164"
    "\ue000-\uf8ff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d159\U0001d173-\U0001d17a\U000e0080-\U000e0fff\U000f0000-\U0010ffff"
)
_UNSAFE = re.compile(f"[{_CONTROL}{_BIDIRECTIONAL}{_INVISIBLE}]")
_NEVER = re.compile(f"[{_CONTROL}]")
# Selects the coloured or the plain form of the emoji before it, such as that of a warning sign.
_PRESENTATION = frozenset("\ufe0e\ufe0f")
_KEYCAPS = frozenset("0123456789#*")


def safe_length(text: str, near: str, before: str = "") -> int:
    """Return the length of the longest prefix of `text` without unsafe characters.

    Args:
        text: text from an untrusted source.
        near: the user's own text around the insertion point; characters in it may occur again, except
            controls.
        before: the text before `text`.
    """
    if text.isascii() and text.isprintable():
        return len(text)
    for match in _UNSAFE.finditer(text):
        char, at = match.group(), match.start()
        if char in near and not _NEVER.match(char):
            continue
        previous = text[at - 1] if at else before[-1:]
        if char in _PRESENTATION and previous and (previous in _KEYCAPS or _is_symbol(previous)):
            continue
        return at
    return len(text)


def escaped(text: str) -> str:
    r"""Return `text` for a terminal: unsafe characters as escapes such as \x1b; tabs and line feeds stay."""
    return _UNSAFE.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


def _is_symbol(char: str) -> bool:
    return char in "\xa9\xae\u203c\u2049" or "\u2100" <= char <= "\u33ff" or char >= "\U0001f000"
