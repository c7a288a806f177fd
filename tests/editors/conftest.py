import os

import pytest
from real_neovim import Neovim, find_nvim


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
