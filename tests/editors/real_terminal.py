"""Editors that draw on a terminal: driven by keys in a tmux of their own, seen as its screen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

import forkserver
from midfill.lsp.client import SERVE_COMMAND

# Generous: it is reached only by what never happens, and machines may be busy.
LIMIT_S = 90
POLL_S = 0.02
# Each look costs a process.
_POLL_END_S = 0.5

COLUMNS, LINES = 80, 24


FUTURE_SERVER = Path(__file__).with_name("future_server.py")
# Explanations of a later server, and what has to be said of them.
FUTURE = [
    (
        {
            "source": "telepathy",
            "reason": "unheard-of",
            "message": "Nobody has heard of this.",
            "latencyMs": 3,
            "promptTokens": 4,
            "reusedTokens": None,
            "segments": [{"source": "elsewhere", "tokens": "many"}, {}],
            "stages": [{"stage": "guessing", "ms": 1}, {"stage": 7}],
            "filters": [{"filter": "new-filter", "characters": -3}, {"characters": None}],
            "more": {"of": ["it"]},
        },
        "Nobody has heard of this.",
    ),
    (
        {"source": "none", "reason": "unheard-of", "message": None, "latencyMs": None, "stages": None},
        "unheard-of",
    ),
    ({"source": "telepathy", "filters": None, "segments": None, "promptTokens": None}, "telepathy"),
]


def serve_command(folder, rules, log):
    """What starts the server with these rules of the scripted engine; `(None,)` is the real default model."""
    if rules == (None,):
        return list(SERVE_COMMAND)
    script = folder / "script.json"
    script.write_text(json.dumps({"rules": rules, "log": str(log)}))
    return [*forkserver.command("serve"), "--engine", f"scripted:{script}"]


class Terminal:
    """One editor on a screen of 80 by 24 characters.

    A subclass says how the editor is started and what it shows.

    Args:
        folder: for its files.
        rules: of the scripted engine; `(None,)` asks for the real default model.
        text, name: the file that is opened.
        settings: of the server.
        command: starts the server, in the place of the real one.
    """

    def __init__(self, folder, rules, *, text, name="main.py", settings=None, command=None):
        self.folder = folder
        self.log = folder / "engine.log"
        self.file = folder / name
        self.file.write_text(text, encoding="utf-8")
        if command is None:
            command = serve_command(folder, rules, self.log)
            # What is said on the wire is seen in the session's recording.
            command += ["--record", str(folder / "session.jsonl")]
        self.command = command
        # The script's tokens are characters. Looking ahead is off so that model calls can be counted.
        self.settings = {"prefetch": False, "max_new_tokens": 200} | (settings or {})
        # Paths of sockets have to be short.
        self._sockets = Path(tempfile.mkdtemp(prefix="midfill-"))
        self.pid = None

    def start(self, arguments):
        """Start the editor; `pid` is its process."""
        variables = {
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            "MIDFILL_CACHE": os.environ.get("MIDFILL_CACHE") or str(Path.home() / ".cache" / "midfill"),
        }
        # A person's own tmux, and its settings, are left alone.
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("TMUX", "LC_"))}
        options = "set -g default-terminal tmux-256color ; set -s escape-time 0 ; set -g remain-on-exit on"
        (self._sockets / "tmux.conf").write_text(options.replace(" ; ", "\n") + "\n")
        subprocess.run(
            [
                *self._tmux("-f", str(self._sockets / "tmux.conf")),
                *("new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), "-s", "editor"),
                *arguments,
            ],
            env=outside | variables,
            cwd=self.folder,
            check=True,
        )
        self.pid = int(self.tmux("display-message", "-p", "#{pane_pid}"))

    # What a person sees

    @property
    def screen(self):
        """The lines of the screen, without the blanks at their ends."""
        return [line.rstrip() for line in self.tmux("capture-pane", "-p").split("\n")]

    @property
    def place(self):
        """Where the cursor is on the screen: row and column from 0."""
        row, column = self.tmux("display-message", "-p", "#{cursor_y} #{cursor_x}").split()
        return int(row), int(column)

    def sees(self, *lines):
        """Wait until these lines stand on the screen, one below the other."""

        def there():
            screen = self.screen
            return any(tuple(screen[row : row + len(lines)]) == lines for row in range(len(screen)))

        self.until(there, f"the lines {lines!r} on the screen")

    def reads(self, text):
        """Wait until the editor's text is this."""
        self.until(lambda: self.text == text, f"the text {text!r}")

    @property
    def model_calls(self):
        """What became of the requests to the model, in the order in which they ended."""
        rows = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(row)["outcome"] for row in rows]

    def sent(self, *methods):
        """What the editor has sent of these methods, oldest first."""
        lines = []
        for recording in sorted(self.folder.glob("session.jsonl*")):
            lines += [json.loads(line) for line in recording.read_text().splitlines()]
        messages = [line["message"] for line in lines if line.get("from") == "client"]
        return [message for message in messages if message.get("method") in methods]

    @property
    def asked(self):
        """How often the editor has asked for ghost text."""
        return len(self.sent("textDocument/inlineCompletion"))

    @property
    def server_pid(self):
        """The server's process; None if there is none."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        for pid in children.read_text().split():
            name = Path(f"/proc/{pid}/cmdline")
            if name.exists() and b"midfill\0serve" in name.read_bytes():
                return int(pid)
        return None

    # What a person does

    def type(self, text):
        """Type a text, a character after the other."""
        self.tmux("send-keys", "-l", "--", text)

    def press(self, *keys):
        """Press keys, as tmux names them: `Tab`, `C-Right`. For Escape see `escape` of the editor."""
        self.tmux("send-keys", *keys)

    def until(self, condition, what):
        end = time.monotonic() + LIMIT_S
        next_look = 0.0
        while not condition():
            now = time.monotonic()
            if now >= next_look:
                next_look = now + _POLL_END_S
                if self.tmux("display-message", "-p", "#{pane_dead}") == "1":
                    raise AssertionError(f"the editor has ended before {what}: {self.describe()}")
            if now > end:
                raise AssertionError(f"{what} never came: {self.describe()}")
            time.sleep(POLL_S)

    def describe(self):
        frame = "-" * COLUMNS
        return "\n".join(["the screen is", frame, *self.screen, frame])

    def tmux(self, *arguments):
        result = subprocess.run(self._tmux(*arguments), capture_output=True, check=True, encoding="utf-8")
        return result.stdout.removesuffix("\n")

    def _tmux(self, *arguments):
        return ["tmux", "-S", str(self._sockets / "tmux"), *arguments]

    def close(self):
        """End the editor with its tmux."""
        if self.pid is not None:
            editor = [psutil.Process(self.pid)] if psutil.pid_exists(self.pid) else []
            self.tmux("kill-server")
            # Vim may lock itself up when its terminal goes, and its server would stay with it.
            for process in psutil.wait_procs(editor, timeout=10)[1]:
                process.kill()
        shutil.rmtree(self._sockets)
