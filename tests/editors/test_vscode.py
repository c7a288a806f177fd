"""The extension in the real VS Code, in a real browser, with the real server.

One window serves most tests, since a window takes seconds to open and a file does not. Each test has a file.
"""

import json
import os
import signal
import sys
import zipfile
from pathlib import Path

import pytest
from real_vscode import EXTENSION, STATUS, Window, npm

from midfill import __version__

# A real window in a real browser misses a key now and then.
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow, pytest.mark.flaky(reruns=1)]

SERVE = {"midfill__server__command": [sys.executable, "-P", "-m", "midfill"]}
VALUES = "values = [1, 2]\n"
RULES = [
    {"after": "total = ", "text": "sum(values)"},
    {"after": "area(self):\n    ", "text": "width = self.w\n    return width"},
    {"after": 'face = "🙂é" + ', "text": "str(é) + 1"},
    {"after": "slow = ", "text": "1" * 100, "token_delay_s": 0.3},
    {"after": "quick = ", "text": "2"},
    {"after": "steady = ", "text": "steadily", "token_delay_s": 0.01},
]


class Engine:
    """A scripted engine: settings that make the server use it, and what became of its work."""

    def __init__(self, folder, rules, **options):
        self.log = folder / "engine.log"
        self.server_log = folder / "server.log"
        self.script = folder / "script.json"
        folder.mkdir(exist_ok=True)
        script = {"rules": rules, "log": str(self.log), "log_begun": True} | options
        self.script.write_text(json.dumps(script))

    @property
    def settings(self):
        # The script's tokens are characters. Looking ahead is off so that model calls can be counted.
        return SERVE | {
            "midfill__server__arguments": [
                f"--engine=scripted:{self.script}",
                f"--log-file={self.server_log}",
                "--log-level=info",
            ],
            "midfill__prefetch": False,
            "midfill__maxNewTokens": 200,
        }

    def answered(self, reason):
        """How often the server has given this reason for an empty answer."""
        return self.server_log.read_text().count(f": none {reason} in ")

    @property
    def calls(self):
        rows = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(row)["outcome"] for row in rows]


@pytest.fixture(scope="module")
def engine(vscode):
    return Engine(vscode.folder / "engine", RULES)


@pytest.fixture(scope="module")
def shared(vscode, engine):
    """The window that most tests use."""
    vscode.configure(**engine.settings)
    window = Window(vscode, vscode.folder / "work")
    yield window
    window.close()


@pytest.fixture
def window(shared, vscode, engine, picture):
    """The shared window as it was at first: no messages, the first settings, a server that is ready."""
    vscode.configure(**engine.settings)
    shared.press("Escape")
    shared.run("Notifications: Clear All Notifications")
    shared.shows("scripted")
    yield shared
    picture(shared)


@pytest.fixture
def another_window(vscode, picture):
    """Opens a window of its own: `another_window(name)`."""
    windows = []

    def start(name, **options):
        window = Window(vscode, vscode.folder / name, **options)
        windows.append(window)
        return window

    yield start
    for window in windows:
        picture(window)
        window.close()


def test_types_lint_and_formatting(vscode):
    npm("run", "check")


def test_the_package_has_these_files_and_no_others(vscode):
    files = {
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "dist/NOTICES.txt",
        "dist/extension.js",
        "media/ghost-text.png",
        "media/icon.png",
        "package.json",
        f"server/midfill-{__version__}-py3-none-any.whl",
        *(f"walkthrough/{page.name}" for page in (EXTENSION / "walkthrough").glob("*.md")),
    }
    assert set(npm("run", "--silent", "files").split()) == files
    # Packaging writes the names of some pages in its own way.
    packed = zipfile.ZipFile(EXTENSION / "midfill.vsix").namelist()
    inside = {name.removeprefix("extension/").lower() for name in packed if name.startswith("extension/")}
    assert {name.removesuffix(".txt") for name in inside} == {
        name.lower().removesuffix(".txt") for name in files
    }


# Ghost text


def test_ghost_text_of_several_lines_is_shown_and_accepted(window):
    window.open("lines.py", "class Box:\n    pass\n\n\ndef ")
    window.type("area(self):\n")
    window.sees("width = self.w\n    return width")
    window.press("Tab")
    window.saves("class Box:\n    pass\n\n\ndef area(self):\n    width = self.w\n    return width")
    assert window.ghost == ""


