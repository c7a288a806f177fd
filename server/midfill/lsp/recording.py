"""Sessions on file: `midfill serve --record` writes one, `midfill replay` plays it against a fresh server.

A recording is a file of JSON lines: a header, then every message with its time and its sender. It holds
source text, so it is only made when asked for, and only its owner can read it. A replay sends what
the editor sent, in the same order to the answers, and compares what comes back: so a user's bug
report becomes a test.

The recorder runs on the server's event loop, the replay on one of its own.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import os
import shlex
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from midfill import __version__
from midfill.errors import MidfillError
from midfill.lsp.client import SERVE_COMMAND, read_message, to_frame
from midfill.lsp.messages import OWN_CLIENT
from midfill.system import text_files as textfiles
from midfill.system.json_files import parse_json
from midfill.text.characters import escaped

_LOG = logging.getLogger(__name__)

_FORMAT = 1
_WARNING = "This file contains the source text of your editor session. Look it through before you share it."
_MAX_FILES = 1000
_MAX_DEPTH = 100
# A model may take long to be loaded; past this, the replay goes on and reports what is missing.
_PATIENCE_S = 120.0
_END_S = 5.0
# Until the model has been loaded, their answers depend on how long that takes: they are not compared.
_NEED_MODEL = {"textDocument/inlineCompletion", "textDocument/completion", "midfill/explain"}
# Different each time, and no difference in what the user sees.
_VOLATILE = {"latencyMs", "serverInfo", "reusedTokens", "stages", "command"}


class Recorder:
    """Writes one session. What cannot be written is said once; the server goes on."""

    def __init__(self, path: Path) -> None:
        path, self._file = _create(path)
        _LOG.warning("recording the session, source text included: %s", path)
        self._begun = time.monotonic()
        self._write(
            {
                "midfillRecording": _FORMAT,
                "warning": _WARNING,
                "version": __version__,
                "begun": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            }
        )

    def note(self, sender: str, body: bytes) -> None:
        """Write a message down. `sender` is "client" or "server"."""
        line: dict[str, Any] = {"t": round(time.monotonic() - self._begun, 6), "from": sender}
        try:
            line["message"] = json.loads(body)
        except (ValueError, RecursionError):
            line["bytes"] = body.decode("latin-1")
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            # Line by line: the last lines before a crash are those that matter.
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._file.flush()
        except (OSError, RecursionError) as error:
            _LOG.warning("the recording ends here: %s", type(error).__name__)
            self._file = None


def _create(path: Path) -> tuple[Path, TextIO | None]:
    """A new file that only its owner can read; an older recording of that name is kept."""
    for number in range(1, _MAX_FILES):
        name = path if number == 1 else path.with_name(f"{path.name}.{number}")
        try:
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue
        except OSError as error:
            raise MidfillError(f"Cannot write the recording {name}: {error.strerror}.") from error
        return name, os.fdopen(descriptor, "w", encoding="utf-8")
    raise MidfillError(f"There are {_MAX_FILES} recordings named {path} already: delete some.")


@dataclass(frozen=True, slots=True)
class Line:
    """One recorded message.

    Attributes:
        at_s: seconds since the start.
        message: parsed JSON; None if it was not JSON.
        raw: the message's bytes as they were sent (by the server: none).
    """

    at_s: float
    from_client: bool
    message: Any
    raw: bytes

    @property
    def method(self) -> str | None:
        """The method of a request or notification."""
        method = self.message.get("method") if isinstance(self.message, dict) else None
        return method if isinstance(method, str) else None

    @property
    def ends_progress(self) -> bool:
        """Whether it says that something which takes long has ended."""
        params = self.message.get("params") if self.method == "$/progress" else None
        value = params.get("value") if isinstance(params, dict) else None
        return isinstance(value, dict) and value.get("kind") == "end"

    @property
    def is_left_out(self) -> bool:
        """Whether a replay does not send it.

        That is an answer to the recorded server, as the new one gets its own; and a wish to train an adapter
        or to choose one, which would count for whoever replays it.
        """
        if self.method is None:
            return self.key is not None
        params = self.message.get("params") if self.method == "workspace/executeCommand" else None
        command = str(params.get("command")) if isinstance(params, dict) else ""
        return command.startswith("midfill.adapter.") and command != "midfill.adapter.list"

    @property
    def key(self) -> str | None:
        """What identifies a request and its answer: the id, as JSON."""
        if not isinstance(self.message, dict) or "id" not in self.message:
            return None
        return json.dumps(self.message["id"])


def read(path: Path) -> list[Line]:
    """Read a recording. Raises `MidfillError` naming the line that is wrong; a cut last line is dropped."""
    try:
        rows = textfiles.read(path).split("\n")
    except (OSError, UnicodeError) as error:
        raise MidfillError(f"Cannot read the recording {path}: {str(error).rstrip('.')}.") from error
    complete, lines = rows[:-1], []
    for number, row in enumerate(complete, start=1):
        try:
            value = parse_json(row.encode())
            _check_depth(value)
            if number == 1:
                if value["midfillRecording"] != _FORMAT:
                    raise MidfillError(f"{path} was made by another version of midfill.")
                continue
            message = value.get("message")
            if "bytes" in value:
                raw = value["bytes"].encode("latin-1")
                # Who wrote the file may call a message no message.
                with suppress(ValueError, RecursionError):
                    message = json.loads(raw)
            else:
                raw = json.dumps(message).encode()
            at_s = round(float(value["t"]), 6)
            _ = int(at_s)  # of what is no time it is an error
            lines.append(Line(at_s, value["from"] == "client", message, raw))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise MidfillError(f"{path}:{number}: not a line of a midfill recording.") from error
    if not lines:
        raise MidfillError(f"{path} holds no recorded session.")
    return lines


def _check_depth(value: Any) -> None:
    """Raise `ValueError` for lists and objects that are nested deeper than in any message."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inside = [
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)
        ]
        level = [one for values in inside for one in values]
        if not level:
            return
    raise ValueError("nested too deeply")


