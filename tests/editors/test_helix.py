"""The real Helix, with midfill beside a language's own server that answers late."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from real_helix import PROGRAM, Helix

from midfill.cli.editor_helix import read_health

pytestmark = pytest.mark.slow

FUNCTION = "def total(items):\n    \n"
SUM = {"after": "re", "text": "turn sum(item.price for item in items)", "prefill_delay_s": 0.35}
LABEL = "return sum(item.price for item in items)"


@pytest.fixture(scope="session")
def hx():
    """Debian's newest Helix. It is not for every machine: without it the tests are skipped, in CI too."""
    if os.environ.get("CI"):
        subprocess.run([Path(__file__).with_name("install.sh"), "helix"], check=False)
    asked = [PROGRAM, "--version"]
    if not PROGRAM.exists() or subprocess.run(asked, check=False, capture_output=True).returncode != 0:
        pytest.skip("HELIX WAS NOT TESTED: it is not here. Try: tests/editors/install.sh helix")


@pytest.fixture
def helix(hx, tmp_path):
    """Start Helix: `helix(rule, ...)`; see `Helix`."""
    editors = []

    def start(*rules, **options):
        editor = Helix(tmp_path, rules, settings={"eagerness": "always", "healing": False}, **options)
        editors.append(editor)
        editor.open()
        return editor

    yield start
    for editor in editors:
        editor.close()


@pytest.mark.parametrize("delay_s", [0.0, 1.0], ids=["fast", "slow"])
def test_the_items_of_both_servers_appear_while_typing(helix, delay_s):
    """An early empty answer of midfill would open nothing, and hide what the slower server sends."""
    editor = helix(SUM, text=FUNCTION, delay_s=delay_s, labels=["return", "reversed"])
    editor.write("re")
    editor.popup(LABEL, "return", "reversed")


def test_the_other_server_is_seen_where_midfill_has_nothing(helix):
    editor = helix({"text": ""}, text=FUNCTION, delay_s=1.0)
    editor.write("re")
    editor.popup("return")
    # Typed on, it is still there: midfill's nothing is no news.
    editor.type("tu")
    editor.popup("return")


@pytest.mark.parametrize("order", [("own", "midfill"), ("midfill", "own")])
def test_the_items_of_the_server_that_is_named_last_are_on_top(helix, order):
    labels = {"own": "return", "midfill": LABEL}
    editor = helix(SUM, text=FUNCTION, order=order)
    editor.write("re")
    editor.popup(*(labels[name] for name in reversed(order)))


def test_an_item_of_several_lines_is_inserted_as_it_is_and_undone_at_once(helix):
    body = "turn sum(\n        item.price for item in items\n    )"
    editor = helix({"after": "re", "text": body}, text=FUNCTION)
    editor.write("re")
    editor.popup("return sum(", "return")
    editor.press("Tab", "Enter")
    editor.escape()
    editor.saves(f"{FUNCTION[:-1]}re{body}\n")
    editor.type("u")
    editor.saves(f"{FUNCTION[:-1]}re\n")


def test_the_commands_that_a_person_can_use_are_listed(helix):
    editor = helix(text=FUNCTION)
    editor.type(":lsp-workspace-command")
    editor.press("Enter")

    def listed():
        return {word for line in editor.screen for word in line.split() if word.startswith("midfill.")}

    named = {f"midfill.{name}" for name in ("explain", "adapter.off", "adapter.train", "adapter.stop")}
    editor.until(lambda: listed() == named, "the list of commands")


def test_setup_adds_midfill_to_the_servers_that_this_helix_has(hx, tmp_path):
    environment = os.environ | {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    environment["PATH"] = f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}"

    def servers():
        asked = [PROGRAM, "--health", "python"]
        return read_health(
            subprocess.run(asked, env=environment, check=True, capture_output=True).stdout.decode()
        )

    def setup(*options):
        command = [sys.executable, "-P", "-m", "midfill", "setup", "helix", "--write", "--json", *options]
        done = subprocess.run(command, env=environment, check=True, capture_output=True)
        return json.loads(done.stdout)["editors"][0]["file"]

    before = servers()
    assert before == ["ty", "ruff", "jedi", "pylsp", "zuban"]
    written = Path(setup())
    lists = {one["name"]: one["language-servers"] for one in tomllib.loads(written.read_text())["language"]}
    assert lists["python"] == [*before, "midfill"]
    assert lists["ruby"] == ["ruby-lsp", "solargraph", "midfill"]
    assert servers() == before
    setup("--undo")
    assert not written.exists()
