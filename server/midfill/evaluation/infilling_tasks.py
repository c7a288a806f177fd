"""Infilling tasks: programs with a hole, in the formats of HumanEval-Infilling, SAFIM and DevBench."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midfill.errors import MidfillError
from midfill.evaluation import sandbox
from midfill.evaluation.fillers import Hole
from midfill.system.file_errors import why_unreadable

_LANGUAGES = {
    "python": "python",
    "js": "javascript",
    "javascript": "javascript",
    "typescript": "typescript",
    "java": "java",
    "cpp": "cpp",
    "csharp": "csharp",
    "c_sharp": "csharp",
}
_SUFFIXES = {
    "python": ".py",
    "javascript": ".js",
    "typescript": ".ts",
    "java": ".java",
    "cpp": ".cpp",
    "csharp": ".cs",
}
# An unused import of some Java tasks fails if that library is not installed.
_ABSENT_IMPORT = re.compile(r"^import org\.javatuples\.\*;\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Task:
    r"""A program with a hole, and its tests if it has any.

    Attributes:
        id: "KIND/...".
        language: LSP language identifier.
        before, after: the program around the hole.
        truth: the original text. Line ends are \n.
        test: code that fails if the hole is filled wrongly; "" for none.
        entry_point: argument of the test function of a Python task.
        io_tests: (input, right outputs) of runs of the program; () for none.
    """

    id: str
    language: str
    before: str
    after: str
    truth: str
    test: str = ""
    entry_point: str = ""
    io_tests: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def kind(self) -> str:
        """The set that the task belongs to."""
        return self.id.partition("/")[0]

    @property
    def hole(self) -> Hole:
        """The task as an editor would show it."""
        uri = f"file:///eval/{self.id}{_SUFFIXES[self.language]}"
        return Hole(uri, self.language, self.before, self.after)

    @property
    def tested(self) -> bool:
        """Whether the task has tests."""
        return bool(self.test or self.io_tests)

    async def passes(self, text: str) -> bool | None:
        """Return whether the tests pass with `text` in the hole, or None if there are none."""
        if self.io_tests:
            return await sandbox.prints(self.language, self.before + text + self.after, self.io_tests)
        return await sandbox.passes(self.language, self.program(text)) if self.test else None

    def program(self, text: str) -> str:
        """Return the whole program, tests included, with `text` in the hole."""
        body = self.before + text + self.after
        if self.language == "python":
            return f"{body}\n{self.test}\ncheck({self.entry_point})\n"
        if self.language == "java":
            # The tests close the function and continue inside the class.
            body = re.sub(r"\}\s*\}\s*\Z", "", _ABSENT_IMPORT.sub("", body))
        return f"{body}\n{self.test}\n"


def read_tasks(path: Path) -> list[Task]:
    """Read the tasks of a .jsonl or .jsonl.gz file.

    Each line is an object with task_id, prompt, suffix and canonical_solution; language, unless it is Python;
    and test and entry_point as in HumanEval-Infilling, or io_tests as in SAFIM, or neither.

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
    after, truth = row["suffix"], row["canonical_solution"].replace("\r\n", "\n")
    if truth.endswith("\n"):
        # Whole lines are missing: in an editor the cursor would be on an empty line, not before the next one.
        line_end = "\r\n" if row["canonical_solution"].endswith("\r\n") else "\n"
        after, truth = line_end + after, truth[:-1]
    return Task(
        row["task_id"],
        _LANGUAGES[language],
        row["prompt"],
        after,
        truth,
        row.get("test") or "",
        row.get("entry_point", ""),
        tuple((one["input"], tuple(one["output"])) for one in row.get("io_tests") or ()),
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
    """Return the tasks that have no tests or whose programs can be run here, and why languages are skipped.

    Raises `MidfillError` if no task remains.
    """
    reasons = {
        language: sandbox.missing(language) for language in {task.language for task in tasks if task.tested}
    }
    skipped = {language: why for language, why in reasons.items() if why is not None}
    left = [task for task in tasks if not task.tested or task.language not in skipped]
    if not left:
        raise MidfillError("No task can be run here: " + " ".join(skipped.values()))
    return left, skipped
