"""Draw holes in a repository: cursor positions, and the text that the author wrote there.

Files of recent commits are drawn more often. Within a file, holes are at positions where completions are
requested; the text after a hole stays. The same repository and seed give the same holes. Uses lines and
indentation only, so it works for any language. `context.files` decides which files are read.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from midfill.completion.context.files import FileFilter
from midfill.errors import MidfillError
from midfill.evaluation.fillers import Hole
from midfill.evaluation.git import Git, GitError
from midfill.settings import Settings
from midfill.text.languages import is_among

# Kinds of holes and their shares.
_AT_LINE_ENDS = {"rest-of-line": 7, "arguments": 2, "new-line": 4, "block": 3, "nothing": 4}
# Of the requests of a recorded session that no later key overtook, 31 % had text after the cursor on the
# line, and 17 % a word directly after it. The share at which nothing was written is that of line ends.
_INSIDE = {"inside-line": 9, "inside-word": 5, "nothing-inside": 4}
KINDS = _AT_LINE_ENDS | _INSIDE
PLACES = {"all": KINDS, "line-ends": _AT_LINE_ENDS, "inside": _INSIDE}
"""Which kinds of holes to draw, and their shares."""

_MAX_LINE_CHARS = 300
_MAX_BLOCK_LINES = 8
_MIN_LINES = 5
_MAX_INSIDE_TOKENS = 8
_NUM_COMMITS = 1000
# A file in the newest commit counts twice as much as one this many commits back.
_HALF_LIFE_COMMITS = 100
_COMMENT = re.compile(r"\s*(?:#|//|/\*|\*|--|<!--)")
_LETTER = re.compile(r"[^\W\d_]")
_TOKEN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"\w")
# The words of max_new_tokens and maxNewTokens.
_WORD_IN_NAME = re.compile(r"[^\W_][^\W_A-Z]*_*")
_CALL = re.compile(r"\w\(")
_ONLY_CLOSERS = re.compile(r"""[\s)\]}>"'`;,:{]*\Z""")
_OPENS_BLOCK = re.compile(r".*[:{]\s*(?:(?:#|//).*)?\Z")


@dataclass(frozen=True, slots=True)
class Sample:
    """A hole in a file of the repository.

    Attributes:
        id: the position and a digest of the text, so that results of a changed file are not reused.
        file: path in the repository, with slashes.
        kind: one of `KINDS`.
        hole: the document with the cursor.
        truth: the original text; "" if the author wrote nothing there.
    """

    id: str
    file: str
    kind: str
    hole: Hole
    truth: str


@dataclass(frozen=True, slots=True)
class _Source:
    path: Path
    name: str
    language: str
    text: str
    weight: float


def choose(root: Path, settings: Settings, *, count: int, seed: int, places: str = "all") -> list[Sample]:
    """Draw at most `count` different holes in the repository at `root`; `places` is a key of `PLACES`.

    Raises `MidfillError` if it is not a folder, or has no source files.
    """
    if not root.is_dir():
        raise MidfillError(f"{root} is not a folder. Give the folder of a repository.")
    chooser = random.Random(seed)
    sources = list(_read(FileFilter(root.resolve(), settings.excluded_files), _history(root), settings))
    if not sources:
        raise MidfillError(
            f"{root} has no source files in a language that midfill knows. Files that git ignores, generated "
            "and third-party files, secrets, and files excluded by the settings do not count."
        )
    # Files without a recent commit are drawn too, but rarely.
    floor = max(source.weight for source in sources) / 100 or 1.0
    weights = [max(source.weight, floor) for source in sources]
    return list(_draw(sources, weights, PLACES[places], count, chooser))


