"""The regular expressions of an adapter's configuration, matched in a time that their author does not decide.

Python's `re` tries one way after the other, and a short expression can have more ways than there is time.
Here all ways are followed at once, as a set of places in the name (K. Thompson, "Regular Expression Search
Algorithm", 1968). What PEFT's users write is understood; the rest is refused. Any thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

_MAX_CHARS = 1000
_MAX_REPEATS = 1000
_MAX_DEPTH = 20
_CLASSES = frozenset("dDwWsS")

Step = Callable[[str, frozenset[int]], frozenset[int]]
"""The places in a name that a part of an expression leads to from given places."""


class PatternError(ValueError):
    """An expression is not understood; the message says which, and what to do."""


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> Step:
    """Return the ends of an expression in a name, as a function of its begins. Raises `PatternError`."""
    if len(pattern) > _MAX_CHARS:
        raise _not_understood(pattern, "is too long")
    return _Parser(pattern).parse()


def fullmatch(pattern: str, name: str) -> bool:
    """Return whether an expression matches all of a name. Raises `PatternError`."""
    return len(name) in ends(pattern, name, [0])


def ends(pattern: str, name: str, begins: Iterable[int]) -> frozenset[int]:
    """Return where matches can end that begin at one of these places. Raises `PatternError`."""
    return compile_pattern(pattern)(name, frozenset(begins))


class _Parser:
    """Reads an expression from left to right; for one use."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> Step:
        step, _ = self._alternatives()
        if self._at < len(self._pattern):
            raise _not_understood(self._pattern, "has a closing bracket too many")
        return step

    def _peek(self, text: str) -> bool:
        return self._pattern.startswith(text, self._at)

    def _take(self, text: str) -> bool:
        if not self._peek(text):
            return False
        self._at += len(text)
        return True

    def _alternatives(self) -> tuple[Step, bool]:
        """Sequences with `|` between them, and whether something in them is repeated."""
        step, repeats = self._sequence()
        steps = [step]
        while self._take("|"):
            step, more = self._sequence()
            steps.append(step)
            repeats |= more
        return (steps[0] if len(steps) == 1 else _either(steps)), repeats

    def _sequence(self) -> tuple[Step, bool]:
        steps: list[Step] = []
        repeats = False
        while self._at < len(self._pattern) and not self._peek("|") and not self._peek(")"):
            step, inner = self._atom()
            bounds = self._repetition()
            if bounds is not None:
                # A repetition in a repetition is where the time would grow again.
                if inner:
                    raise _not_understood(self._pattern, "repeats what is repeated")
                step, inner = _repeated(step, *bounds), True
            steps.append(step)
            repeats |= inner
        return _all_of(steps), repeats

    def _atom(self) -> tuple[Step, bool]:
        if self._take("("):
            return self._group()
        if self._take("["):
            return self._set(), False
        if self._take("\\"):
            return self._escape(), False
        character = self._pattern[self._at]
        if character in "*+?{":
            raise _not_understood(self._pattern, "repeats nothing")
        self._at += 1
        if character == "^":
            return (lambda _, begins: begins & {0}), False
        if character == "$":
            return (lambda name, begins: begins & {len(name)}), False
        if character == ".":
            return _one(lambda found: found != "\n"), False
        return _one(lambda found: found == character), False

    def _group(self) -> tuple[Step, bool]:
        ahead = next((mark for mark in ("?=", "?!") if self._take(mark)), "")
        if not ahead and self._peek("?") and not self._take("?:"):
            raise _not_understood(self._pattern, "has a group with an option")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _not_understood(self._pattern, "is nested too deeply")
        step, repeats = self._alternatives()
        self._depth -= 1
        if not self._take(")"):
            raise _not_understood(self._pattern, "has an open bracket")
        return (_followed(step, wanted=ahead == "?=") if ahead else step), repeats or bool(ahead)

    def _set(self) -> Step:
        """A set of characters, which `re` itself decides on, one character at a time."""
        end = self._at + self._peek("^")
        # A closing bracket that comes first means itself.
        end += self._pattern.startswith("]", end)
        while end < len(self._pattern) and self._pattern[end] != "]":
            end += 1 + (self._pattern[end] == "\\")
        if end >= len(self._pattern):
            raise _not_understood(self._pattern, "has an open bracket")
        text = f"[{self._pattern[self._at : end + 1]}"
        self._at = end + 1
        return _by_re(text, self._pattern)

    def _escape(self) -> Step:
        if self._at >= len(self._pattern):
            raise _not_understood(self._pattern, "ends with a backslash")
        character = self._pattern[self._at]
        self._at += 1
        if character == "b":
            return _boundaries
        if character.isalnum() and character not in _CLASSES:
            raise _not_understood(self._pattern, f"has \\{character}")
        return _by_re(f"\\{character}", self._pattern)

    def _repetition(self) -> tuple[int, int | None] | None:
        """How often the last part comes; None for once."""
        bounds: tuple[int, int | None] | None = None
        if self._take("*"):
            bounds = (0, None)
        elif self._take("+"):
            bounds = (1, None)
        elif self._take("?"):
            bounds = (0, 1)
        elif match := re.compile(r"\{(\d{0,4})(,?)(\d{0,4})\}").match(self._pattern, self._at):
            self._at = match.end()
            least = int(match[1] or 0)
            most = int(match[3]) if match[3] else None if match[2] else least
            if max(least, most or 0) > _MAX_REPEATS or not (match[1] or match[3]):
                raise _not_understood(self._pattern, "repeats too often")
            if most is not None and most < least:
                raise _not_understood(self._pattern, "repeats more often at least than at most")
            bounds = (least, most)
        if bounds is not None:
            # Which of several ways is taken first is no matter here.
            self._take("?")
            if self._pattern[self._at : self._at + 1] in {"*", "+", "?"}:
                raise _not_understood(self._pattern, "repeats what is repeated")
        return bounds


