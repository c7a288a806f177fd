"""Soak test: a long session in fast motion, to check that the server does not grow and answers everything.

A virtual user works on a few documents: types, waits for suggestions or types on, accepts, deletes, edits at
many cursors, opens, closes and switches documents, changes settings, requests explanations. The server is the
real one, over stdio. Its memory, threads and descriptors are sampled; its documents are compared with the
user's copies, which are lines edited by plain slicing. The same seed gives the same session.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from midfill.engine.api import Progress
from midfill.lsp.client import SERVE_COMMAND, Client, ServerError

SCRIPTED = "scripted"
"""A value of `--engine` beside those of the setting: a script instead of a model."""

_NAME = "midfill-soak"
_NUM_DOCUMENTS = 8
_MAX_LINES = 400
_NUM_SAMPLES = 120
_MAX_WAITING = 4
_PATIENCE_S = 60.0
_MAX_NEW_THREADS = 2
_MAX_NEW_DESCRIPTORS = 4
_CANCELLED = -32800
_SUFFIXES = {".py": "python", ".ts": "typescript", ".go": "go", ".md": "markdown"}
_WORDS = (
    "total",
    "values",
    "item",
    "naïve",
    "größe",
    "print(",
    "return ",
    "if x:",
    " = ",
    "()",
    "[0]",
    "# ",
    "漢",
)
_RULES = [
    {"after": "\n", "text": "for item in items:\n    use(item)\n", "logprob": -0.05},
    {"after": " = ", "text": "compute(values)\n", "logprob": -0.05},
    {"after": "(", "text": "item)\n", "logprob": -0.05},
    {"text": "value + 1\n", "logprob": -0.05},
]


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """Parameters of a soak test.

    Attributes:
        num_operations, minutes: the test ends with the first that is reached; None is no limit.
        seed: seed of the session.
        max_growth_mb: maximum growth of resident memory after the first third.
    """

    num_operations: int | None
    minutes: float | None
    seed: int = 0
    max_growth_mb: float = 10.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Resources of the server's process at one time; `share` is the part of the session that was over."""

    share: float
    resident_mb: float
    num_threads: int
    num_descriptors: int


@dataclass(slots=True)
class _Copy:
    """The user's copy of a document."""

    uri: str
    language: str
    lines: list[str]
    version: int = 1
    line: int = 0
    column: int = 0

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def cursor(self) -> dict[str, int]:
        return {"line": self.line, "character": _units(self.lines[self.line][: self.column])}

    def replace(self, start: tuple[int, int], end: tuple[int, int], text: str) -> dict[str, Any]:
        """Replace the text between two positions (line, column); return the change for LSP.

        The cursor is after the new text.
        """
        places = [
            {"line": line, "character": _units(self.lines[line][:column])} for line, column in (start, end)
        ]
        before, after = self.lines[start[0]][: start[1]], self.lines[end[0]][end[1] :]
        new = (before + text + after).split("\n")
        self.lines[start[0] : end[0] + 1] = new
        self.line = start[0] + text.count("\n")
        self.column = len(self.lines[self.line]) - len(after)
        return {"range": {"start": places[0], "end": places[1]}, "text": text}


