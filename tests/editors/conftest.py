import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from real_emacs import Emacs
from real_neovim import Neovim, find_nvim
from real_vim import Vim


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