@dataclass(slots=True)
class _Session:
    """Answers as they come, recorded or replayed.

    Attributes:
        answers: by request id (as JSON); several where an id was used again.
        latencies_ms: of the ghost text requests.
        num_loads: how often the end of loading was reported.
        order: (request id, how many answers it had then) as the answers came.
    """

    answers: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    latencies_ms: list[float] = field(default_factory=list)
    num_loads: int = 0
    order: list[tuple[str, int]] = field(default_factory=list)
    _asked_s: dict[str, float] = field(default_factory=dict)

    def asked(self, key: str | None, method: str | None, at_s: float) -> None:
        if key is not None and method == "textDocument/inlineCompletion":
            self._asked_s[key] = at_s

    def heard(self, line: Line) -> None:
        if line.method is None and line.key is not None:
            self.answers[line.key].append({k: line.message.get(k) for k in ("result", "error")})
            self.order.append((line.key, len(self.answers[line.key])))
            if (asked_s := self._asked_s.pop(line.key, None)) is not None:
                self.latencies_ms.append((line.at_s - asked_s) * 1000)
        elif line.ends_progress:
            self.num_loads += 1


async def replay(path: Path, command: str | None = None, speed: float = 1.0) -> dict[str, Any]:
    """Play a recording's client against a fresh server: `midfill serve`, or a command line of the user's.

    Each message is sent when its time has come (`speed` times as fast; 0 for no waiting) and when every
    answer that the editor had before it, and the end of loading if it had seen that, has come too.
    What the editor asked to train or to choose an adapter is left out: it would count for whoever replays it.
    Returns counts, latencies and the answers that differ. Raises `MidfillError`.
    """
    lines = read(path)
    recorded = _Session()
    program: Sequence[str] = shlex.split(command) if command else SERVE_COMMAND
    try:
        process = await asyncio.create_subprocess_exec(
            *program,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        raise MidfillError(f"Cannot start {program[0]}: {error.strerror}.") from error
    player = _Player(process, lines)
    reader = asyncio.create_task(player.listen())
    asked: dict[str, list[tuple[str, int]]] = defaultdict(list)
    begun = time.monotonic()
    try:
        for line in lines:
            if not line.from_client:
                # An answer to nothing that was asked will not come again; what was no message has null's.
                if line.method is not None or line.key in asked or line.key == "null":
                    recorded.heard(line)
                continue
            if line.is_left_out:
                continue
            recorded.asked(line.key, line.method, line.at_s)
            if speed > 0:
                await asyncio.sleep(max(0.0, line.at_s / speed - (time.monotonic() - begun)))
            await player.caught_up(recorded)
            if line.key is not None and line.method is not None:
                asked[line.key].append((line.method, recorded.num_loads))
            player.send(line)
        await player.caught_up(recorded, _END_S)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _END_S)
        except TimeoutError:
            process.kill()
            await process.wait()
        await reader
    return _compare(asked, recorded, player.session)