def _draw(
    sources: Sequence[_Source],
    weights: Sequence[float],
    shares: Mapping[str, int],
    count: int,
    chooser: random.Random,
) -> Iterator[Sample]:
    places: dict[tuple[str, str], list[tuple[int, int]]] = {}
    taken: set[tuple[str, int, int]] = set()
    drawn: dict[str, int] = defaultdict(int)
    # Limit each file's share, so that none dominates the result.
    most = max(2, -(-4 * count // len(sources)))
    kinds = [kind for kind, share in shares.items() for _ in range(share)]
    found = 0
    for attempt in range(50 * count):
        if found == count:
            return
        source = chooser.choices(sources, weights)[0]
        kind = kinds[attempt % len(kinds)] if attempt < count else chooser.choice(kinds)
        key = (source.name, kind)
        if key not in places:
            places[key] = list(_SPANS[kind](source.text))
            chooser.shuffle(places[key])
        if drawn[source.name] == most or not places[key]:
            continue
        # A block of one line is also a new line.
        if (place := (source.name, *places[key].pop())) in taken:
            continue
        taken.add(place)
        drawn[source.name] += 1
        found += 1
        yield _sample(source, kind, *place[1:])


def _sample(source: _Source, kind: str, start: int, end: int) -> Sample:
    text = source.text
    line = text.count("\n", 0, start) + 1
    column = start - text.rfind("\n", 0, start)
    digest = hashlib.sha256(f"{start}:{end}:{text}".encode("utf-8", "surrogatepass")).hexdigest()[:8]
    hole = Hole(source.path.as_uri(), source.language, text[:start], text[end:])
    return Sample(f"{source.name}:{line}:{column}#{digest}", source.name, kind, hole, text[start:end])


def _history(root: Path) -> dict[str, float]:
    """Return weights of files by their recent commits; empty without git or without a repository."""
    try:
        git = Git(root)
        out = git.run(
            *("log", "-z", "--format=%x01", "--name-only", "--no-renames", f"-n{_NUM_COMMITS}"),
            *([f"--relative={git.prefix}"] if git.prefix else []),
            "HEAD",
        )
    except GitError:
        return {}
    weights: dict[str, float] = defaultdict(float)
    age = -1
    for field in out.decode("utf-8", "surrogateescape").split("\0"):
        age += field.count("\x01")
        if name := field.rpartition("\x01")[2].strip("\n"):
            weights[name] += 0.5 ** (age / _HALF_LIFE_COMMITS)
    return weights


def _read(file_filter: FileFilter, weights: Mapping[str, float], settings: Settings) -> Iterator[_Source]:
    """Iterate over hand-written source files in languages that are not disabled."""
    for name in sorted(file_filter.walk()):
        file = file_filter.read(name)
        if (
            file is not None
            and not is_among(settings.disabled_languages, file.language_id)
            and file.text.count("\n") >= _MIN_LINES
        ):
            path = file_filter.root / name
            yield _Source(path, name, file.language_id, file.text, weights.get(name, 0.0))


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Iterate over (offset, line without its line end)."""
    offset = 0
    for line in text.split("\n"):
        yield offset, line.removesuffix("\r")
        offset += len(line) + 1


def _code_lines(text: str) -> Iterator[tuple[int, str]]:
    """Iterate over lines worth completing: with a letter, not very long, neither comment nor docstring."""
    quoted = False
    for offset, line in _lines(text):
        if line.count('"""') % 2 or line.count("'''") % 2:
            quoted = not quoted
            continue
        if quoted:
            continue
        fits = len(line.strip()) >= 4 and len(line) <= _MAX_LINE_CHARS
        if fits and not _COMMENT.match(line) and _LETTER.search(line):
            yield offset, line


def _rests_of_lines(text: str) -> Iterator[tuple[int, int]]:
    """Iterate over spans from a token's begin, or from within a word, to the end of the line."""
    for offset, line in _code_lines(text):
        content = line.rstrip()
        tokens = list(_TOKEN.finditer(content))
        for token in tokens[1:]:
            if not _ONLY_CLOSERS.match(content, token.start()):
                yield offset + token.start(), offset + len(line)
        for token in tokens:
            if len(token.group()) >= 5 and token.group().isidentifier():
                yield offset + token.start() + 3, offset + len(line)


def _arguments(text: str) -> Iterator[tuple[int, int]]:
    """Iterate over spans between the brackets of a call, with only closing brackets after them."""
    for offset, line in _code_lines(text):
        for call in _CALL.finditer(line):
            depth = 1
            for index in range(call.end(), len(line)):
                depth += (line[index] in "([{") - (line[index] in ")]}")
                if depth == 0:
                    if index > call.end() and _ONLY_CLOSERS.match(line, index):
                        yield offset + call.end(), offset + index
                    break


def _new_lines(text: str) -> Iterator[tuple[int, int]]:
    """Iterate over spans of whole lines without their indentation."""
    for offset, line in _code_lines(text):
        yield offset + len(line) - len(line.lstrip()), offset + len(line)


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    """Iterate over spans of block bodies: the lines below a block's header that are indented deeper."""
    lines = list(_lines(text))
    for number, (_, header) in enumerate(lines[:-1]):
        if not header.strip() or not _OPENS_BLOCK.match(header) or _COMMENT.match(header):
            continue
        base = len(header) - len(header.lstrip())
        body = 0
        for _, line in lines[number + 1 :]:
            if line.strip() and len(line) - len(line.lstrip()) <= base:
                break
            body += 1
        while body and not lines[number + body][1].strip():
            body -= 1
        if 1 <= body <= _MAX_BLOCK_LINES and lines[number + 1][1].strip():
            offset, first = lines[number + 1]
            last_offset, last = lines[number + body]
            yield offset + len(first) - len(first.lstrip()), last_offset + len(last)


def _nothings(text: str) -> Iterator[tuple[int, int]]:
    """Iterate over empty spans where the author wrote nothing: after a complete line, and on a blank line."""
    for offset, line in _code_lines(text):
        yield offset + len(line.rstrip()), offset + len(line.rstrip())
    for offset, line in _lines(text.rstrip("\n")):
        if not line.strip() and offset:
            yield offset + len(line), offset + len(line)


def _insides_of_lines(text: str) -> Iterator[tuple[int, int]]:
    """Iterate over spans of whole tokens, with words before and after them on the line; also in comments."""
    for offset, line in _lines(text):
        tokens = list(_TOKEN.finditer(line)) if len(line) <= _MAX_LINE_CHARS else []
        for first, token in enumerate(tokens[1:-1], 1):
            for last in tokens[first : min(first + _MAX_INSIDE_TOKENS, len(tokens) - 1)]:
                span = line[token.start() : last.end()]
                rest = line[last.end() :]
                # What a word would run into is a hole inside a word.
                if _LETTER.search(span) and _LETTER.search(rest) and not _WORD.match(rest):
                    yield offset + token.start(), offset + last.end()


def _insides_of_words(text: str) -> Iterator[tuple[int, int]]:
    """Iterate over spans of the words of a name but the last, such as `max_` of max_tokens."""
    for offset, line in _code_lines(text):
        for name in _TOKEN.finditer(line):
            starts = [name.start() + part.start() for part in _WORD_IN_NAME.finditer(name.group())]
            for start, end in pairwise(starts):
                yield offset + start, offset + end


def _nothings_inside(text: str) -> Iterator[tuple[int, int]]:
    """Iterate over empty spans between two tokens of a line, and between two words of a name."""
    for offset, line in _code_lines(text):
        tokens = list(_TOKEN.finditer(line))
        yield from ((offset + token.start(), offset + token.start()) for token in tokens[1:])
    yield from ((start, start) for start, _ in _insides_of_words(text))


_SPANS: dict[str, Callable[[str], Iterator[tuple[int, int]]]] = {
    "rest-of-line": _rests_of_lines,
    "arguments": _arguments,
    "new-line": _new_lines,
    "block": _blocks,
    "nothing": _nothings,
    "inside-line": _insides_of_lines,
    "inside-word": _insides_of_words,
    "nothing-inside": _nothings_inside,
}
