"""What `midfill setup --write` writes, in the real editor."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.real
@pytest.mark.slow
def test_neovim_shows_ghost_text_with_what_setup_has_written(neovim, tmp_path):
    config = tmp_path / "home"
    environment = os.environ | {"XDG_CONFIG_HOME": str(config), "HOME": str(tmp_path)}
    command = [sys.executable, "-P", "-m", "midfill", "setup", "neovim", "--write", "--json"]
    done = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    assert [editor["status"] for editor in done["editors"]] == ["written"]
    text = "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return "
    editor = neovim(None, text=text, config=config)
    assert editor.lua("return require('midfill.config').values.cmd") == done["command"]
    editor.press("GA")
    editor.until(lambda: editor.ghost, "any ghost text")