def test_a_word_and_a_line_are_accepted(window):
    window.open("parts.py", "def ")
    window.type("area(self):\n")
    window.gets("width = self.w\n    return width")
    window.press("Control+ArrowRight")
    window.sees(" = self.w\n    return width")
    window.press("Alt+ArrowRight")
    window.sees("    return width")
    window.saves("def area(self):\n    width = self.w\n")


def test_a_suggestion_is_dismissed_and_asked_for_again(window):
    window.open("dismissed.py", VALUES)
    window.type("total = ")
    window.gets("sum(values)")
    window.press("Escape")
    window.sees("")
    window.press("Alt+Backslash")
    window.gets("sum(values)")
    window.press("Escape")
    window.sees("")
    window.press("Tab")
    window.saves(VALUES + "total =     ")


def test_typing_through_a_suggestion_keeps_it_and_asks_no_model(window, engine):
    window.open("through.py", VALUES)
    window.type("total = ")
    window.gets("sum(values)")
    window.until(lambda: engine.calls[-1:] == ["finished"], "the end of the model's work")
    calls = engine.calls
    for index, key in enumerate("sum"):
        window.type(key)
        window.sees("sum(values)"[index + 1 :])
    assert engine.calls == calls
    window.press("Tab")
    window.saves(VALUES + "total = sum(values)")


def test_an_emoji_before_the_cursor(window):
    window.open("emoji.py", VALUES)
    window.page.keyboard.insert_text('face = "🙂é" + ')
    window.press("Alt+Backslash")
    window.gets("str(é) + 1")
    window.press("Tab")
    window.saves(VALUES + 'face = "🙂é" + str(é) + 1')


def test_typing_on_takes_the_work_back_and_shows_only_the_last_suggestion(window, engine):
    window.open("typing_on.py", VALUES)
    before = len(engine.calls)
    shown = window.watch_ghost()
    # All at once, so that only the whole of it is asked for.
    window.page.keyboard.insert_text("slow = ")
    window.press("Alt+Backslash")
    window.until(lambda: engine.calls[before:][-1:] == ["begun"], "the work of the model")
    window.type("x\nquick = ")
    window.gets("2")
    window.until(lambda: "cancelled" in engine.calls[before:], "the end of that work")
    assert set(shown()) <= {"", "2"}
    window.press("Tab")
    window.saves(VALUES + "slow = x\nquick = 2")


def test_an_item_of_the_popup_if_so_wanted(window, vscode, engine):
    window.open("popup.py", VALUES)
    window.type("total = ")
    window.gets("sum(values)")
    window.press("Control+Space")
    window.until(lambda: "values" in window.popup, "the editor's own items")
    assert not any("sum(" in item for item in window.popup)
    vscode.configure(**engine.settings, midfill__popup=True)
    window.asks_popup_for("sum(values)")
    window.press("Enter")
    window.saves(VALUES + "total = sum(values)")


# The server


def test_a_server_that_dies_is_started_again(window):
    window.open("death.py", VALUES)
    [pid] = window.server_pids
    os.kill(pid, signal.SIGKILL)
    window.until(lambda: window.server_pids not in ([], [pid]), "a new server")
    window.shows("scripted")
    window.type("total = ")
    window.gets("sum(values)")
    assert window.notes == []


def test_a_server_that_dies_again_and_again_is_given_up(window, vscode, engine):
    starts = vscode.folder / "starts"
    dying = ["/bin/sh", "-c", f"echo start >> {starts}; exit 3"]
    vscode.configure(**engine.settings | {"midfill__server__command": dying})
    window.shows("midfill stopped")
    window.says("crashed 3 times within three minutes (status 3)")
    assert starts.read_text().count("start") == 3
    assert "status 3" in window.tooltip
    vscode.configure(**engine.settings)
    window.shows("scripted")
    assert len(window.server_pids) == 1


def test_a_wrong_command_leads_to_its_setting(window, vscode, engine):
    vscode.configure(**engine.settings | {"midfill__server__command": ["/nowhere/midfill"]})
    window.shows("midfill stopped")
    window.says("The server cannot be started (spawn /nowhere/midfill ENOENT)")
    # It never ran, so it has not crashed, and is not started again.
    assert len(window.notes) == 1
    window.click("Settings")
    window.page.locator(".tab.active", has_text="Settings").wait_for()
    window.press("Control+W")
    vscode.configure(**engine.settings)
    window.shows("scripted")