class _Player:
    """The editor's part of a replay."""

    def __init__(self, process: asyncio.subprocess.Process, lines: list[Line]) -> None:
        self.session = _Session()
        self._process = process
        self._begun = time.monotonic()
        self._news = asyncio.Event()
        self._ended = False
        self._num_heard = 0
        # What the recorded editor said to the server's own requests, by method.
        asked = {line.key: line.method for line in lines if not line.from_client and line.method}
        self._replies: dict[str, list[Any]] = defaultdict(list)
        for line in lines:
            if line.from_client and line.method is None and (method := asked.get(line.key)):
                self._replies[method].append(line.message)

    def send(self, line: Line) -> None:
        message = line.message
        self.session.asked(line.key, line.method, time.monotonic() - self._begun)
        if line.method == "initialize" and isinstance(message.get("params"), dict):
            # The recorded editor is gone, and the server would go with it. What it accepted was counted then.
            changed = {"processId": None, "clientInfo": {"name": OWN_CLIENT}}
            message = message | {"params": message["params"] | changed}
            self._write(to_frame(message))
        else:
            self._write(b"Content-Length: %d\r\n\r\n%b" % (len(line.raw), line.raw))

    async def listen(self) -> None:
        stdout = self._process.stdout
        while stdout is not None and (message := await read_message(stdout)) is not None:
            line = Line(time.monotonic() - self._begun, False, message, b"")
            if line.method is not None and line.key is not None:
                replies = self._replies[line.method]
                reply = replies.pop(0) if replies else {"jsonrpc": "2.0", "result": None}
                self._write(to_frame(reply | {"id": message["id"]}))
            self.session.heard(line)
            self._news.set()
        self._ended = True
        self._news.set()

    async def caught_up(self, recorded: _Session, patience_s: float = _PATIENCE_S) -> None:
        """Wait until this session has heard what the recorded one had at this point."""
        try:
            async with asyncio.timeout(patience_s):
                while not self._ended and not self._has_heard(recorded):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            # What is missing by now will not come; nobody waits for it twice.
            self._num_heard = len(recorded.order)
            self.session.num_loads = max(self.session.num_loads, recorded.num_loads)

    def _has_heard(self, recorded: _Session) -> bool:
        while self._num_heard < len(recorded.order):
            key, num = recorded.order[self._num_heard]
            if len(self.session.answers[key]) < num:
                return False
            self._num_heard += 1
        return self.session.num_loads >= recorded.num_loads

    def _write(self, data: bytes) -> None:
        if self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(data)


def _compare(
    asked: dict[str, list[tuple[str, int]]], recorded: _Session, replayed: _Session
) -> dict[str, Any]:
    """`asked`: (method, how often a model had been loaded by then) of each request, by id."""
    different: list[dict[str, Any]] = []
    num_equal = num_loading = 0
    for key, requests in asked.items():
        for number, ((method, num_loads), old) in enumerate(
            zip(requests, recorded.answers[key], strict=False)
        ):
            if method in _NEED_MODEL and num_loads < min(1, recorded.num_loads):
                num_loading += 1
                continue
            answers = replayed.answers[key]
            new = answers[number] if number < len(answers) else None
            if _stable(old) == _stable(new):
                num_equal += 1
            else:
                different.append({"id": json.loads(key), "method": method, "recorded": old, "replayed": new})
    return {
        "requests": sum(map(len, asked.values())),
        "while_loading": num_loading,
        "compared": num_equal + len(different),
        "equal": num_equal,
        "different": different,
        "median_ms": {"recorded": _median(recorded.latencies_ms), "replayed": _median(replayed.latencies_ms)},
    }


def describe(result: dict[str, Any]) -> str:
    """What `replay` returned, for people: the differences, then a line of sums."""
    lines = []
    for entry in result["different"]:
        lines.append(f"{entry['method']} {entry['id']}")
        lines += [
            f"  {which}: {json.dumps(entry[which], ensure_ascii=False)}" for which in ("recorded", "replayed")
        ]
    median_ms = result["median_ms"]
    lines.append(
        f"{result['equal']} of {result['compared']} answers are equal; "
        f"ghost text took {median_ms['recorded']} ms then, {median_ms['replayed']} ms now (median)."
    )
    return escaped("\n".join(lines))


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in _VOLATILE}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None
