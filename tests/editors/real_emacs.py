"""A real Emacs with the package and the real server, on a terminal."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from pathlib import Path

from real_terminal import Terminal

PACKAGE = Path(__file__).parents[2] / "clients" / "emacs"


class Emacs(Terminal):
    """One Emacs with one file; see `Terminal` for the other arguments.

    Args:
        client: the value of `midfill-client`.
        before: Lisp of the user's own, run before the mode is switched on.
    """

    KILLED, RESTART = "signal 9", "M-x midfill-restart"

    def __init__(self, folder, rules, *, client="own", before="", **options):
        super().__init__(folder, rules, **options)
        self._commands = folder / "commands"
        self._commands.touch()
        init = folder / ".emacs.d" / "init.el"
        init.parent.mkdir()
        init.write_text(
            ";;; -*- lexical-binding: t -*-\n"
            # Nothing is compiled to machine code meanwhile.
            "(setq native-comp-deferred-compilation nil native-comp-async-report-warnings-errors nil)\n"
            "(setq inhibit-startup-screen t make-backup-files nil auto-save-default nil)\n"
            "(setq create-lockfiles nil python-indent-guess-indent-offset nil)\n"
            "(setq mode-require-final-newline nil)\n"
            f"(setq server-name {_lisp(str(self._sockets / 'emacs'))})\n"
            "(menu-bar-mode -1)\n"
            "(electric-indent-mode -1)\n"
            # A character for each command that has run.
            f"(setq commands-file {_lisp(str(self._commands))})\n"
            "(add-hook 'post-command-hook\n"
            '  (lambda () (let ((inhibit-quit t)) (write-region "." nil commands-file t \'silent))))\n'
            f"(add-to-list 'load-path {_lisp(str(PACKAGE))})\n"
            f"(setq midfill-client '{client}\n"
            f"      midfill-command (json-parse-string {_lisp(json.dumps(self.command))} :array-type 'list)\n"
            "      midfill-settings (json-parse-string\n"
            f"        {_lisp(json.dumps(self.settings))} :object-type 'plist :false-object :json-false))\n"
            # As JSON reads them, keys are keywords already.
            "(require 'midfill)\n"
            f"{before}\n"
            "(server-start)\n"
            "(global-midfill-mode)\n",
            encoding="utf-8",
        )

    def open(self):
        """Start Emacs."""
        self.start(["emacs", "-nw", str(self.file)])
        self.until(self._listens, "the server of Emacs")

    def _listens(self):
        with contextlib.suppress(AssertionError):
            return self.lisp("t")

    def run(self, *keys):
        """Press keys that are a command, and wait until it has run.

        C-g throws away what was typed after it and not read yet. While Emacs answers a question of ours, it
        ends that answer and is no command: so nothing is asked here.
        """
        before = self._commands.stat().st_size
        self.press(*keys)
        self.until(lambda: self._commands.stat().st_size > before, f"the command of {keys}")

    def escape(self):
        """Press Escape, where that is a command (evil, viper), and wait until it has run.

        A terminal sends Meta as an Escape before the key: to an Emacs that reads both at once they are that.
        """
        self.run("Escape")

    def write(self, text):
        """Begin to write at the cursor."""
        self.type(text)

    def open_line(self, text):
        """Begin a line below the cursor's."""
        self.press("End", "Enter")
        self.type(text)

    def append(self, text):
        """Write at the end of the text."""
        self.press("M->")
        self.type(text)

    def save(self):
        self.press("C-x", "C-s")

    def undo(self):
        self.press("C-x", "u")

    def restart(self):
        self.press("M-x")
        self.type("midfill-restart")
        self.press("Enter")

    def edit(self, name):
        """Open another file."""
        self.lisp(f"(progn (find-file {_lisp(name)}) t)")
        self.until(lambda: self.lisp("(buffer-name)") == name, "another buffer")

    @property
    def ghost(self):
        """The ghost text; "" if there is none."""
        return self.lisp(
            "(if (and (overlayp midfill--overlay) (overlay-buffer midfill--overlay))"
            " (substring-no-properties (or (overlay-get midfill--overlay 'display)"
            " (overlay-get midfill--overlay 'after-string)))"
            ' "")'
        )

    @property
    def text(self):
        return self.lisp("(substring-no-properties (buffer-string))")

    @property
    def state(self):
        return self.lisp("(symbol-name midfill-server-state)")

    @property
    def messages(self):
        return self.lisp("(with-current-buffer (messages-buffer) (buffer-string))")

    def ready(self):
        """Wait until the server has its model; returns the editor."""
        self.until(lambda: self.state == "ready", "the server is ready")
        return self

    def shows(self, ghost):
        """Wait for this ghost text."""
        self.until(lambda: self.ghost == ghost, f"the ghost text {ghost!r}")

    def lisp(self, code):
        """The value of an expression, evaluated in the buffer of the window, as JSON can hold it."""
        form = f"(with-current-buffer (window-buffer) (json-encode {code}))"
        result = subprocess.run(
            ["emacsclient", "--socket-name", str(self._sockets / "emacs"), "--eval", form],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert result.returncode == 0, f"{code}: {result.stderr}{result.stdout}"
        # It is printed as a literal of Lisp.
        literal = result.stdout.strip()[1:-1]
        return json.loads(re.sub(r"\\(.)", r"\1", literal, flags=re.DOTALL))

    def describe(self):
        described = super().describe()
        with contextlib.suppress(AssertionError):  # Emacs may not have come so far
            described += f"\nserver {self.state}, messages:\n{self.messages}"
        return described


def _lisp(text):
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def batch(code, folder):
    """What Emacs prints when it runs `code` without a screen, in `folder`, which is on its load path."""
    form = f"(progn (package-initialize) (add-to-list 'load-path default-directory) {code})"
    command = ["emacs", "--batch", "--eval", form]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=False)
    return f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
