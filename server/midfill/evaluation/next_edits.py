"""Next-edit scenarios: does a suggestion make the change that earlier edits call for, and is it silent else?

A scenario is a file in txtar format: a buffer, a cursor, the edits made before, and the buffer as it should
be. It is played to a server as an editor would: open the buffer as it was before the edits, make them, then
request suggestions and accept them. `lsp.server_editor` is the editor that does so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from midfill.errors import MidfillError
from midfill.evaluation.records import Records
from midfill.system import text_files
from midfill.system.file_errors import why_unreadable
from midfill.system.measure import percentiles
from midfill.text.documents import Point, changed_lines

_SECTION = re.compile(r"(?m)^-- (\S+) --\n")
_HUNK = re.compile(r"<\|file\|> ([^\n]+)\n<\|old\|>\n(.*?)<\|new\|>\n(.*?)(?=<\|file\|>|\Z)", re.DOTALL)
_STEPS = {"request-completion", "accept", "reject", "expect"}
_CHRF_ORDER = 6
_CHRF_BETA = 2.0


@dataclass(frozen=True, slots=True)
class PastEdit:
    """An edit that the user has made before the scenario begins: `old` became `new` in `file`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario.

    Attributes:
        id: its name.
        language: LSP language identifier.
        file: path of the buffer, relative to the workspace.
        text: the buffer.
        fill_at: where a fill-in-the-middle request is made.
        cursors: where the cursor is; the later ones are of scenarios that must stay silent.
        history: the earlier edits, oldest first; `text` contains them already.
        steps: the words of each step.
        expected: the buffer after all steps, or None if nothing must be suggested.
    """

    id: str
    language: str
    file: str
    text: str
    fill_at: Point
    cursors: tuple[Point, ...]
    history: tuple[PastEdit, ...]
    steps: tuple[tuple[str, ...], ...]
    expected: str | None


@dataclass(frozen=True, slots=True)
class TextEdit:
    """Replaces the text between two points."""

    start: Point
    end: Point
    new_text: str

    def apply(self, text: str) -> str:
        """Return `text` with this edit made."""
        return text[: offset(text, self.start)] + self.new_text + text[offset(text, self.end) :]


@dataclass(frozen=True, slots=True)
class Suggested:
    """The answer to one request: the first suggestion, or None, and the time that it took."""

    edit: TextEdit | None
    latency_ms: float


class Editor(Protocol):
    """An editor with a server behind it."""

    @property
    def model(self) -> str:
        """The name of the model."""
        ...

    async def open(self, file: str, language: str, text: str) -> None:
        """Open a buffer."""
        ...

    async def change(self, file: str, text: str) -> None:
        """Make the buffer's text `text` in one edit of what differs."""
        ...

    async def suggest(self, file: str, cursor: Point) -> Suggested:
        """Request a suggestion explicitly."""
        ...

    async def close_all(self) -> None:
        """Close all buffers."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one scenario.

    Attributes:
        id: of the scenario.
        silent: whether the scenario must stay silent.
        shown: whether anything was suggested, at any cursor.
        delta_chrf: 0..100, see `delta_chrf`; 0 for a scenario that must stay silent.
        text: the buffer with all suggestions accepted.
        latencies_ms: of the requests.
    """

    id: str
    silent: bool
    shown: bool
    delta_chrf: float
    text: str
    latencies_ms: tuple[float, ...]


def read_scenarios(folder: Path) -> list[Scenario]:
    """Read the .txtar files of a folder, by name. Raises `MidfillError` naming the file."""
    if not folder.is_dir():
        raise MidfillError(f"{folder} is not a folder.")
    paths = sorted(folder.glob("*.txtar"))
    if not paths:
        raise MidfillError(f"{folder} has no .txtar files.")
    return [_read(path) for path in paths]