def test_settings_count_without_a_restart(window, vscode, engine):
    window.open("settings.py", VALUES)
    pids = window.server_pids
    vscode.configure(**engine.settings | {"midfill__maxNewTokens": 3})
    window.type("total = ")
    window.until(lambda: window.ghost or window.press("Alt+Backslash"), "ghost text")
    window.press("Escape")
    vscode.configure(**engine.settings, midfill__enabled=False)
    window.shows("midfill off")
    vscode.configure(**engine.settings)
    window.shows("scripted")
    assert window.server_pids == pids


def test_a_setting_that_counts_at_the_start_restarts_the_server(window, vscode, engine):
    [pid] = window.server_pids
    vscode.configure(**engine.settings, midfill__numThreads=1)
    window.until(lambda: window.server_pids not in ([], [pid]), "a new server")
    window.until(lambda: len(window.server_pids) == 1, "the end of the old server")
    window.shows("scripted")
    assert window.notes == []


def test_restart(window):
    [pid] = window.server_pids
    window.run("midfill: Restart Server")
    window.until(lambda: len(window.server_pids) == 1 and window.server_pids != [pid], "a new server")
    window.shows("scripted")
    assert window.notes == []


# The status bar item and its menu


def test_the_status_while_the_model_is_loaded_and_when_it_cannot_be(window, vscode):
    loading = Engine(vscode.folder / "loading", RULES, load_delay_s=600, load_share=0.4)
    vscode.configure(**loading.settings)
    window.shows("midfill 40 %")
    assert "reading the script" in window.tooltip
    failing = Engine(vscode.folder / "failing", RULES, load_error="There is no such script.")
    vscode.configure(**failing.settings)
    window.shows("midfill failed")
    window.says("There is no such script.")
    assert "There is no such script." in window.tooltip


def test_the_tooltip_tells_the_model_and_its_speed(window):
    window.open("speed.py", VALUES)
    window.type("steady = ")
    window.gets("steadily")
    window.until(lambda: "tokens per second" in window.tooltip, "the speed")
    assert "cpu, script" in window.tooltip


def test_toggle(window, engine):
    window.open("toggle.py", VALUES)
    window.run("midfill: Toggle Suggestions")
    window.shows("midfill off")
    window.type("total = ")
    window.until(lambda: engine.answered("disabled"), "an answer")
    assert window.ghost == ""
    window.explains("switched off")
    window.run("midfill: Toggle Suggestions")
    window.shows("scripted")
    window.press("Alt+Backslash")
    window.gets("sum(values)")


def test_toggle_for_a_language(window):
    window.open("language.py", VALUES)
    window.run("midfill: Toggle Suggestions for This Language")
    window.shows("midfill off: python")
    window.run("midfill: Toggle Suggestions for This Language")
    window.shows("scripted")


def test_a_file_that_gets_nothing_says_so_and_why(window):
    window.open("local.env", "NAME=value\n")
    window.shows("midfill off: this file")
    # As VS Code spells the setting.
    assert "midfill.excludedFiles" in window.tooltip
    window.press("Alt+Backslash")
    window.explains("midfill.excludedFiles")
    window.open("allowed.py", VALUES)
    window.shows("scripted")


def test_snooze_and_the_menu(window, engine):
    window.open("menu.py", VALUES)
    window.page.locator(STATUS).click()
    window.choose("Snooze suggestions")
    window.choose("15 minutes")
    window.shows("midfill snoozed")
    assert "No suggestions until" in window.tooltip
    before = engine.answered("disabled")
    window.press("Control+1")
    window.type("total = ")
    window.until(lambda: engine.answered("disabled") > before, "an answer")
    window.page.locator(STATUS).click()
    window.choose("End snooze")
    window.shows("scripted")
    window.press("Control+1")
    window.press("Alt+Backslash")
    window.gets("sum(values)")


def test_explain_the_last_suggestion(window):
    window.open("explain.py", VALUES)
    window.type("total = ")
    window.gets("sum(values)")
    window.press("Escape")
    window.explains("The last suggestion came from: ")
    window.click("Details")
    window.page.locator(".tab.active", has_text="explanation.json").wait_for()
    window.until(lambda: '"segments"' in window.lines, "the explanation")


