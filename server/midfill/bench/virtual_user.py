"""A virtual user: synthetic typing sessions in the files of a source tree.

Gaps between keys, the time from a key to the request, corrections and the share of single lines follow
measurements of people who type. Deterministic: the same tree and seed give the same sessions. Knows nothing
of servers.
"""

from __future__ import annotations

import math
import os
import random
import string
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from midfill.bench.trace import Key, TypingSession, cursor_after
from midfill.errors import MidfillError
from midfill.text.documents import Change
from midfill.text.languages import NOT_CODE, language_id

# Quantiles of the gaps between keys: (share, ms). The first value, and the maximum below, are assumptions.
_GAPS_MS = ((0.0, 25), (0.1, 45), (0.25, 68), (0.5, 91), (0.75, 136), (0.9, 203), (0.95, 314), (0.99, 1050))
_LONGEST_MS = 2000
_REQUEST_AFTER_S = 0.051
_CORRECTIONS = 0.063
_SINGLE_LINE = 0.78
_FIRST_KEY_S = (1.0, 1.5)
_REST_S = (0.4, 1.6)

_MIN_BYTES, _MAX_BYTES = 400, 100_000
_MAX_LINES = 4
_SKIPPED = {"node_modules", "__pycache__", "venv", "site-packages", "build", "dist"}


def generate(folder: Path, seed: int, num_sessions: int) -> list[TypingSession]:
    """Return sessions that retype lines of the code in `folder`. Raises `MidfillError` if it has none."""
    files = list(_files(folder))
    chance = random.Random(seed)
    sessions: list[TypingSession] = []
    # A file may be unreadable, or have no line worth typing.
    while files and len(sessions) < num_sessions:
        path = chance.choice(files)
        if (session := _session(folder, path, len(sessions), chance)) is None:
            files.remove(path)
        else:
            sessions.append(session)
    if not sessions:
        raise MidfillError(
            f"{folder} has no source file of {_MIN_BYTES} to {_MAX_BYTES} bytes. Choose another folder."
        )
    return sessions


def _files(folder: Path) -> Iterator[Path]:
    """Iterate over source files in a fixed order."""
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("."))
        for name in sorted(names):
            path = Path(where, name)
            if language_id(name) in NOT_CODE or path.is_symlink() or not path.is_file():
                continue
            if _MIN_BYTES <= path.stat().st_size <= _MAX_BYTES:
                yield path


def _session(folder: Path, path: Path, number: int, chance: random.Random) -> TypingSession | None:
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    lines = text.split("\n")
    worthwhile = [index for index, line in enumerate(lines) if len(line.strip()) > 1]
    if not worthwhile or "\r" in text or len(text.splitlines()) > len(lines):
        return None
    first = chance.choice(worthwhile)
    num_lines = 1 if chance.random() < _SINGLE_LINE else chance.randint(2, _MAX_LINES)
    last = max(index for index in worthwhile if index < first + num_lines)
    # The editor has indented the line already.
    column = len(lines[first]) - len(lines[first].lstrip())
    typed = "\n".join(lines[first : last + 1])[column:].rstrip()
    begun = lines[first][:column]
    left = "\n".join([*lines[:first], begun, *lines[last + 1 :]])
    keys = tuple(_keys(typed, (first, _units(begun)), chance))
    name = path.relative_to(folder).as_posix()
    return TypingSession(
        f"file:///replay/{number}/{name}", language_id(name), left, keys, round(chance.uniform(*_REST_S), 3)
    )


def _keys(typed: str, cursor: tuple[int, int], chance: random.Random) -> Iterator[Key]:
    """Iterate over the keys that type a text, typing errors and their corrections included."""
    first = True
    for stroke in _strokes(typed):
        slip = stroke.isalpha() and not first and chance.random() < _CORRECTIONS
        if slip:
            wrong = chance.choice([letter for letter in string.ascii_lowercase if letter != stroke])
            yield _key(Change(wrong, cursor, cursor), gap_s(chance))
            after = (cursor[0], cursor[1] + 1)
            yield _key(Change("", cursor, after), gap_s(chance))
        key = _key(
            Change(stroke, cursor, cursor),
            round(chance.uniform(*_FIRST_KEY_S), 3) if first else gap_s(chance),
        )
        yield key
        cursor, first = key.cursor, False


def _strokes(typed: str) -> Iterator[str]:
    """Iterate over the texts that keys insert: a character, or a line end with automatic indentation."""
    index = 0
    while index < len(typed):
        end = index + 1
        if typed[index] == "\n":
            while end < len(typed) and typed[end] in " \t":
                end += 1
        yield typed[index:end]
        index = end


def _key(change: Change, gap_s: float) -> Key:
    return Key(gap_s, (change,), cursor_after(change), _REQUEST_AFTER_S)


def gap_s(chance: random.Random) -> float:
    """Return a random gap between keys in seconds, log-linear between the quantiles."""
    drawn = chance.random()
    for (low, low_ms), (high, high_ms) in pairwise((*_GAPS_MS, (1.0, _LONGEST_MS))):
        if drawn <= high:
            part = (drawn - low) / (high - low)
            return round(math.exp(math.log(low_ms) * (1 - part) + math.log(high_ms) * part) / 1000, 3)
    raise AssertionError(drawn)


def _units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2
