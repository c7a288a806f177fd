"""A real Vim with the plugin and the real server, on a terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path

from real_terminal import LIMIT_S, Terminal

PLUGIN = Path(__file__).parents[2] / "clients" / "vim"


class Vim(Terminal):
    """One Vim with one file; see `Terminal` for the other arguments.

    Args:
        before: Vim script of the user's own, in the vimrc.
    """

    KILLED, RESTART = "signal kill", ":Midfill restart"

    def __init__(self, folder, rules, *, before="", **options):
        super().__init__(folder, rules, **options)
        (folder / "vimrc").write_text(
            "vim9script\n"
            "set noswapfile viminfo= ttimeoutlen=10 noautoindent shortmess+=I hidden\n"
            "set nomodeline noequalalways cmdheight=2 backspace=indent,eol,start\n"
            "filetype plugin on\n"
            f"set runtimepath^={PLUGIN}\n"
            f"g:midfill_command = {json.dumps(self.command)}\n"
            f"g:midfill_settings = {json.dumps(self.settings)}\n"
            "g:python_recommended_style = 0\n"
            f"{before}\n"
            # What tests ask for is evaluated in a timer, and written to a file.
            "var answered = 0\n"
            "def Answer(_: any)\n"
            f"  const question = {_vim(str(folder / 'question'))}\n"
            "  if filereadable(question)\n"
            "    const [number, code] = readfile(question)\n"
            "    if str2nr(number) > answered\n"
            "      answered = str2nr(number)\n"
            "      var value: any = v:null\n"
            "      try\n"
            "        value = eval(code)\n"
            "      catch\n"
            "        value = 'failed: ' .. v:exception\n"
            "      endtry\n"
            f"      writefile([json_encode(value)], {_vim(str(folder / 'answer.part'))})\n"
            f"      rename({_vim(str(folder / 'answer.part'))}, {_vim(str(folder / 'answer'))} .. number)\n"
            "    endif\n"
            "  endif\n"
            "enddef\n"
            "timer_start(10, Answer, {repeat: -1})\n",
            encoding="utf-8",
        )
        self._questions = 0

    def open(self):
        """Start Vim."""
        self.start(["vim", "-N", "-u", str(self.folder / "vimrc"), str(self.file)])

    def write(self, text):
        """Begin to write at the cursor."""
        self.type("i" + text)

    def open_line(self, text):
        """Begin a line below the cursor's."""
        self.type("o" + text)

    def append(self, text):
        """Write at the end of the text."""
        self.type("GA" + text)

    def save(self):
        self.press("Escape")
        self.type(":w")
        self.press("Enter")

    def undo(self):
        self.press("Escape")
        self.type("u")

    def restart(self):
        self.run("Midfill restart")

    def edit(self, name):
        """Open another file."""
        self.press("Enter")
        self.run(f"edit {name}")

    @property
    def ghost(self):
        """What is suggested; "" if nothing is."""
        return self.eval("midfill#Suggestion()")

    @property
    def text(self):
        return "\n".join(self.eval("getline(1, '$')"))

    @property
    def state(self):
        return self.eval("midfill#server#state")

    @property
    def messages(self):
        return self.eval("execute('messages')")

    def ready(self):
        """Wait until the server has its model; returns the editor."""
        self.until(lambda: self.state == "ready", "the server is ready")
        return self

    def shows(self, ghost):
        """Wait for this ghost text."""
        self.until(lambda: self.ghost == ghost, f"the ghost text {ghost!r}")

    def run(self, command):
        """What an Ex command prints."""
        return self.eval(f"execute({_vim(command)})")

    def eval(self, expression):
        """The value of a Vim9 expression."""
        self._questions += 1
        (self.folder / "question.part").write_text(f"{self._questions}\n{expression}\n", encoding="utf-8")
        (self.folder / "question.part").rename(self.folder / "question")
        answer = self.folder / f"answer{self._questions}"
        end = time.monotonic() + LIMIT_S
        while not answer.exists():
            if time.monotonic() > end:
                raise AssertionError(f"Vim does not answer: {Terminal.describe(self)}")
            time.sleep(0.005)
        return json.loads(answer.read_text(encoding="utf-8"))

    def describe(self):
        described = super().describe()
        try:
            return f"{described}\nserver {self.state}, ghost {self.ghost!r}, messages:\n{self.messages}"
        except AssertionError:
            return described


def _vim(text):
    return "'" + text.replace("'", "''") + "'"
