import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import real_vscode
from hostile import Hostile
from real_emacs import Emacs
from real_neovim import Neovim, find_nvim
from real_vim import Vim

FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


def installed(editor, *programs):
    """The path of an editor's first program. CI installs what is missing; a developer without it skips."""
    script = Path(__file__).with_name("install.sh")
    if os.environ.get("CI"):
        subprocess.run([script, editor], check=True)
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed here: tests/editors/install.sh {editor}")
    return shutil.which(programs[0])


@pytest.fixture(scope="session")
def nvim_program():
    """The real Neovim. A developer without one skips; CI fails."""
    program = find_nvim()
    if program is None:
        message = "Neovim is not installed here: pip install '.[editors]'"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return program


@pytest.fixture
def neovim(nvim_program, tmp_path):
    """Start an editor with the plugin: `neovim(rule, ...)`; see `Neovim`."""
    editors = []

    def start(*rules, **options):
        editor = Neovim(nvim_program, tmp_path, rules, **options)
        editors.append(editor)
        return editor

    yield start
    for editor in editors:
        editor.close()


@pytest.fixture(scope="session")
def emacs_program():
    return installed("emacs", "emacs", "tmux")


@pytest.fixture(scope="session")
def vim_program():
    return installed("vim", "vim", "tmux")


def starter(kind, folder, editors):
    """A function that starts an editor, which ends with `editors`."""

    def start(*rules, **options):
        editor = kind(folder, rules, **options)
        editors.callback(editor.close)
        editor.open()
        return editor

    return start


@pytest.fixture
def emacs(emacs_program, tmp_path):
    """Start an editor with the package: `emacs(rule, ...)`; see `Emacs`."""
    with contextlib.ExitStack() as editors:
        yield starter(Emacs, tmp_path, editors)


@pytest.fixture
def vim(vim_program, tmp_path):
    """Start an editor with the plugin: `vim(rule, ...)`; see `Vim`."""
    with contextlib.ExitStack() as editors:
        yield starter(Vim, tmp_path, editors)


@pytest.fixture(scope="module")
def vscode(tmp_path_factory):
    """VS Code's server with the packaged extension, and a browser. Not for the whole session: as long as the
    browser's driver lives, no test can have an event loop."""
    installed("vscode", "chromium", "node", "npm")
    if not real_vscode.SERVER_MAIN.exists():
        pytest.skip("VS Code is not installed here: tests/editors/install.sh vscode")
    hostile = Hostile(tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("marks") / "marks")
    folder = tmp_path_factory.mktemp("vscode")
    extensions = [real_vscode.package(), real_vscode.package_memory(folder)]
    code = real_vscode.VSCode(folder, *extensions, hostile=hostile)
    yield code
    code.close()


@pytest.fixture
def picture(request, tmp_path_factory):
    """Takes a picture of a window where the test has failed; called before the window is closed."""

    def take(window):
        if request.node.stash.get(FAILED, False):
            path = tmp_path_factory.getbasetemp() / f"{request.node.name}-{window.folder.name}.png"
            window.page.screenshot(path=path)
            print(f"screenshot: {path}")

    return take