def _one(fits: Callable[[str], bool]) -> Step:
    return lambda name, begins: frozenset(at + 1 for at in begins if at < len(name) and fits(name[at]))


def _by_re(text: str, pattern: str) -> Step:
    try:
        found = re.compile(text)
    except re.error as error:
        raise _not_understood(pattern, f"has a part that is none ({error})") from error
    return _one(lambda character: found.fullmatch(character) is not None)


def _boundaries(name: str, begins: frozenset[int]) -> frozenset[int]:
    def is_word(at: int) -> bool:
        return 0 <= at < len(name) and (name[at].isalnum() or name[at] == "_")

    return frozenset(at for at in begins if is_word(at - 1) != is_word(at))


def _followed(step: Step, *, wanted: bool) -> Step:
    """Stay at the places from which `step` leads somewhere, or else at those from which it does not."""
    return lambda name, begins: frozenset(at for at in begins if bool(step(name, frozenset({at}))) is wanted)


def _all_of(steps: list[Step]) -> Step:
    def step(name: str, places: frozenset[int]) -> frozenset[int]:
        for one in steps:
            if not places:
                break
            places = one(name, places)
        return places

    return step


def _either(steps: list[Step]) -> Step:
    return lambda name, begins: frozenset().union(*(step(name, begins) for step in steps))


def _repeated(step: Step, least: int, most: int | None) -> Step:
    def ends_of(name: str, begins: frozenset[int]) -> frozenset[int]:
        places = begins
        for _ in range(least):
            before, places = places, step(name, places)
            if not places or places == before:
                break
        found, new, number = places, places, least
        while new and (most is None or number < most):
            new = step(name, new) - found
            found |= new
            number += 1
        return found

    return ends_of


def _not_understood(pattern: str, why: str) -> PatternError:
    return PatternError(f"the expression {pattern[:80]!r} {why}; list the modules instead")