def _read(path: Path) -> Scenario:
    try:
        return parse(text_files.read(path))
    except (OSError, UnicodeError) as error:
        raise MidfillError(f"Cannot read {path}: {why_unreadable(error)}.") from error
    except (KeyError, ValueError) as error:
        raise MidfillError(f"{path} is not a next-edit scenario: {str(error).rstrip('.')}.") from error


def parse(source: str) -> Scenario:
    """Parse a scenario. Raises `KeyError` or `ValueError` if something is missing or not known."""
    head, *pieces = _SECTION.split(source)
    fields = dict(line.split(": ", 1) for line in head.splitlines() if re.match(r"[\w-]+: ", line))
    sections = dict(zip(pieces[::2], pieces[1::2], strict=True))
    steps = tuple(tuple(line.split()) for line in sections["steps"].splitlines() if line.strip())
    for step in steps:
        if step[0] not in _STEPS:
            raise ValueError(f"the step {' '.join(step)!r} is not known")
    cursor = _point(fields["row"], fields["col"])
    more = [_point(*one.split(":")) for one in fields.get("cursor-positions", "").split(", ") if one]
    silent = ("expect", "!shown") in steps
    return Scenario(
        fields["id"],
        fields["language"],
        fields["file"],
        sections["buffer.txt"],
        _point(fields["fim-row"], fields["fim-col"]) if "fim-row" in fields else cursor,
        (cursor, *more) if silent else (cursor,),
        tuple(PastEdit(*match) for match in _HUNK.findall(sections.get("history", ""))),
        steps,
        None if silent else sections["expected"],
    )


def _point(row: str, column: str) -> Point:
    return Point(int(row) - 1, int(column))


async def evaluate(
    scenarios: Sequence[Scenario], editor: Editor, records: Records, tell: Callable[[float], None]
) -> None:
    """Play every scenario that `records` does not have yet; `tell` is called with the share done."""
    for number, scenario in enumerate(scenarios):
        if scenario.id not in records.rows:
            records.keep(asdict(await play(scenario, editor)))
        tell((number + 1) / len(scenarios))


async def play(scenario: Scenario, editor: Editor) -> Result:
    """Play one scenario: at each of its cursors if it must stay silent, else where a fill request is made."""
    silent = scenario.expected is None
    shown, latencies, text = False, list[float](), scenario.text
    for cursor in scenario.cursors if silent else (scenario.fill_at,):
        text, edits = await _play_at(scenario, cursor, editor, latencies)
        shown |= edits > 0
    score = 0.0 if scenario.expected is None else delta_chrf(scenario.text, text, scenario.expected)
    return Result(scenario.id, silent, shown, round(score, 2), text, tuple(latencies))


async def _play_at(
    scenario: Scenario, cursor: Point, editor: Editor, latencies: list[float]
) -> tuple[str, int]:
    """Play a scenario with the cursor at one point. Return the buffer at the end and the number of edits."""
    for file, before, after in _past(scenario):
        await editor.open(file, scenario.language, before)
        if after != before:
            await editor.change(file, after)
    text, pending, num_edits = scenario.text, None, 0
    for word, *_ in scenario.steps:
        if word == "request-completion":
            suggested = await editor.suggest(scenario.file, cursor)
            latencies.append(round(suggested.latency_ms, 1))
            pending = suggested.edit
            num_edits += pending is not None
        elif word == "accept" and pending is not None:
            text = pending.apply(text)
            cursor = point(text, offset(text, pending.start) + len(pending.new_text))
            await editor.change(scenario.file, text)
            pending = None
        elif word == "reject":
            pending = None
    await editor.close_all()
    return pending.apply(text) if pending is not None else text, num_edits


def _past(scenario: Scenario) -> Iterator[tuple[str, str, str]]:
    """Yield for each file of a scenario its text before the earlier edits, and after them."""
    before = scenario.text
    others: dict[str, list[PastEdit]] = {}
    for edit in reversed(scenario.history):
        if edit.file != scenario.file:
            others.setdefault(edit.file, []).insert(0, edit)
        elif edit.new in before:
            before = before.replace(edit.new, edit.old, 1)
    for file, edits in others.items():
        yield file, "".join(edit.old for edit in edits), "".join(edit.new for edit in edits)
    yield scenario.file, before, scenario.text


