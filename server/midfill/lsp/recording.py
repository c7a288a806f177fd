"""Recorded sessions: `midfill serve --record` writes one, `midfill replay` plays it to a new server.

A recording is a file of JSON lines: a header, then every message with its time and its sender. It holds
source text, so it is made on request only, and only its owner can read it. A replay sends the editor's
messages again, in the same order relative to the server's, and compares the answers: so a user's bug report
becomes a test.

The recorder runs on the server's event loop, the replay on its own.
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
from midfill.lsp.client import SERVE_COMMAND, encode, read_message
from midfill.lsp.framing import to_frame
from midfill.lsp.messages import OWN_CLIENT, REPLAYED
from midfill.system import text_files as textfiles
from midfill.system.file_errors import why_unreadable, why_unwritable
from midfill.system.json_files import parse_json
from midfill.text.characters import escaped

_LOG = logging.getLogger(__name__)

_FORMAT = 1
_WARNING = "This file contains the source text of your editor session. Read it before you share it."
_MAX_FILES = 1000
_MAX_DEPTH = 100
# How long the replay waits for one message; then it continues and reports what is missing. Loading a model
# may take long.
_MESSAGE_TIMEOUT_S = 120.0
_END_S = 5.0
# Not compared while the model is loading: their answers depend on how long that takes.
_NEED_MODEL = {"textDocument/inlineCompletion", "textDocument/completion", "midfill/explain"}
# Keys whose values differ each time, without a difference to the user.
_VOLATILE = {"latencyMs", "serverInfo", "reusedTokens", "stages", "command"}


class Recorder:
    """Writes one session to a file. If that fails it is logged once, and the server continues."""

    def __init__(self, path: Path) -> None:
        path, self._file = _create(path)
        _LOG.warning("recording the session, with its source text, to %s", path)
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
        """Write one message. `sender` is "client" or "server"."""
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
            # Flushed line by line: the last lines before a crash matter most.
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._file.flush()
        except (OSError, RecursionError) as error:
            _LOG.warning("the recording stops: it cannot be written (%s)", type(error).__name__)
            self._file = None


def _create(path: Path) -> tuple[Path, TextIO | None]:
    """Create a file that only its owner can read; an existing one of that name is kept.

    Returns the path, which may have got a number, and the file.
    """
    for number in range(1, _MAX_FILES):
        name = path if number == 1 else path.with_name(f"{path.name}.{number}")
        try:
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue
        except OSError as error:
            raise MidfillError(f"Cannot write the recording {name}: {why_unwritable(error)}.") from error
        return name, os.fdopen(descriptor, "w", encoding="utf-8")
    raise MidfillError(f"{_MAX_FILES} recordings named {path} exist already. Delete some of them.")


@dataclass(frozen=True, slots=True)
class RecordedMessage:
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
        """True if it reports the end of long work, such as loading the model."""
        params = self.message.get("params") if self.method == "$/progress" else None
        value = params.get("value") if isinstance(params, dict) else None
        return isinstance(value, dict) and value.get("kind") == "end"

    @property
    def is_skipped(self) -> bool:
        """True if a replay does not send it.

        Those are responses to requests of the recorded server, since the new one gets its own, and commands
        that train or bind an adapter, which would change the adapters of the user who replays.
        """
        if self.method is None:
            return self.key is not None
        params = self.message.get("params") if self.method == "workspace/executeCommand" else None
        command = str(params.get("command")) if isinstance(params, dict) else ""
        return command.startswith("midfill.adapter.") and command != "midfill.adapter.list"

    @property
    def key(self) -> str | None:
        """The id of a request or a response, as JSON; None for a notification."""
        if not isinstance(self.message, dict) or "id" not in self.message:
            return None
        return json.dumps(self.message["id"])


def read(path: Path) -> list[RecordedMessage]:
    """Read a recording; an incomplete last line is dropped. Raises `MidfillError` naming the bad line."""
    try:
        rows = textfiles.read(path).split("\n")
    except (OSError, UnicodeError) as error:
        raise MidfillError(f"Cannot read the recording {path}: {why_unreadable(error)}.") from error
    complete, lines = rows[:-1], []
    for number, row in enumerate(complete, start=1):
        try:
            value = parse_json(row.encode())
            _check_depth(value)
            if number == 1:
                if value["midfillRecording"] != _FORMAT:
                    raise MidfillError(
                        f"The recording {path} has another format. Replay it with the midfill that wrote it."
                    )
                continue
            message = value.get("message")
            if "bytes" in value:
                raw = value["bytes"].encode("latin-1")
                # In an edited file it may be valid JSON.
                with suppress(ValueError, RecursionError):
                    message = json.loads(raw)
            else:
                raw = json.dumps(message).encode()
            at_s = round(float(value["t"]), 6)
            _ = int(at_s)  # an error for NaN and infinity
            lines.append(RecordedMessage(at_s, value["from"] == "client", message, raw))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise MidfillError(
                f"{path}:{number}: not a line of a midfill recording. Record one: midfill serve --record."
            ) from error
    if not lines:
        raise MidfillError(f"The recording {path} holds no messages.")
    return lines


def _check_depth(value: Any) -> None:
    """Raise `ValueError` for lists and objects that are nested deeper than in any real message."""
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
class _Transcript:
    """The answers that a client has received so far, recorded or replayed.

    Attributes:
        answers: by request id (as JSON); several if an id was used again.
        latencies_ms: of the ghost text requests.
        num_loads: how often the end of loading was reported.
        order: (request id, number of its answers so far) for each answer, in the order of arrival.
    """

    answers: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    latencies_ms: list[float] = field(default_factory=list)
    num_loads: int = 0
    order: list[tuple[str, int]] = field(default_factory=list)
    _sent_s: dict[str, float] = field(default_factory=dict)

    def sent(self, key: str | None, method: str | None, at_s: float) -> None:
        if key is not None and method == "textDocument/inlineCompletion":
            self._sent_s[key] = at_s

    def received(self, line: RecordedMessage) -> None:
        if line.method is None and line.key is not None:
            self.answers[line.key].append({k: line.message.get(k) for k in ("result", "error")})
            self.order.append((line.key, len(self.answers[line.key])))
            if (sent_s := self._sent_s.pop(line.key, None)) is not None:
                self.latencies_ms.append((line.at_s - sent_s) * 1000)
        elif line.ends_progress:
            self.num_loads += 1


async def replay(path: Path, command: str | None = None, speed: float = 1.0) -> dict[str, Any]:
    """Play a recording's client to a new server: `midfill serve`, or the command line `command`.

    Each message is sent at its recorded time (`speed` times as fast; 0: without waiting), but not before
    every answer that the editor had received by then, and the end of loading, has arrived here too.
    Commands that train or bind an adapter are skipped (`RecordedMessage.is_skipped`).
    Returns counts, latencies and the answers that differ. Raises `MidfillError`.
    """
    lines = read(path)
    recorded = _Transcript()
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
    player = _Replayer(process, lines)
    reader = asyncio.create_task(player.listen())
    requests_by_id: dict[str, list[tuple[str, int]]] = defaultdict(list)
    started_s = time.monotonic()
    try:
        for line in lines:
            if not line.from_client:
                # A response to no request will not come again; that to an invalid message has the id null.
                if line.method is not None or line.key in requests_by_id or line.key == "null":
                    recorded.received(line)
                continue
            if line.is_skipped:
                continue
            recorded.sent(line.key, line.method, line.at_s)
            if speed > 0:
                await asyncio.sleep(max(0.0, line.at_s / speed - (time.monotonic() - started_s)))
            await player.catch_up(recorded)
            if line.key is not None and line.method is not None:
                requests_by_id[line.key].append((line.method, recorded.num_loads))
            player.send(line)
        await player.catch_up(recorded, _END_S)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _END_S)
        except TimeoutError:
            process.kill()
            await process.wait()
        await reader
    return _compare(requests_by_id, recorded, player.transcript)


class _Replayer:
    """The client of a replay."""

    def __init__(self, process: asyncio.subprocess.Process, lines: list[RecordedMessage]) -> None:
        self.transcript = _Transcript()
        self._process = process
        self._begun = time.monotonic()
        self._arrived = asyncio.Event()
        self._ended = False
        self._num_received = 0
        # The recorded editor's responses to the server's own requests, by method.
        methods = {line.key: line.method for line in lines if not line.from_client and line.method}
        self._replies: dict[str, list[Any]] = defaultdict(list)
        for line in lines:
            if line.from_client and line.method is None and (method := methods.get(line.key)):
                self._replies[method].append(line.message)

    def send(self, line: RecordedMessage) -> None:
        message = line.message
        self.transcript.sent(line.key, line.method, time.monotonic() - self._begun)
        if line.method == "initialize" and isinstance(message.get("params"), dict):
            # Not the recorded process id: the server would end with that process. And not its name alone:
            # what was accepted has been counted already.
            recorded = message["params"].get("clientInfo")
            named = isinstance(recorded, dict) and isinstance(recorded.get("name"), str)
            client = recorded | {"name": REPLAYED + recorded["name"]} if named else {"name": OWN_CLIENT}
            message = message | {"params": message["params"] | {"processId": None, "clientInfo": client}}
            self._write(encode(message))
        else:
            self._write(to_frame(line.raw))

    async def listen(self) -> None:
        stdout = self._process.stdout
        while stdout is not None and (message := await read_message(stdout)) is not None:
            line = RecordedMessage(time.monotonic() - self._begun, False, message, b"")
            if line.method is not None and line.key is not None:
                replies = self._replies[line.method]
                reply = replies.pop(0) if replies else {"jsonrpc": "2.0", "result": None}
                self._write(encode(reply | {"id": message["id"]}))
            self.transcript.received(line)
            self._arrived.set()
        self._ended = True
        self._arrived.set()

    async def catch_up(self, recorded: _Transcript, timeout_s: float = _MESSAGE_TIMEOUT_S) -> None:
        """Wait until this client has received what the recorded one had at this point."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._ended and not self._has_received(recorded):
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            # What is missing now counts as received, so that it is waited for once only.
            self._num_received = len(recorded.order)
            self.transcript.num_loads = max(self.transcript.num_loads, recorded.num_loads)

    def _has_received(self, recorded: _Transcript) -> bool:
        while self._num_received < len(recorded.order):
            key, num = recorded.order[self._num_received]
            if len(self.transcript.answers[key]) < num:
                return False
            self._num_received += 1
        return self.transcript.num_loads >= recorded.num_loads

    def _write(self, data: bytes) -> None:
        if self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(data)