@dataclass(slots=True)
class _User:
    """The virtual user, with the results so far."""

    client: Client
    chance: random.Random
    folder: Path
    copies: list[_Copy] = field(default_factory=list)
    current: int = 0
    shown: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    num_passing: int = 0
    waiting: deque[tuple[int, asyncio.Future[Any]]] = field(default_factory=deque)

    @property
    def copy(self) -> _Copy:
        return self.copies[self.current]

    async def work(self) -> None:
        """Do one random operation."""
        operations = list(_OPERATIONS)
        [operation] = self.chance.choices(operations, [_OPERATIONS[one] for one in operations])
        await operation(self)
        self.counts["operations"] += 1
        while len(self.waiting) > _MAX_WAITING:
            await self.receive()

    async def type(self) -> None:
        """Type a key and wait for a suggestion."""
        self._type()
        await self._ask(waits=True)

    async def type_on(self) -> None:
        """Type a key, and cancel the request."""
        self._type()
        await self._ask(waits=False)

    async def accept(self) -> None:
        """Accept the last suggestion, if it is still shown."""
        self._insert(self.shown or "x = 1\n")
        self.shown = ""

    async def delete(self) -> None:
        """Delete some of the characters before the cursor."""
        copy = self.copy
        start = max(0, copy.column - self.chance.randint(1, 8))
        self._change([copy.replace((copy.line, start), (copy.line, copy.column), "")])

    async def edit_at_many_cursors(self) -> None:
        """Insert, delete or replace in twenty lines at once."""
        copy = self.copy
        text = self.chance.choice(["()", "", ", x", "\n"])
        rows = sorted(self.chance.sample(range(len(copy.lines)), min(20, len(copy.lines))), reverse=True)
        self._change([copy.replace((row, 0), (row, min(2, len(copy.lines[row]))), text) for row in rows])

    async def switch(self) -> None:
        """Go to another document, or to another line."""
        self.current = self.chance.randrange(len(self.copies))
        self._jump()

    async def close_and_open(self) -> None:
        """Close a document, and open it again."""
        self.close(self.copy)
        self.copy.version = 1
        self.open(self.copy)

    async def pass_by(self) -> None:
        """Open a new document, type into it, and close it for good."""
        self.num_passing += 1
        uri = (self.folder / f"passing_{self.num_passing}.py").as_uri()
        passing = _Copy(uri, "python", [*self.copy.lines[:40], "x = "])
        self.open(passing)
        before, self.current = self.current, len(self.copies)
        self.copies.append(passing)
        self._jump()
        self._insert("y")
        await self._ask(waits=True)
        await self._compare(passing)
        self.close(self.copies.pop())
        self.current, self.shown = before, ""

    async def configure(self) -> None:
        """Change settings."""
        eagerness = self.chance.choice(["low", "medium", "high", "always"])
        settings = {"eagerness": eagerness, "prefetch": self.chance.random() < 0.5}
        self.client.notify("workspace/didChangeConfiguration", {"settings": {"midfill": settings}})

    async def ask_for_popup(self) -> None:
        """Request the suggestion as an item of the popup."""
        self._send("textDocument/completion", self._here())

    async def ask_why(self) -> None:
        """Request an explanation of the last answer."""
        params = {"textDocument": {"uri": self.copy.uri}, "text": self.chance.random() < 0.5}
        self._send("midfill/explain", params)

    async def ask_for_costs(self) -> None:
        """Request the costs of the answers."""
        self._send("midfill/costs", {"after": 0})

    def open(self, copy: _Copy) -> None:
        """Open a document."""
        item = {"uri": copy.uri, "languageId": copy.language, "version": copy.version, "text": copy.text}
        self.client.notify("textDocument/didOpen", {"textDocument": item})

    def close(self, copy: _Copy) -> None:
        """Close a document."""
        self.client.notify("textDocument/didClose", {"textDocument": {"uri": copy.uri}})

    def _type(self) -> None:
        word = self.chance.choice(_WORDS)
        self._insert("\n" if self.chance.random() < 0.06 else self.chance.choice(word))
        if len(self.copy.lines) > _MAX_LINES:
            self._change([self.copy.replace((0, 0), (_MAX_LINES // 2, 0), "")])
            self._jump()

    def _insert(self, text: str) -> None:
        here = (self.copy.line, self.copy.column)
        self._change([self.copy.replace(here, here, text)])

    def _jump(self) -> None:
        self.copy.line = self.chance.randrange(len(self.copy.lines))
        self.copy.column = len(self.copy.lines[self.copy.line])
        self.shown = ""

    def _change(self, changes: list[dict[str, Any]]) -> None:
        self.copy.version += 1
        document = {"uri": self.copy.uri, "version": self.copy.version}
        self.client.notify("textDocument/didChange", {"textDocument": document, "contentChanges": changes})

    async def _ask(self, *, waits: bool) -> None:
        """Request a suggestion, and wait for it or cancel it."""
        kind = 1 if self.chance.random() < 0.1 else 2
        self._send("textDocument/inlineCompletion", self._here() | {"context": {"triggerKind": kind}})
        id_, future = self.waiting[-1]
        if not waits:
            self.client.cancel(id_)
            return
        while future in [one for _, one in self.waiting]:
            result = await self.receive()
        self.shown = result["items"][0]["insertText"] if result and result["items"] else ""

    def _here(self) -> dict[str, Any]:
        return {"textDocument": {"uri": self.copy.uri}, "position": self.copy.cursor}

    def _send(self, method: str, params: Any) -> None:
        self.waiting.append(self.client.send_request(method, params))
        self.counts["requests"] += 1

    async def receive(self) -> Any:
        """Wait for the answer to the oldest request; return it, or None for an error or a timeout."""
        _, future = self.waiting.popleft()
        try:
            return await asyncio.wait_for(asyncio.shield(future), _PATIENCE_S)
        except ServerError as error:
            if error.code == 0:
                raise
            self.counts["cancelled" if error.code == _CANCELLED else "errors"] += 1
        except TimeoutError:
            self.counts["unanswered"] += 1
        return None

    async def _compare(self, copy: _Copy) -> None:
        self.counts["compared"] += 1
        params = {"textDocument": {"uri": copy.uri}}
        result = await self.client.request("midfill/documentText", params)
        self.counts["differing"] += result["text"] != copy.text

    async def settle(self) -> None:
        """Wait for every answer, and compare every document."""
        while self.waiting:
            await self.receive()
        for copy in self.copies:
            await self._compare(copy)


# Weights of the operations, per thousand.
_OPERATIONS: dict[Callable[[_User], Awaitable[None]], int] = {
    _User.type: 560,
    _User.type_on: 180,
    _User.accept: 60,
    _User.delete: 50,
    _User.switch: 50,
    _User.ask_for_popup: 30,
    _User.ask_why: 25,
    _User.close_and_open: 15,
    _User.pass_by: 12,
    _User.edit_at_many_cursors: 10,
    _User.configure: 6,
    _User.ask_for_costs: 2,
}


async def soak(
    plan: SoakPlan, engine: str | None, options: dict[str, Any], report: Progress
) -> dict[str, Any]:
    """Run a soak test; return the result as JSON. `engine` is the server's; None is that of the settings.

    Raises `MidfillError` if the model cannot be loaded, `ServerError` if the server ends.
    """
    with tempfile.TemporaryDirectory(prefix="midfill-soak-") as name:
        folder = Path(name)
        chosen = engine
        if engine == SCRIPTED:
            script = folder / "script.json"
            script.write_text(json.dumps({"rules": _RULES}), encoding="utf-8")
            chosen = f"scripted:{script}"
        command = [*SERVE_COMMAND, *(["--engine", chosen] if chosen is not None else [])]
        # Count acceptances as in real use, but in a temporary folder: they are not the user's.
        client = await Client.start(command, env={**os.environ, "MIDFILL_STATE": str(folder / "state")})
        try:
            workspace = folder / "work"
            workspace.mkdir()
            chance = random.Random(plan.seed)
            user = _User(client, chance, workspace, _documents(workspace, chance))
            await client.load(options, lambda message: report(message, None), name=_NAME, folder=workspace)
            for copy in user.copies:
                user.open(copy)
            samples, seconds = await _play(user, plan, report)
            await user.settle()
        finally:
            status = await client.close()
    counts = user.counts
    return {
        "benchmark": "soak",
        "engine": engine,
        "seed": plan.seed,
        "operations": counts["operations"],
        "seconds": round(seconds, 1),
        "requests": counts["requests"],
        "cancelled": counts["cancelled"],
        "errors": counts["errors"],
        "unanswered": counts["unanswered"],
        "compared": counts["compared"],
        "differing": counts["differing"],
        "exit_status": status,
        **evaluate(samples, plan.max_growth_mb, counts, status),
    }


def _documents(folder: Path, chance: random.Random) -> list[_Copy]:
    copies = []
    for number in range(_NUM_DOCUMENTS):
        suffix, language = list(_SUFFIXES.items())[number % len(_SUFFIXES)]
        path = folder / f"document_{number}{suffix}"
        lines = [f"value_{number}_{line} = compute({chance.randint(0, 999)})" for line in range(120)]
        path.write_text("\n".join(lines), encoding="utf-8")
        copies.append(_Copy(path.as_uri(), language, lines))
    return copies


async def _play(user: _User, plan: SoakPlan, report: Progress) -> tuple[list[Sample], float]:
    process = psutil.Process(user.client.process.pid)
    samples: list[Sample] = []
    begun = time.monotonic()
    done = 0
    share = 0.0
    while share < 1:
        await user.work()
        done += 1
        passed = time.monotonic() - begun
        share = max(
            done / plan.num_operations if plan.num_operations else 0.0,
            passed / (60 * plan.minutes) if plan.minutes else 0.0,
        )
        if share * _NUM_SAMPLES >= len(samples):
            samples.append(_sample(process, share))
            report(f"{done:,} operations, {samples[-1].resident_mb:.0f} MB", min(share, 1.0))
    return samples, time.monotonic() - begun


def _sample(process: psutil.Process, share: float) -> Sample:
    with process.oneshot():
        # Windows calls them handles.
        count = getattr(process, "num_fds" if sys.platform != "win32" else "num_handles")
        return Sample(share, process.memory_info().rss / 1e6, process.num_threads(), count())


def evaluate(
    samples: list[Sample], max_growth_mb: float, counts: Counter[str], status: int = 0
) -> dict[str, Any]:
    """Return the growth from the end of the first third to the end, and all faults, as JSON.

    Both values are medians over a tenth of the session, since memory fluctuates.
    """
    settled = [one for one in samples if 1 / 3 <= one.share < 1 / 3 + 0.1]
    last = [one for one in samples if one.share >= 0.9]

    def growth(value: Callable[[Sample], float]) -> float:
        return statistics.median(map(value, last)) - statistics.median(map(value, settled))

    resident = growth(lambda one: one.resident_mb)
    threads = growth(lambda one: one.num_threads)
    descriptors = growth(lambda one: one.num_descriptors)
    wrong = [
        *([f"Memory grew by {resident:.1f} MB."] if resident > max_growth_mb else []),
        *([f"Threads grew by {threads:g}."] if threads > _MAX_NEW_THREADS else []),
        *([f"Descriptors grew by {descriptors:g}."] if descriptors > _MAX_NEW_DESCRIPTORS else []),
        *(f"{counts[name]} {what}." for name, what in _FAULTS.items() if counts[name]),
        *([f"The server ended with status {status}."] if status else []),
    ]
    return {
        "resident_mb": {
            "after_a_third": round(statistics.median(one.resident_mb for one in settled), 1),
            "at_the_end": round(statistics.median(one.resident_mb for one in last), 1),
            "most": round(max(one.resident_mb for one in samples), 1),
            "growth": round(resident, 1),
            "allowed": max_growth_mb,
        },
        "threads": {"most": max(one.num_threads for one in samples), "growth": threads},
        "descriptors": {"most": max(one.num_descriptors for one in samples), "growth": descriptors},
        "wrong": wrong,
    }


_FAULTS = {
    "unanswered": "requests were not answered",
    "errors": "requests were answered with an error",
    "differing": "documents differed from the user's copy",
}


def table(result: dict[str, Any]) -> str:
    """Return the result as text."""
    resident, threads, descriptors = (result[name] for name in ("resident_mb", "threads", "descriptors"))
    lines = [
        "{operations:,} operations in {seconds:.0f} s".format(**result),
        "requests     {requests:,}, of which {cancelled:,} cancelled, {unanswered} not answered, "
        "{errors} errors".format(**result),
        "documents    compared {compared:,} times, {differing} differed".format(**result),
        "memory       {after_a_third:.0f} MB after a third, {at_the_end:.0f} MB at the end, "
        "peak {most:.0f} MB; grew by {growth:.1f} MB (limit: {allowed:g} MB)".format(**resident),
        "threads      maximum {most}, grew by {growth:g}".format(**threads),
        "descriptors  maximum {most}, grew by {growth:g}".format(**descriptors),
        *result["wrong"],
    ]
    return "\n".join(lines)


def _units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2