def test_models_and_adapters_are_offered(window):
    window.run("midfill: Choose Model")
    window.until(lambda: any("qwen2.5-coder-1.5b" in one for one in window.choices), "the models")
    window.press("Escape")
    window.run("midfill: Choose Adapter")
    window.until(lambda: any("Choose a folder" in one for one in window.choices), "the adapters")
    window.press("Escape")


def test_an_adapter_is_learnt_only_if_the_user_agrees(window, model):
    question = f"train an adapter for {model.name} on the git history of"
    window.run("midfill: Train an Adapter on This Repository")
    window.says(question)
    window.click("Do not train")
    window.until(lambda: not window.notes, "the end of the question")
    # It takes a moment until the one before is over, and another may be asked for.
    window.again(
        "the question",
        lambda: any(question in note for note in window.notes),
        lambda: window.run("midfill: Train an Adapter on This Repository"),
    )
    window.page.get_by_role("button", name="Train", exact=True).click()
    # The folder is no repository, which whoever reads its history finds.
    window.says("is in no git repository")


# Trust and installation


def test_restricted_mode_ignores_the_settings_of_a_workspace(another_window, vscode, engine):
    marker = vscode.folder / "was-run"
    theirs = {
        "midfill.enabled": False,
        "midfill.server.command": ["/bin/sh", "-c", f"touch {marker}"],
        "midfill.server.arguments": ["--engine", "scripted:/nowhere"],
        "midfill.model": "/nowhere",
        "midfill.adapter": "/nowhere",
    }
    settings = vscode.folder / "untrusted" / ".vscode" / "settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(theirs))
    trust = {"security.workspace.trust.enabled": True, "security.workspace.trust.startupPrompt": "never"}
    vscode.configure(**engine.settings, **trust)
    window = another_window("untrusted")
    window.shows("scripted")
    window.open("main.py", VALUES)
    window.type("total = ")
    window.gets("sum(values)")
    # Trusted, the workspace may switch suggestions off, but not choose what is run.
    window.trust()
    window.shows("midfill off")
    assert not marker.exists()


def test_the_server_is_installed_into_an_environment_of_its_own(another_window, vscode, engine):
    none = {"midfill__server__command": [], "midfill__server__arguments": []}
    vscode.configure(**engine.settings | none, midfill__model="/nowhere/tiny.gguf")
    window = another_window("install")
    window.says("The server is not installed")
    # What is fetched, how much it is, and where it goes.
    [note] = window.notes
    assert all(words in note for words in ("1.6 GB or more", "/nowhere/tiny.gguf", "midfill.midfill/server"))
    assert window.status == "midfill"
    window.click("Install")
    window.shows("midfill downloading")
    # One answer for both: the model is fetched next, without another question. Here that cannot succeed.
    window.says("There is no model '/nowhere/tiny.gguf'")
    assert [note for note in window.notes if "Download it" in note] == []
    window.shows("midfill: no model")
    window.run("Notifications: Clear All Notifications")
    vscode.configure(**engine.settings | {"midfill__server__command": []})
    window.shows("scripted")
    program = vscode.data / "User/globalStorage/midfill.midfill/server/bin/midfill"
    assert window.serves(program)
    window.open("main.py", VALUES)
    window.type("total = ")
    window.gets("sum(values)")
    # One on the PATH is preferred, once it is there.
    vscode.program("midfill", Path(sys.executable).parent / "midfill")
    window.run("midfill: Restart Server")
    window.until(lambda: window.serves(Path(sys.executable).parent / "midfill"), "the server on the PATH")
    window.shows("scripted")


PULLING = """#!/bin/sh
# midfill, but a download takes until the file `go` is here, and brings the scripted model.
here={folder}
if [ "$1 $2" = "model pull" ]; then
    echo "fetching it: 100 of 1117 MB (8 %)" >&2
    while [ ! -e $here/go ]; do [ -e $here ] && sleep 0.05 || exit 1; done
    touch $here/pulled
    exit 0
fi
[ "$1" != serve ] || [ ! -e $here/pulled ] || exec {python} -P -m midfill "$@" --engine scripted:{script}
exec {python} -P -m midfill "$@"
"""


