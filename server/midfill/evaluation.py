"""Quality: whether the suggestions that a user would get make the tests pass.

Plays infilling tasks through the real pipeline, or through the model alone, puts each suggestion into
its program, runs the program's tests in a sandbox and counts. Results are kept as they come, so that a
run can be stopped and resumed, and two runs over the same tasks can be compared pair by pair.
"""

from __future__ import annotations

import asyncio
import difflib
import gzip
import json
import math
import os
import re
import resource
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from midfill.completer import Completer, Trigger
from midfill.documents import Document, Point, Snapshot
from midfill.engine import Engine, Request
from midfill.errors import MidfillError
from midfill.families import recognise_family
from midfill.settings import Settings

_TEST_S = 10.0
_CPU_S = 8
_FILE_BYTES = 1 << 20
_SUFFIXES = {"python": ".py", "javascript": ".js", "java": ".java"}
# One wrong Java import makes every task fail where that library is not installed.
_ABSENT_IMPORT = re.compile(r"^import org\.javatuples\.\*;\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Task:
    """A program with a hole and its tests.

    Attributes:
        id: "KIND/...".
        language: "python", "javascript" or "java".
        before, after: the program around the hole.
        truth: what was there.
        test: code that fails if the hole is filled wrongly.
        entry_point: what the test of a Python task is called with.
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

    def program(self, text: str) -> str:
        """The whole program, tests included, with `text` in the hole."""
        body = self.before + text + self.after
        if self.language == "python":
            return f"{body}\n{self.test}\ncheck({self.entry_point})\n"
        if self.language == "java":
            # The tests close the function and go on inside the class.
            body = re.sub(r"\}\s*\}\s*\Z", "", _ABSENT_IMPORT.sub("", body))
        return f"{body}\n{self.test}\n"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one task."""

    id: str
    text: str
    passed: bool
    exact: bool
    similarity: float
    reason: str | None
    latency_ms: float

    @property
    def kind(self) -> str:
        """The set that the task belongs to."""
        return self.id.partition("/")[0]


def read_tasks(path: Path) -> list[Task]:
    """Tasks of a .jsonl or .jsonl.gz file in the format of HumanEval-Infilling.

    Raises `MidfillError` naming the file and the line.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    tasks: list[Task] = []
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                tasks.append(_task(json.loads(line)))  # noqa: PERF401 - the error names how far it came
    except OSError as error:
        raise MidfillError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise MidfillError(f"{path}, line {len(tasks) + 1}: not an infilling task ({error!r}).") from error
    if not tasks:
        raise MidfillError(f"{path} has no tasks.")
    return tasks


def _task(row: Mapping[str, Any]) -> Task:
    language = {"js": "javascript"}.get(row.get("language", "python"), row.get("language", "python"))
    if language not in _SUFFIXES:
        raise ValueError(f"language {language!r}")
    after, truth = row["suffix"], row["canonical_solution"]
    if truth.endswith("\n"):
        # Whole lines are missing: in an editor the cursor stands on an empty line, not before the next one.
        after, truth = "\n" + after, truth[:-1]
    return Task(
        row["task_id"], language, row["prompt"], after, truth, row["test"], row.get("entry_point", "")
    )


def sample(tasks: Sequence[Task], limit: int) -> list[Task]:
    """At most `limit` tasks, evenly from each kind, always the same ones."""
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


class Filler:
    """Fills holes with a started engine: through the pipeline, or (`raw`) with the model alone."""

    def __init__(self, engine: Engine, settings: Settings, *, raw: bool) -> None:
        self._engine = engine
        self._settings = settings
        self._raw = raw
        self._completer = Completer(settings)
        self._completer.use(engine)

    async def fill(self, task: Task) -> tuple[str, str | None, float]:
        """The text for the hole, the reason if there is none, and the milliseconds it took."""
        if self._raw:
            return await self._fill_raw(task)
        document = Document.open(f"file:///eval/{task.id}", task.language, 0, task.before + task.after)
        line = task.before.count("\n")
        cursor = Point(line, len(task.before) - task.before.rfind("\n") - 1)
        answer = await self._completer.complete(Snapshot(document, cursor), Trigger.INVOKED)
        self._completer.forget(document.uri)
        return answer.text, answer.reason, answer.latency_ms

    async def _fill_raw(self, task: Task) -> tuple[str, str | None, float]:
        """Prefix, suffix, middle as in the family's paper; nothing stops the model but itself."""
        model = self._engine.model
        family = recognise_family(model, self._settings.family)[1]
        encode = model.tokenizer.encode
        before = encode(task.before)[-self._settings.prefix_tokens :]
        after = encode(task.after)[: self._settings.suffix_tokens]
        bos, prefix, suffix, middle = (
            [id_] if (id_ := model.tokenizer.token_id(name)) is not None else []
            for name in (family.bos, family.prefix, family.suffix, family.middle)
        )
        tokens_in = (*bos, *prefix, *before, *suffix, *after, *middle)
        request = Request(tokens_in, self._settings.max_new_tokens)
        text = ""
        async with aclosing(self._engine.generate(request)) as tokens:
            async for token in tokens:
                text += token.text
        stats = request.stats
        return text, None if text else "model-silent", (stats.ended_s - stats.submitted_s) * 1000


async def evaluate(
    tasks: Sequence[Task], filler: Filler, done: Mapping[str, Result], keep: Callable[[Result], None]
) -> list[Result]:
    """Fill and test every task that is not in `done`; `keep` gets each new result as it comes."""
    results = []
    for task in tasks:
        result = done.get(task.id)
        if result is None:
            text, reason, latency_ms = await filler.fill(task)
            passed = await run_tests(task, text)
            result = Result(
                task.id,
                text,
                passed,
                text.rstrip() == task.truth.rstrip(),
                difflib.SequenceMatcher(None, text.strip(), task.truth.strip(), autojunk=False).ratio(),
                reason,
                round(latency_ms, 1),
            )
            keep(result)
        results.append(result)
    return results


async def run_tests(task: Task, text: str) -> bool:
    """Whether the program with `text` in its hole passes its tests.

    It runs in a folder and a process group of its own, without network where the system allows it,
    with limits on time and file sizes, and nothing of our environment.
    """
    with tempfile.TemporaryDirectory(prefix="midfill-eval-") as folder:
        path = Path(folder) / f"Main{_SUFFIXES[task.language]}"
        path.write_text(task.program(text), encoding="utf-8", errors="replace")
        process = await asyncio.create_subprocess_exec(
            *_sandbox(),
            *_runner(task.language),
            str(path),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.environ.get("PATH", ""), "HOME": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
            preexec_fn=_limit,
        )
        try:
            return await asyncio.wait_for(process.wait(), _TEST_S) == 0
        except TimeoutError:
            return False
        finally:
            _end_group(process.pid)
            await process.wait()


def _runner(language: str) -> list[str]:
    if language == "python":
        return [sys.executable, "-I", "-S"]
    tool = {"javascript": "node", "java": "java"}[language]
    found = shutil.which(tool)
    if found is None:
        raise MidfillError(f"{language} tasks need `{tool}`, which is not on the PATH: install it.")
    return [found] if language == "javascript" else [found, "-ea", "-XX:TieredStopAtLevel=1"]


def _sandbox() -> list[str]:
    """A network namespace without a network, where `unshare` is to be had."""
    unshare = shutil.which("unshare")
    return [unshare, "--user", "--map-root-user", "--net", "--"] if unshare else []


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_group(process_id: int) -> None:
    try:
        os.killpg(process_id, 9)
    except ProcessLookupError:
        return


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Shares by kind and over all, as `--json` prints them."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.kind].append(result)
        groups["all"].append(result)

    def shares(of: Callable[[Result], float]) -> dict[str, float]:
        return {kind: round(sum(map(of, group)) / len(group), 4) for kind, group in groups.items()}

    latencies = sorted(result.latency_ms for result in results)
    return {
        "pass@1": shares(lambda result: result.passed),
        "exact": shares(lambda result: result.exact),
        "similarity": shares(lambda result: result.similarity),
        "silent": shares(lambda result: not result.text),
        "tasks": len(results),
        "latency_ms": {"p50": latencies[len(latencies) // 2], "p95": latencies[len(latencies) * 95 // 100]},
    }


def compare(ours: Sequence[Result], theirs: Mapping[str, Result]) -> dict[str, Any]:
    """Paired comparison with an earlier run: McNemar's exact test on the tasks that changed."""
    pairs = [(result, theirs[result.id]) for result in ours if result.id in theirs]
    better = sum(new.passed and not old.passed for new, old in pairs)
    worse = sum(old.passed and not new.passed for new, old in pairs)
    changed = better + worse
    tail = sum(math.comb(changed, k) for k in range(min(better, worse) + 1)) / 2**changed
    return {"tasks": len(pairs), "better": better, "worse": worse, "p": round(min(1.0, 2 * tail), 4)}


def read_results(path: Path) -> Iterator[Result]:
    """Results that `keep` wrote, one JSON object a line; a line cut short by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield Result(**json.loads(line))
        except (ValueError, TypeError):
            continue


def append_result(path: Path, result: Result) -> None:
    """Keep one result."""
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(asdict(result)) + "\n")
