"""Infilling benchmarks: the share of suggestions with which a program's tests pass (pass@1).

Puts each suggestion into its program and runs the program's tests in the `sandbox`. Two runs over the same
tasks can be compared in pairs.
"""

from __future__ import annotations

import difflib
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from midfill.completion.answer import Trigger
from midfill.errors import MidfillError
from midfill.evaluation import sandbox
from midfill.evaluation.fillers import Filler, Hole
from midfill.evaluation.records import Records
from midfill.evaluation.statistics import mcnemar
from midfill.fim.templates import FAMILIES
from midfill.system.file_errors import why_unreadable
from midfill.system.measure import percentiles

_SHARES = {
    "pass@1": "pass@1",
    "pass@1_when_cut": "pass when cut",
    "exact": "exact",
    "similarity": "similarity",
    "silent": "silent",
}
_SENTINELS = sorted({name for family in FAMILIES.values() for name in family.never_text})
_LANGUAGES = {"python": "python", "js": "javascript", "javascript": "javascript", "java": "java"}
_SUFFIXES = {"python": ".py", "javascript": ".js", "java": ".java"}
# An unused import of some Java tasks fails if that library is not installed.
_ABSENT_IMPORT = re.compile(r"^import org\.javatuples\.\*;\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Task:
    """A program with a hole and its tests.

    Attributes:
        id: "KIND/...".
        language: "python", "javascript" or "java".
        before, after: the program around the hole.
        truth: the original text.
        test: code that fails if the hole is filled wrongly.
        entry_point: argument of the test function of a Python task.
    """

    id: str
    language: str
    before: str
    after: str
    truth: str
    test: str
    entry_point: str = ""

    @property
    def kind(self) -> str:
        """The set that the task belongs to."""
        return self.id.partition("/")[0]

    @property
    def hole(self) -> Hole:
        """The task as an editor would show it."""
        uri = f"file:///eval/{self.id}{_SUFFIXES[self.language]}"
        return Hole(uri, self.language, self.before, self.after)

    def program(self, text: str) -> str:
        """Return the whole program, tests included, with `text` in the hole."""
        body = self.before + text + self.after
        if self.language == "python":
            return f"{body}\n{self.test}\ncheck({self.entry_point})\n"
        if self.language == "java":
            # The tests close the function and continue inside the class.
            body = re.sub(r"\}\s*\}\s*\Z", "", _ABSENT_IMPORT.sub("", body))
        return f"{body}\n{self.test}\n"


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one task.

    Attributes:
        id: of the task.
        text: the suggestion.
        passed: whether the program's tests pass.
        exact: whether the text equals the original, ignoring blanks at its end.
        similarity: 0..1 to the original, by Ratcliff and Obershelp.
        sentinel: whether the text contains a control token's name.
        repeats_next_line: whether the text repeats the next line below the hole, and the original does not.
        reason: why there is no text.
        latency_ms: time from request to answer.
        passed_when_cut: whether some prefix of the text passes, as perfect stop rules would cut it; None if
            that was not tested.
    """

    id: str
    text: str
    passed: bool
    exact: bool
    similarity: float
    sentinel: bool
    repeats_next_line: bool
    reason: str | None
    latency_ms: float
    passed_when_cut: bool | None = None

    @property
    def kind(self) -> str:
        """The set that the task belongs to."""
        return self.id.partition("/")[0]


def read_tasks(path: Path) -> list[Task]:
    """Read the tasks of a .jsonl or .jsonl.gz file in the format of HumanEval-Infilling.

    Raises `MidfillError` naming file and line.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    tasks: list[Task] = []
    try:
        with opened(path, "rt", encoding="utf-8-sig") as lines:
            for line in lines:
                tasks.append(_task(json.loads(line)))  # noqa: PERF401 - the error names how far it came
    except OSError as error:
        raise MidfillError(f"Cannot read {path}: {why_unreadable(error)}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MidfillError(
            f"{path}, line {len(tasks) + 1}: this is not an infilling task ({error!r})."
        ) from error
    if not tasks:
        raise MidfillError(f"{path} has no tasks.")
    return tasks


def _task(row: Mapping[str, Any]) -> Task:
    language = row.get("language", "python")
    if language not in _LANGUAGES:
        raise ValueError(f"language {language!r}")
    after, truth = row["suffix"], row["canonical_solution"]
    if truth.endswith("\n"):
        # Whole lines are missing: in an editor the cursor would be on an empty line, not before the next one.
        after, truth = "\n" + after, truth[:-1]
    return Task(
        row["task_id"],
        _LANGUAGES[language],
        row["prompt"],
        after,
        truth,
        row["test"],
        row.get("entry_point", ""),
    )


def sample(tasks: Sequence[Task], limit: int) -> list[Task]:
    """Return at most `limit` tasks, evenly from each kind, always the same ones."""
    kinds: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        kinds[task.kind].append(task)
    if limit >= len(tasks):
        return list(tasks)
    picked = []
    for group in kinds.values():
        count = max(1, limit * len(group) // len(tasks))
        picked += [group[index * len(group) // count] for index in range(count)]
    return picked


def runnable(tasks: Sequence[Task]) -> tuple[list[Task], dict[str, str]]:
    """Return the tasks whose programs can be run here, and the reasons for skipped languages.

    Raises `MidfillError` if no task remains.
    """
    reasons = {language: sandbox.missing(language) for language in {task.language for task in tasks}}
    skipped = {language: why for language, why in reasons.items() if why is not None}
    left = [task for task in tasks if task.language not in skipped]
    if not left:
        raise MidfillError("No task can be run here: " + " ".join(skipped.values()))
    return left, skipped


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
            passed = await sandbox.passes(task.language, task.program(text))
            similarity = difflib.SequenceMatcher(
                None, text.strip(), task.truth.strip(), autojunk=False
            ).ratio()
            result = Result(
                task.id,
                text,
                passed,
                text.rstrip() == task.truth.rstrip(),
                round(similarity, 4),
                any(sentinel in text for sentinel in _SENTINELS),
                repeats_next_line(task, text),
                filled.reason,
                round(filled.latency_ms, 1),
                (passed or await _passes_when_cut(task, text)) if cut else None,
            )
            records.keep(asdict(result))
        tell((number + 1) / len(tasks))


async def _passes_when_cut(task: Task, text: str) -> bool:
    """Return whether the text passes if cut to the original's length, or at the end of one of its lines."""
    lines = text.split("\n")
    cuts = ["\n".join(lines[: count + 1]) for count in range(len(lines) - 1)]
    for candidate in dict.fromkeys([text[: len(task.truth)], *cuts]):
        if candidate != text and await sandbox.passes(task.language, task.program(candidate)):
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
    """Return shares by kind and overall, as `--json` prints them."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.kind].append(result)
    groups["all"] = list(results)

    def shares(of: Callable[[Result], float]) -> dict[str, float]:
        return {kind: round(sum(map(of, group)) / len(group), 4) for kind, group in groups.items()}

    cut = [result.passed_when_cut is not None for result in results]
    return {
        "pass@1": shares(lambda result: result.passed),
        **({"pass@1_when_cut": shares(lambda result: bool(result.passed_when_cut))} if all(cut) else {}),
        "exact": shares(lambda result: result.exact),
        "similarity": shares(lambda result: result.similarity),
        "silent": shares(lambda result: not result.text),
        "tasks": len(results),
        "sentinels": sum(result.sentinel for result in results),
        "repeat_next_line": sum(result.repeats_next_line for result in results),
        "latency_ms": percentiles([result.latency_ms for result in results], 50, 95),
    }


def compare(ours: Sequence[Result], theirs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compare with an earlier run's rows in pairs, by McNemar's exact test on the tasks that changed."""
    pairs = [(result.passed, bool(theirs[result.id]["passed"])) for result in ours if result.id in theirs]
    better = sum(new and not old for new, old in pairs)
    worse = sum(old and not new for new, old in pairs)
    return {"tasks": len(pairs), "better": better, "worse": worse, "p": mcnemar(better, worse)}


def describe(summary: Mapping[str, Any]) -> str:
    """Return the summary as text."""
    names = [name for name in _SHARES if name in summary]
    rows = [f"{'':22}" + "".join(f"{_SHARES[name]:>14}" for name in names)]
    rows += [
        f"{kind:22}" + "".join(f"{summary[name][kind]:14.1%}" for name in names) for kind in summary["pass@1"]
    ]
    p50, p95 = summary["latency_ms"].values()
    rows.append(
        f"{summary['tasks']} tasks with {summary['model']}; latency p50 {p50:.0f} ms, p95 {p95:.0f} ms; "
        f"{summary['sentinels']} with a sentinel, {summary['repeat_next_line']} repeat the next line"
    )
    rows += [f"skipped, {language}: {why}" for language, why in summary["skipped"].items()]
    if summary["network"]:
        rows.append("note: programs have network access, because `unshare` does not work here")
    if "compared" in summary:
        rows.append(
            "compared: {better} better, {worse} worse of {tasks}, p = {p}".format(**summary["compared"])
        )
    return "\n".join(rows)