def test_a_missing_model_is_offered_and_downloaded_with_its_progress(
    another_window, vscode, engine, tmp_path
):
    program = tmp_path / "midfill"
    program.write_text(PULLING.format(folder=tmp_path, python=sys.executable, script=engine.script))
    program.chmod(0o755)
    vscode.configure(midfill__server__command=[str(program)], midfill__model="qwen2.5-coder-1.5b")
    window = another_window("missing")
    window.shows("midfill: no model")
    window.says("The model qwen2.5-coder-1.5b (1.1 GB) is not on this machine. Download it into ")
    # One question, no error, and nothing that asks for a command of a terminal.
    assert len(window.notes) == 1
    assert "midfill model pull" not in window.notes[0] + window.tooltip
    window.page.locator(STATUS).click()
    window.choose("Download the model")
    window.shows("midfill downloading")
    window.says("100 of 1117 MB")
    assert "100 of 1117 MB" in window.tooltip
    # Cancelled, it can be asked for again.
    window.click("Cancel")
    window.shows("midfill: no model")
    window.run("midfill: Download the Chosen Model")
    window.shows("midfill downloading")
    (tmp_path / "go").touch()
    window.shows("scripted")
    window.open("main.py", VALUES)
    window.type("total = ")
    window.gets("sum(values)")


def test_the_walkthrough_has_no_marks_that_vs_code_draws_as_they_are():
    manifest = json.loads((EXTENSION / "package.json").read_text(encoding="utf-8"))
    steps = manifest["contributes"]["walkthroughs"][0]["steps"]
    assert steps
    assert [step for step in steps if "`" in step["title"] + step["description"]] == []


def test_nothing_of_the_folder_that_is_open_is_run(another_window, vscode, engine):
    """The extension host runs in the folder, and whoever starts it has relative folders on the PATH.

    What has been run by the other tests of this module counts, too: the installation among them.
    """
    hostile = vscode.hostile
    # Another test may have put one on the PATH.
    (vscode.programs / "midfill").unlink(missing_ok=True)
    # As documented, where the server is a module.
    vscode.program("environment-python", sys.executable)
    vscode.configure(
        **engine.settings | {"midfill__server__command": ["environment-python", "-m", "midfill"]}
    )
    window = another_window(hostile.folder)
    window.shows("scripted")
    window.open("main.py", VALUES)
    window.type("total = ")
    window.gets("sum(values)")
    window.run("midfill: Choose Model")
    window.until(lambda: any("qwen2.5-coder-1.5b" in one for one in window.choices), "the models")
    window.press("Escape")
    window.run("midfill: Choose Adapter")
    window.until(lambda: any("Choose a folder" in one for one in window.choices), "the adapters")
    window.press("Escape")
    # A program of the folder is not found, whatever the PATH and the setting say.
    for name in ("midfill", "./midfill", "bin/midfill"):
        vscode.configure(**engine.settings | {"midfill__server__command": [name]})
        window.until(lambda name=name: f'Cannot run "{name}"' in window.tooltip, f"that {name} is none")
    vscode.configure(**engine.settings | {"midfill__server__command": []})
    window.run("midfill: Install Server in a Separate Environment")
    window.shows("scripted")
    assert window.serves(vscode.data / "User/globalStorage/midfill.midfill/server/bin/midfill")
    assert hostile.ran == []


def test_files_of_a_virtual_workspace(another_window, vscode, engine):
    vscode.configure(**engine.settings)
    window = another_window("virtual", is_empty=True)
    window.shows("scripted")
    window.run("Memory: folder")
    window.until(
        lambda: window.page.locator(".explorer-folders-view", has_text="main.py").count(), "the folder"
    )
    window.run("Memory: file")
    window.page.locator(".tab.active", has_text="main.py").wait_for()
    window.shows("scripted")
    window.press("Control+End", "Alt+Backslash")
    window.type("total = ")
    window.gets("sum(values)")


@pytest.mark.real
def test_the_default_model_suggests_something(window, vscode, tmp_path):
    vscode.configure(**SERVE, midfill__eagerness="always")
    window.shows("qwen2.5-coder-0.5b")
    window.open("real.py", "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    ")
    window.type("return ")
    window.until(lambda: window.ghost, "any ghost text")
    before = window.lines
    window.press("Tab")
    window.press("Control+S")
    window.until(lambda: len(window.text) > len(before), "the accepted text")
