"""Infilling benchmarks: the share of suggestions with which a program's tests pass (pass@1), and others.

Puts each suggestion into its program and runs the program's tests, if it has any, in the `sandbox`. Two runs
over the same tasks can be compared in pairs.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from midfill.completion.answer import Trigger
from midfill.evaluation.fillers import Filler
from midfill.evaluation.infilling_tasks import Task
from midfill.evaluation.records import Records
from midfill.evaluation.statistics import mcnemar
from midfill.fim.templates import FAMILIES
from midfill.system.measure import percentiles

_SHARES = {
    "pass@1": "pass@1",
    "pass@1_when_cut": "pass when cut",
    "exact": "exact",
    "exact_when_cut": "exact when cut",
    "line_0": "line 0",
    "similarity": "similarity",
    "empty": "empty",
}
"""The names of the shares in JSON, and as headings of the table."""

_SENTINELS = sorted({name for family in FAMILIES.values() for name in family.never_text})


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one task.

    Attributes:
        id: of the task.
        language: of the task.
        text: the suggestion.
        passed: whether the program's tests pass; None if it has none.
        exact: whether the text equals the original, ignoring blanks at its end.
        line_0: whether its first line that is not blank equals the one of the original, stripped.
        similarity: 0..1 to the original, by Ratcliff and Obershelp.
        sentinel: whether the text contains a control token's name.
        repeats_next_line: whether the text repeats the next line below the hole, and the original does not.
        reason: why there is no text.
        latency_ms: time from request to answer.
        passed_when_cut: whether some prefix of the text passes, as perfect stop rules would cut it; None if
            that was not tested.
        exact_when_cut: whether the text begins with the original; None if that was not tested.
    """

    id: str
    language: str
    text: str
    passed: bool | None
    exact: bool
    line_0: bool
    similarity: float
    sentinel: bool
    repeats_next_line: bool
    reason: str | None
    latency_ms: float
    passed_when_cut: bool | None = None
    exact_when_cut: bool | None = None

    @property
    def kind(self) -> str:
        """The set that the task belongs to."""
        return self.id.partition("/")[0]


async def evaluate(
    tasks: Sequence[Task],
    filler: Filler,
    records: Records,
    tell: Callable[[float], None],
    *,
    cut: bool = False,
) -> None:
    """Fill and test every task that `records` does not have yet; `tell` is called with the share done.

    With `cut`, prefixes of each text that fails are tested too.
    """
    for number, task in enumerate(tasks):
        if task.id not in records.rows:
            filled = await filler.fill(task.hole, Trigger.INVOKED)
            text = filled.text
            passed = await task.passes(text)
            similarity = difflib.SequenceMatcher(
                None, text.strip(), task.truth.strip(), autojunk=False
            ).ratio()
            result = Result(
                task.id,
                task.language,
                text,
                passed,
                text.rstrip() == task.truth.rstrip(),
                _first_line(text) == _first_line(task.truth),
                round(similarity, 4),
                any(sentinel in text for sentinel in _SENTINELS),
                repeats_next_line(task, text),
                filled.reason,
                round(filled.latency_ms, 1),
                (passed or await _passes_when_cut(task, text)) if cut and task.tested else None,
                text.startswith(task.truth.rstrip()) if cut else None,
            )
            records.keep(asdict(result))
        tell((number + 1) / len(tasks))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip()


async def _passes_when_cut(task: Task, text: str) -> bool:
    """Return whether the text passes if cut to the original's length, or at the end of one of its lines."""
    lines = text.split("\n")
    cuts = ["\n".join(lines[: count + 1]) for count in range(len(lines) - 1)]
    for candidate in dict.fromkeys([text[: len(task.truth)], *cuts]):
        if candidate != text and await task.passes(candidate):
            return True
    return False


