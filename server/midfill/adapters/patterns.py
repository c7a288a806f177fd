"""Match the regular expressions of an adapter's configuration in bounded time.

Python's `re` backtracks, and a short expression can make it run for ever. Here all alternatives are followed
at once, as a set of offsets in the name (K. Thompson, "Regular Expression Search Algorithm", 1968). Supports
the syntax that PEFT's users write; the rest is refused. Any thread.
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
"""Maps a name and the offsets where a part of an expression begins to the offsets where it can end."""


class PatternError(ValueError):
    """An expression is not supported; the message says which, and what to do."""


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> Step:
    """Compile an expression into a `Step`. Raises `PatternError`."""
    if len(pattern) > _MAX_CHARS:
        raise _not_understood(pattern, "is too long")
    return _Parser(pattern).parse()


def fullmatch(pattern: str, name: str) -> bool:
    """Return whether an expression matches all of a name. Raises `PatternError`."""
    return len(name) in ends(pattern, name, [0])


def ends(pattern: str, name: str, begins: Iterable[int]) -> frozenset[int]:
    """Return the offsets at which matches that begin at given offsets can end. Raises `PatternError`."""
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
            raise _not_understood(self._pattern, "has an unmatched closing bracket")
        return step

    def _peek(self, text: str) -> bool:
        return self._pattern.startswith(text, self._at)

    def _take(self, text: str) -> bool:
        if not self._peek(text):
            return False
        self._at += len(text)
        return True

    def _alternatives(self) -> tuple[Step, bool]:
        """Parse sequences with `|` between them; return whether one contains a repetition too."""
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
                # Nested repetitions would make the time grow again.
                if inner:
                    raise _not_understood(self._pattern, "has nested repetitions")
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
            raise _not_understood(self._pattern, "has a repetition of nothing")
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
            raise _not_understood(self._pattern, "has a group with options")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _not_understood(self._pattern, "is nested too deeply")
        step, repeats = self._alternatives()
        self._depth -= 1
        if not self._take(")"):
            raise _not_understood(self._pattern, "has an unclosed bracket")
        return (_followed(step, wanted=ahead == "?=") if ahead else step), repeats or bool(ahead)

    def _set(self) -> Step:
        """Parse a set of characters; `re` itself matches it, one character at a time."""
        end = self._at + self._peek("^")
        # A closing bracket that comes first means itself.
        end += self._pattern.startswith("]", end)
        while end < len(self._pattern) and self._pattern[end] != "]":
            end += 1 + (self._pattern[end] == "\\")
        if end >= len(self._pattern):
            raise _not_understood(self._pattern, "has an unclosed bracket")
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
            raise _not_understood(self._pattern, f"has the escape \\{character}")
        return _by_re(f"\\{character}", self._pattern)

    def _repetition(self) -> tuple[int, int | None] | None:
        """Parse a quantifier; return (minimum, maximum), or None if there is none."""
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
                raise _not_understood(self._pattern, "has a minimum above its maximum")
            bounds = (least, most)
        if bounds is not None:
            # Lazy or greedy makes no difference here.
            self._take("?")
            if self._pattern[self._at : self._at + 1] in {"*", "+", "?"}:
                raise _not_understood(self._pattern, "has nested repetitions")
        return bounds


def _one(fits: Callable[[str], bool]) -> Step:
    return lambda name, begins: frozenset(at + 1 for at in begins if at < len(name) and fits(name[at]))


def _by_re(text: str, pattern: str) -> Step:
    try:
        found = re.compile(text)
    except re.error as error:
        raise _not_understood(pattern, f"has an invalid part ({error})") from error
    return _one(lambda character: found.fullmatch(character) is not None)


def _boundaries(name: str, begins: frozenset[int]) -> frozenset[int]:
    def is_word(at: int) -> bool:
        return 0 <= at < len(name) and (name[at].isalnum() or name[at] == "_")

    return frozenset(at for at in begins if is_word(at - 1) != is_word(at))


def _followed(step: Step, *, wanted: bool) -> Step:
    """Return a lookahead: keep the offsets from which `step` matches, or, if not `wanted`, the others."""
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
