"""Ignore files: which paths they name, as git decides (gitignore(5), and git's own wildmatch).

A pattern becomes an automaton whose states are the bits of an integer, so that matching takes time
proportional to the lengths of path and pattern, whatever the pattern is: a thread of the server matches the
patterns of repositories that nobody has checked. Works on bytes, as git does. Pure; any thread.
"""

from __future__ import annotations

import codecs
import os
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

IGNORE_FILES = (".gitignore", ".midfillignore")

# Longer paths, and folders with more patterns, are ignored: no project has them.
_MAX_PATH = 1_024
_MAX_WILD = 2_000

_SLASH = ord("/")
_SPECIAL = frozenset(b"*?[\\")
_NOT_SLASH = frozenset(range(256)) - {_SLASH}
_CLASSES = {
    b"alnum": string.ascii_letters + string.digits,
    b"alpha": string.ascii_letters,
    b"blank": " \t",
    b"cntrl": "".join(map(chr, [*range(32), 127])),
    b"digit": string.digits,
    b"graph": string.ascii_letters + string.digits + string.punctuation,
    b"lower": string.ascii_lowercase,
    b"print": string.ascii_letters + string.digits + string.punctuation + " ",
    b"punct": string.punctuation,
    b"space": string.whitespace,
    b"upper": string.ascii_uppercase,
    b"xdigit": string.hexdigits,
}


class _NeverMatchesError(ValueError):
    """The pattern is incomplete, such as `[a` or one with a backslash at its end."""


@dataclass(slots=True)
class _Glob:
    """A pattern as an automaton: in state n the first n tokens have matched.

    Attributes:
        tokens: the bytes that each token accepts; a star's token may be repeated or skipped.
        stars: the states before a star, as bits.
        skips: the states before `**/`, which may be skipped as a whole.
    """

    tokens: list[frozenset[int]] = field(default_factory=list)
    stars: int = 0
    skips: int = 0
    _moves: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, token: frozenset[int]) -> None:
        self.tokens.append(token)

    def add_star(self, token: frozenset[int]) -> None:
        self.stars |= 1 << len(self.tokens)
        self.tokens.append(token)

    def matches(self, text: bytes) -> bool:
        if len(self.tokens) - self.stars.bit_count() - 2 * self.skips.bit_count() > len(text):
            return False
        stars, skips, moves = self.stars, self.skips, self._moves
        states = self._entered(1)
        for byte in text:
            takes, repeats = moves.get(byte) or self._moves_by(byte)
            repeated = states & repeats
            # The slash after a repetition of `**/` is not skipped.
            states = (states & takes) << 1
            states = (
                (self._entered(states) if skips else states | (states & stars) << 1)
                | repeated
                | repeated << 1
            )
            if not states:
                return False
        return bool(states >> len(self.tokens) & 1)

    def _moves_by(self, byte: int) -> tuple[int, int]:
        bits = "".join("1" if byte in token else "0" for token in reversed(self.tokens))
        takes = int(bits or "0", 2)
        self._moves[byte] = moves = takes & ~self.stars, takes & self.stars
        return moves

    def _entered(self, states: int) -> int:
        """Return the states, plus those that are reached by skipping."""
        while True:
            more = states | (states & self.stars) << 1 | (states & self.skips) << 2
            if more == states:
                return states
            states = more


@dataclass(frozen=True, slots=True)
class _IgnorePattern:
    """One pattern.

    Attributes:
        ignores: False for a pattern with "!".
        only_folders: it ends with a slash.
        by_name: it has no other slash, and applies to names in all folders below.
        prefix: the text before its first special character; `glob` has the rest.
    """

    ignores: bool
    only_folders: bool
    by_name: bool
    prefix: bytes
    glob: _Glob | None

    def matches(self, path: bytes, name: bytes) -> bool:
        text = name if self.by_name else path
        if self.glob is None:
            return text == self.prefix
        return text.startswith(self.prefix) and self.glob.matches(text[len(self.prefix) :])