def repeats_next_line(task: Task, text: str) -> bool:
    """Return whether the text repeats the next line below the hole, and the original does not."""
    below = task.after.split("\n")[1:]
    following = next((line.rstrip() for line in below if line.strip()), None)
    if following is None:
        return False

    def says(middle: str) -> bool:
        first, *rest = middle.split("\n")
        rows = [task.hole.line_before + first, *rest]
        # The last row continues with the text after the cursor.
        rows[-1] += task.after.split("\n")[0]
        return following in {row.rstrip() for row in rows}

    return says(text) and not says(task.truth)


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Return shares and reasons by kind, by language where a kind has several, and overall; see `--json`.

    A share is None where nothing was measured, such as `pass@1` of tasks without tests.
    """
    groups = _groups(results)
    measured: dict[str, Callable[[Result], float | None]] = {
        "pass@1": lambda result: result.passed,
        "pass@1_when_cut": lambda result: result.passed_when_cut,
        "exact": lambda result: result.exact,
        "exact_when_cut": lambda result: result.exact_when_cut,
        "line_0": lambda result: result.line_0,
        "similarity": lambda result: result.similarity,
        "empty": lambda result: not result.text,
    }
    shares = {
        name: {group: _share(map(of, found)) for group, found in groups.items()}
        for name, of in measured.items()
    }
    for name in ("pass@1_when_cut", "exact_when_cut"):
        if shares[name]["all"] is None:
            del shares[name]
    reasons = {group: Counter(one.reason for one in found if not one.text) for group, found in groups.items()}
    return {
        **shares,
        "empty_reasons": {group: dict(found.most_common()) for group, found in reasons.items() if found},
        "tasks": len(results),
        "sentinels": sum(result.sentinel for result in results),
        "repeat_next_line": sum(result.repeats_next_line for result in results),
        "latency_ms": percentiles([result.latency_ms for result in results], 50, 95),
    }


def _groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    kinds: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        kinds[result.kind][result.language].append(result)
    groups: dict[str, list[Result]] = {}
    for kind, languages in kinds.items():
        groups[kind] = [result for found in languages.values() for result in found]
        if len(languages) > 1:
            groups |= {f"{kind}, {language}": found for language, found in languages.items()}
    return {**groups, "all": list(results)}


def _share(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def compare(ours: Sequence[Result], theirs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compare with an earlier run's rows in pairs, by McNemar's exact test on the tasks that changed.

    Returns the comparison of the tests that pass, and of the first lines that are right under "line_0".
    """
    return {**_compare(ours, theirs, "passed"), "line_0": _compare(ours, theirs, "line_0")}


def _compare(ours: Sequence[Result], theirs: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    pairs = [
        (new, old)
        for result in ours
        if (new := getattr(result, name)) is not None
        and (old := theirs.get(result.id, {}).get(name)) is not None
    ]
    better = sum(new and not old for new, old in pairs)
    worse = sum(old and not new for new, old in pairs)
    return {"tasks": len(pairs), "better": better, "worse": worse, "p": mcnemar(better, worse)}


def describe(summary: Mapping[str, Any]) -> str:
    """Return the summary as text."""
    names = [name for name in _SHARES if name in summary]

    def cell(share: float | None) -> str:
        return f"{'-':>14}" if share is None else f"{share:14.1%}"

    rows = [f"{'':26}" + "".join(f"{_SHARES[name]:>14}" for name in names)]
    rows += [
        f"{group:26}" + "".join(cell(summary[name][group]) for name in names) for group in summary["exact"]
    ]
    p50, p95 = summary["latency_ms"].values()
    rows.append(
        f"{summary['tasks']} tasks with {summary['model']}; latency p50 {p50:.0f} ms, p95 {p95:.0f} ms; "
        f"{summary['sentinels']} with a sentinel, {summary['repeat_next_line']} repeat the next line"
    )
    rows += [
        f"empty, {group}: " + ", ".join(f"{reason} {count}" for reason, count in reasons.items())
        for group, reasons in summary["empty_reasons"].items()
    ]
    rows += [f"skipped, {language}: {why}" for language, why in summary["skipped"].items()]
    if summary["network"]:
        rows.append("note: programs have network access, because `unshare` does not work here")
    if "compared" in summary:
        told = "compared, {name}: {better} better, {worse} worse of {tasks}, p = {p}"
        rows.append(told.format(name="pass@1", **summary["compared"]))
        rows.append(told.format(name="line 0", **summary["compared"]["line_0"]))
    return "\n".join(rows)