def offset(text: str, at: Point) -> int:
    """Return the index of a point in `text`; a column beyond the line's end is its end."""
    lines = text.split("\n")
    if at.line >= len(lines):
        return len(text)
    return sum(len(line) + 1 for line in lines[: at.line]) + min(at.column, len(lines[at.line]))


def point(text: str, index: int) -> Point:
    """Return the point at an index of `text`."""
    return Point(text.count("\n", 0, index), index - (text.rfind("\n", 0, index) + 1))


def delta_chrf(before: str, candidate: str, expected: str) -> float:
    """Return how well a change agrees with the expected one, 0..100.

    Compares the changed lines alone: the chrF (Popovic 2015: n-grams of characters up to 6, beta 2; mean over
    the orders that occur) of what replaces the lines that differ from `before`.
    """
    return _chrf(_changed(before, candidate), _changed(before, expected))


def _changed(before: str, after: str) -> str:
    """Return the lines of `after` between the lines that both begin with and the lines that both end with."""
    new = after.splitlines()
    first, _, end = changed_lines(before.splitlines(), new)
    return "\n".join(new[first:end])


def _chrf(candidate: str, reference: str) -> float:
    scores = []
    for order in range(1, _CHRF_ORDER + 1):
        found, wanted = _ngrams(candidate, order), _ngrams(reference, order)
        if not found and not wanted:
            continue
        common = (found & wanted).total()
        precision = common / found.total() if found else 0.0
        recall = common / wanted.total() if wanted else 0.0
        weighted = _CHRF_BETA**2 * precision + recall
        scores.append((1 + _CHRF_BETA**2) * precision * recall / weighted if weighted else 0.0)
    # Nothing was to be changed, and nothing was.
    return 100.0 * sum(scores) / len(scores) if scores else 100.0


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[index : index + order] for index in range(len(text) - order + 1))


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Return the figures that `--json` prints.

    "score" is the mean of `delta_chrf` of the scenarios that call for an edit, as 0..1, where those without a
    suggestion count as 0; "shown" is the share of them with one. "quiet" is the share of the other scenarios
    in which nothing was suggested. A share is None if there are no such scenarios.
    """
    edits = [result for result in results if not result.silent]
    silent = [result for result in results if result.silent]
    return {
        "score": round(sum(one.delta_chrf * one.shown for one in edits) / len(edits) / 100, 4)
        if edits
        else None,
        "shown": round(sum(one.shown for one in edits) / len(edits), 4) if edits else None,
        "quiet": round(sum(not one.shown for one in silent) / len(silent), 4) if silent else None,
        "scenarios": len(results),
        "latency_ms": percentiles([one for result in results for one in result.latencies_ms], 50, 95),
        "results": [
            {"id": one.id, "silent": one.silent, "shown": one.shown, "delta_chrf": one.delta_chrf}
            for one in results
        ],
    }


def describe(summary: Mapping[str, Any]) -> str:
    """Return the summary as text."""
    rows = [
        f"{one['id']:44}"
        + (
            ("not silent" if one["shown"] else "silent, as it should be")
            if one["silent"]
            else f"{one['delta_chrf']:5.1f}"
            if one["shown"]
            else "    -"
        )
        for one in summary["results"]
    ]
    p50, p95 = summary["latency_ms"].values()

    def share(name: str) -> str:
        return "-" if summary[name] is None else f"{summary[name]:.1%}"

    score = "-" if summary["score"] is None else f"{summary['score']:.3f}"
    rows.append(
        f"{summary['scenarios']} scenarios with {summary['model']}: score {score}, shown {share('shown')}, "
        f"quiet {share('quiet')}; latency p50 {p50:.0f} ms, p95 {p95:.0f} ms"
    )
    return "\n".join(rows)
