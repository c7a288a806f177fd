"""What a person sees alike in every editor on a terminal, with the real server; keys are the editor's own."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from hostile import Hostile
from real_terminal import FUTURE, FUTURE_SERVER, serve_command

SUM = {"after": "total = ", "text": "sum(values)"}
BODY = {"after": "def area(self):\n", "text": "    width = self.w\n    return width"}
VALUES = "values = [1, 2]"
PAIRS = {
    "emacs": "(electric-pair-mode)",
    "vim": 'inoremap ( ()<C-G>U<Left>\ninoremap " ""<C-G>U<Left>',
}
ONE_PAUSE = {"emacs": "(setq midfill-server--pauses '(0.1 0.1 0.1))", "vim": ""}


@pytest.fixture(params=["emacs", "vim"])
def name(request):
    return request.param


@pytest.fixture
def terminal(name, request):
    """Start an editor: `terminal(rule, ...)`; see `real_terminal.Terminal`."""
    return request.getfixturevalue(name)


def test_ghost_text_is_shown_and_accepted(terminal):
    editor = terminal(SUM, text=VALUES).ready()
    editor.open_line("total = ")
    editor.shows("sum(values)")
    editor.sees(VALUES, "total = sum(values)")
    assert editor.place == (1, 8)
    editor.press("Tab")
    editor.reads(VALUES + "\ntotal = sum(values)")
    assert editor.ghost == ""
    # The server is told that it was accepted, and one undo takes it back.
    editor.until(lambda: editor.sent("workspace/executeCommand"), "the word that it was accepted")
    [command] = editor.sent("workspace/executeCommand")
    assert command["params"]["command"] == "midfill.accepted"
    editor.save()
    saved = VALUES + "\ntotal = sum(values)"
    editor.until(lambda: editor.file.read_text().removesuffix("\n") == saved, "the file on disk")
    editor.undo()
    editor.reads(VALUES + "\ntotal = ")


def test_what_the_editor_has_closed_by_itself_is_replaced(terminal, name):
    area = {"after": "def area", "text": "(self):\n    return [self.w]"}
    log = {"after": "log", "text": '("hello", name)'}
    editor = terminal(area, log, text="", before=PAIRS[name]).ready()
    editor.write("def area")
    editor.shows("(self):\n    return [self.w]")
    editor.type("(")
    editor.shows("self):\n    return [self.w]")
    editor.sees("def area(self):", "    return [self.w]")
    editor.reads("def area()")
    assert editor.place == (0, 9)
    editor.type("se")
    editor.shows("lf):\n    return [self.w]")
    # Its first word leaves the bracket, its second takes it.
    editor.press("C-Right")
    editor.reads("def area(self)")
    editor.press("C-Right")
    editor.reads("def area(self):")
    editor.sees("def area(self):", "    return [self.w]")
    editor.press("C-Right")
    editor.reads("def area(self):\n    return")
    editor.press("Tab")
    editor.reads("def area(self):\n    return [self.w]")
    editor.press("Enter")
    editor.type("log")
    editor.shows('("hello", name)')
    asked = editor.asked
    editor.type('("')
    editor.shows('hello", name)')
    assert editor.asked == asked
    editor.sees('log("hello", name)')
    editor.until(lambda: editor.text.endswith('log("")'), "what the editor closes")
    editor.press("Tab")
    editor.until(lambda: editor.text.endswith('log("hello", name)'), "no closer twice")


def test_a_word_and_a_line_are_accepted(terminal):
    editor = terminal(BODY, text="").ready()
    editor.write("def area(self):")
    editor.press("Enter")
    editor.shows(BODY["text"])
    editor.press("C-Right")
    editor.until(lambda: editor.text.endswith("\n    width"), "the first word")
    assert editor.ghost == " = self.w\n    return width"
    editor.press("C-Right")
    editor.until(lambda: editor.text.endswith("width ="), "a sign")
    editor.press("M-Right")
    editor.until(lambda: editor.text.endswith("width = self.w"), "the rest of the line")
    editor.sees("    width = self.w", "    return width")
    editor.press("M-Right")
    editor.reads("def area(self):\n" + BODY["text"])
    assert editor.ghost == ""
    editor.until(lambda: editor.sent("workspace/executeCommand"), "the word that it was accepted")


def test_columns_behind_characters_of_many_bytes(terminal):
    editor = terminal({"after": 'face = "🙂é" + ', "text": "str(é) + 1"}, text=VALUES).ready()
    editor.open_line('face = "🙂é" + ')
    editor.shows("str(é) + 1")
    place = editor.sent("textDocument/inlineCompletion")[-1]["params"]["position"]
    assert place == {"line": 1, "character": len('face = "🙂é" + ') + 1}
    editor.press("C-Right", "C-Right", "C-Right")
    editor.until(lambda: editor.text.endswith('face = "🙂é" + str(é'), "the words")
    editor.press("Tab")
    editor.reads(VALUES + '\nface = "🙂é" + str(é) + 1')


def test_a_server_that_dies_is_started_again(terminal):
    editor = terminal(SUM, text=VALUES).ready()
    pid = editor.server_pid
    editor.open_line("total = ")
    editor.shows("sum(values)")
    os.kill(pid, signal.SIGKILL)
    editor.until(lambda: editor.server_pid not in {None, pid} and editor.state == "ready", "a new server")
    # Whoever waits with the cursor behind the text is served without a key.
    editor.sees("total = sum(values)")
    assert editor.messages.count(f"the server crashed ({editor.KILLED}) and is being restarted") == 1
    editor.press("Tab")
    editor.reads(VALUES + "\ntotal = sum(values)")
    pid = editor.server_pid
    editor.restart()
    editor.until(lambda: editor.server_pid not in {None, pid} and editor.state == "ready", "another server")
    editor.press("Enter")
    editor.type("total = ")
    editor.shows("sum(values)")
    assert editor.messages.count("midfill: the server crashed") == 1


def test_a_server_that_dies_again_and_again_is_given_up(terminal, name, tmp_path):
    command = ["/bin/sh", "-c", f"echo start >> {tmp_path}/starts; exit 3"]
    editor = terminal(text="", command=command, before=ONE_PAUSE[name])
    editor.until(lambda: editor.state in {"given up", "given-up"}, "the end of all trials")
    assert (tmp_path / "starts").read_text().count("start") == 4
    assert editor.messages.count("(status 3) and is being restarted") == 1
    assert editor.RESTART in editor.messages


def test_a_server_that_is_not_there_is_said_once(terminal):
    editor = terminal(text="", command=["midfill-that-is-not-there", "serve"])
    editor.until(lambda: editor.state == "missing", "that it is missing")
    editor.edit("other.py")
    assert editor.messages.count("midfill-that-is-not-there") == 1
    # What is named can be installed as it stands.
    said = editor.messages.replace("\n", "").replace("'", "")
    assert f"pip install {Path(__file__).parents[2]}" in said


def test_nothing_of_the_folder_that_is_open_is_run(terminal, tmp_path, monkeypatch):
    hostile = Hostile(tmp_path, tmp_path.with_name(f"{tmp_path.name}-marks"))
    python = Path(sys.executable)
    found = {"PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]])}
    for name, value in hostile.environment(found).items():
        monkeypatch.setenv(name, value)
    _, _, *arguments = serve_command(tmp_path, (SUM,), tmp_path / "engine.log")
    editor = terminal(text=VALUES, command=[python.name, *arguments]).ready()
    editor.open_line("total = ")
    editor.shows("sum(values)")
    assert hostile.ran == []


def test_a_server_that_is_in_the_folder_that_is_open_is_none(terminal, tmp_path, monkeypatch):
    hostile = Hostile(tmp_path, tmp_path.with_name(f"{tmp_path.name}-marks"))
    for name, value in hostile.environment({"PATH": "/usr/bin:/bin"}).items():
        monkeypatch.setenv(name, value)
    editor = terminal(text=VALUES, command=["midfill", "serve"])
    editor.until(lambda: editor.state == "missing", "that it is missing")
    assert hostile.ran == []


EXPLAIN = {"emacs": "(progn (midfill-explain) t)", "vim": "execute('Midfill explain')"}


@pytest.mark.parametrize(("explanation", "said"), FUTURE)
def test_a_reason_that_is_not_known_here_is_told(terminal, name, explanation, said):
    command = [sys.executable, str(FUTURE_SERVER), json.dumps(explanation)]
    editor = terminal(text=VALUES, command=command).ready()
    ask = editor.lisp if name == "emacs" else editor.eval
    ask(EXPLAIN[name])
    editor.until(lambda: said in editor.messages, "the explanation")


@pytest.mark.real
@pytest.mark.slow
def test_the_default_model_suggests_something(terminal, model):
    text = "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return"
    settings = {"max_new_tokens": 32, "eagerness": "always"}
    editor = terminal(None, text=text, settings=settings).ready()
    editor.append(" ")
    editor.until(lambda: editor.ghost, "any ghost text")
    before, ghost = editor.text, editor.ghost
    editor.press("Tab")
    editor.reads(before + ghost)
