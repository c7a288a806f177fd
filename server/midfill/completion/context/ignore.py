"""Which paths an ignore file names, as git decides it (gitignore(5), and git's own wildmatch).

A pattern becomes an automaton whose states are the bits of an integer, so that the time for a path is its
length times that of the pattern, whatever the pattern is: those of a stranger's repository are matched by a
thread of the server. Works on bytes, as git does. Pure; any thread.
"""

from __future__ import annotations

import codecs
import os
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

IGNORE_FILES = (".gitignore", ".midfillignore")

# Longer paths than this are ignored, and a folder with more patterns: no project has them.
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
    """A pattern that is cut short, such as `[a` or one with a backslash at its end."""


@dataclass(slots=True)
class _Glob:
    """A pattern as an automaton: state n has matched the first n tokens.

    Attributes:
        tokens: the bytes that each token takes; those of a star may be repeated, and left out.
        stars: the states before a star, as bits.
        skips: the states before `**/`, which may be left out as a whole.
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
            # Behind a repetition of `**/` its slash is not left out.
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
        """States that have been come to, and those behind what may be left out there."""
        while True:
            more = states | (states & self.stars) << 1 | (states & self.skips) << 2
            if more == states:
                return states
            states = more


@dataclass(frozen=True, slots=True)
class _Rule:
    """One pattern.

    Attributes:
        ignores: False for a pattern with "!".
        only_folders: it ends with a slash.
        by_name: it has no other slash, and is for names in all folders below.
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
    """The patterns of the ignore files of one folder; a later one goes before an earlier one."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self._rules: list[_Rule] = []
        # Of patterns that are a mere name, the last for each: (for folders only, name) to its number.
        self._names: dict[tuple[bool, bytes], int] = {}
        self._wild: list[int] = []
        for data in files:
            # As git does: Notepad begins a file with a mark.
            for line in _lines(data.removeprefix(codecs.BOM_UTF8)):
                self._add(line)

    def verdict(self, path: str, *, is_folder: bool) -> bool | None:
        """Whether a path relative to the folder is ignored; None if no pattern says so or otherwise."""
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
    """The patterns in a file, without comments, line ends and trailing blanks."""
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        text = line.removesuffix(b"\r")
        if not text.startswith(b"#") and (stripped := _without_blanks(text)):
            yield stripped


def _without_blanks(line: bytes) -> bytes:
    stripped = line.rstrip(b" ")
    num_backslashes = len(stripped) - len(stripped.rstrip(b"\\"))
    # Behind an odd number of them the first blank is meant.
    return line[: len(stripped) + num_backslashes % 2]


def _parse(line: bytes) -> _Rule | None:
    """A pattern; None for one that nothing matches."""
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
    return _Rule(ignores, only_folders, by_name, prefix, glob)


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
    """Add the stars that stand here. Returns where the pattern goes on."""
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
        # `**/` once more adds nothing.
        while pattern.startswith(b"/**/", end):
            end += 3
        glob.skips |= 1 << len(glob.tokens)
    glob.add_star(frozenset(range(256)))
    return end


def _bracket(pattern: bytes, at: int) -> tuple[frozenset[int], int]:
    """The bytes that a set in brackets takes, and where the pattern goes on behind it."""
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