def _compare(
    requests_by_id: dict[str, list[tuple[str, int]]], recorded: _Transcript, replayed: _Transcript
) -> dict[str, Any]:
    """Return the result of `replay`.

    `requests_by_id` has (method, number of models loaded by then) of each request.
    """
    different: list[dict[str, Any]] = []
    num_equal = num_loading = 0
    for key, requests in requests_by_id.items():
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
        "requests": sum(map(len, requests_by_id.values())),
        "while_loading": num_loading,
        "compared": num_equal + len(different),
        "equal": num_equal,
        "different": different,
        "median_ms": {"recorded": _median(recorded.latencies_ms), "replayed": _median(replayed.latencies_ms)},
    }


def describe(result: dict[str, Any]) -> str:
    """Return the result of `replay` as text: the differences, then a summary line."""
    lines = []
    for entry in result["different"]:
        lines.append(f"{entry['method']} {entry['id']}")
        lines += [
            f"  {which}: {json.dumps(entry[which], ensure_ascii=False)}" for which in ("recorded", "replayed")
        ]
    median_ms = result["median_ms"]
    lines.append(
        f"{result['equal']} of {result['compared']} answers are equal; "
        f"median time of ghost text: {median_ms['recorded']} ms recorded, {median_ms['replayed']} ms now."
    )
    return escaped("\n".join(lines))


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in _VOLATILE}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None