class IgnoreRules:
    """The patterns of one folder's ignore files; later ones take precedence."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self._rules: list[_IgnorePattern] = []
        # For patterns that are plain names, the last of each: (for folders only, name) to its number.
        self._names: dict[tuple[bool, bytes], int] = {}
        self._wild: list[int] = []
        for data in files:
            # As git does: Notepad puts a byte order mark at the beginning of a file.
            for line in _lines(data.removeprefix(codecs.BOM_UTF8)):
                self._add(line)

    def verdict(self, path: str, *, is_folder: bool) -> bool | None:
        """Return whether a path relative to the folder is ignored; None if no pattern matches."""
        data = os.fsencode(path)
        if len(data) > _MAX_PATH or len(self._wild) > _MAX_WILD:
            return True
        name = data.rpartition(b"/")[2]
        last = self._names.get((False, name), -1)
        if is_folder:
            last = max(last, self._names.get((True, name), -1))
        for number in reversed(self._wild):
            if number < last:
                break
            rule = self._rules[number]
            if (is_folder or not rule.only_folders) and rule.matches(data, name):
                last = number
                break
        return None if last < 0 else self._rules[last].ignores

    def _add(self, line: bytes) -> None:
        rule = _parse(line)
        if rule is None:
            return
        if rule.by_name and rule.glob is None:
            self._names[rule.only_folders, rule.prefix] = len(self._rules)
        else:
            self._wild.append(len(self._rules))
        self._rules.append(rule)


def _lines(data: bytes) -> Iterator[bytes]:
    """Yield the patterns of a file, without comments, line ends and trailing blanks."""
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        text = line.removesuffix(b"\r")
        if not text.startswith(b"#") and (stripped := _without_blanks(text)):
            yield stripped


def _without_blanks(line: bytes) -> bytes:
    stripped = line.rstrip(b" ")
    num_backslashes = len(stripped) - len(stripped.rstrip(b"\\"))
    # After an odd number of backslashes, the first blank is part of the pattern.
    return line[: len(stripped) + num_backslashes % 2]


def _parse(line: bytes) -> _IgnorePattern | None:
    """Return a parsed pattern; None for one that matches nothing."""
    ignores = not line.startswith(b"!")
    pattern = line.removeprefix(b"!")
    only_folders = pattern.endswith(b"/")
    pattern = pattern.removesuffix(b"/")
    by_name = b"/" not in pattern
    if pattern.startswith(b"/"):
        pattern = pattern[1:]
    end = next((at for at, byte in enumerate(pattern) if byte in _SPECIAL), len(pattern))
    prefix, rest = pattern[:end], pattern[end:]
    try:
        glob = _compile(rest, by_name=by_name) if rest else None
    except _NeverMatchesError:
        return None
    return _IgnorePattern(ignores, only_folders, by_name, prefix, glob)


def _compile(pattern: bytes, *, by_name: bool) -> _Glob:
    glob = _Glob()
    at = 0
    while at < len(pattern):
        byte = pattern[at : at + 1]
        if byte == b"*":
            at = _add_stars(glob, pattern, at, by_name=by_name)
        elif byte == b"?":
            glob.add(_NOT_SLASH)
            at += 1
        elif byte == b"[":
            taken, at = _bracket(pattern, at + 1)
            glob.add(taken - {_SLASH})
        else:
            if byte == b"\\":
                at += 1
                if at == len(pattern):
                    raise _NeverMatchesError
            glob.add(frozenset(pattern[at : at + 1]))
            at += 1
    return glob


def _add_stars(glob: _Glob, pattern: bytes, at: int, *, by_name: bool) -> int:
    """Add the stars that begin here. Returns the position after them."""
    end = at
    while end < len(pattern) and pattern[end : end + 1] == b"*":
        end += 1
    rest = pattern[end : end + 2]
    over_folders = (
        end - at > 1
        and not by_name
        and (at == 0 or pattern[at - 1 : at] == b"/")
        and (not rest or rest.startswith(b"/") or rest == b"\\/")
    )
    if not over_folders:
        glob.add_star(_NOT_SLASH)
        return end
    if rest.startswith(b"/"):
        # A repeated `**/` adds nothing.
        while pattern.startswith(b"/**/", end):
            end += 3
        glob.skips |= 1 << len(glob.tokens)
    glob.add_star(frozenset(range(256)))
    return end


def _bracket(pattern: bytes, at: int) -> tuple[frozenset[int], int]:
    """Return the bytes that a bracket expression accepts, and the position after it."""
    negated = pattern[at : at + 1] in {b"!", b"^"}
    at += negated
    taken: set[int] = set()
    previous = 0
    first = True
    while first or pattern[at : at + 1] != b"]":
        first = False
        byte = _byte(pattern, at)
        if byte == ord("-") and previous and pattern[at + 1 : at + 2] not in {b"", b"]"}:
            at += 1
            if pattern[at] == ord("\\"):
                at += 1
            taken.update(range(previous, _byte(pattern, at) + 1))
            previous = 0
        elif byte == ord("[") and pattern[at + 1 : at + 2] == b":":
            end = pattern.find(b"]", at + 2)
            if end < 0:
                raise _NeverMatchesError
            name = pattern[at + 2 : end]
            if name.endswith(b":"):
                if name[:-1] not in _CLASSES:
                    raise _NeverMatchesError
                taken.update(map(ord, _CLASSES[name[:-1]]))
                at, previous = end, 0
            else:
                taken.add(byte)
                previous = byte
        else:
            if byte == ord("\\"):
                at += 1
                byte = _byte(pattern, at)
            taken.add(byte)
            previous = byte
        at += 1
    return (frozenset(range(256)) - taken if negated else frozenset(taken)), at + 1


def _byte(pattern: bytes, at: int) -> int:
    if at >= len(pattern):
        raise _NeverMatchesError
    return pattern[at]
