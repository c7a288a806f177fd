"""Draws the README's picture of ghost text: the real Neovim in tmux, the real server, the default model.

    python tests/editors/neovim_picture.py clients/neovim/ghost-text.svg

Needs tmux, and the default model on this machine.
"""

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from real_neovim import LIMIT_S, PLUGIN, POLL_S, find_nvim
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COLUMNS, ROWS = 72, 15
GHOST = re.compile(r" +return \S")
TEXT = """from dataclasses import dataclass


@dataclass
class Box:
    width: float
    height: float

    def area(self) -> float:
        return self.width * self.height

    def perimeter(self) -> float:
        return"""


def main(target):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "box.py").write_text(TEXT + "\n")
        command = json.dumps([sys.executable, "-P", "-m", "midfill", "serve"])
        (folder / "init.lua").write_text(
            f"vim.opt.runtimepath:prepend('{PLUGIN}') vim.opt.swapfile = false vim.o.termguicolors = true "
            "vim.o.ruler = false vim.o.showmode = false vim.o.laststatus = 0 "
            f"require('midfill').setup {{ cmd = vim.json.decode('{command}') }}"
        )

        def tmux(*arguments):
            # A server of its own: nobody's sessions are touched.
            done = subprocess.run(
                ["tmux", "-S", str(folder / "tmux"), *arguments], capture_output=True, text=True, check=True
            )
            return done.stdout

        nvim = [find_nvim(), "-i", "NONE", "-u", str(folder / "init.lua"), str(folder / "box.py")]
        environment = [f"-e{key}={value}" for key, value in os.environ.items() if key.startswith("MIDFILL_")]
        tmux("-f", "/dev/null", "new-session", "-d", *environment, f"-x{COLUMNS}", f"-y{ROWS}", *nvim)
        try:
            tmux("send-keys", "GA ")
            end = time.monotonic() + LIMIT_S
            while not any(map(GHOST.match, tmux("capture-pane", "-p").split("\n")[TEXT.count("\n") :])):
                if time.monotonic() > end:
                    sys.exit("No ghost text came:\n" + tmux("capture-pane", "-p"))
                time.sleep(POLL_S)
            screen = tmux("capture-pane", "-p", "-e")
        finally:
            tmux("kill-server")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    lines = [line for line in screen.rstrip().split("\n") if not line.endswith("~")]
    console.print(Text.from_ansi("\n".join(lines[:ROWS])))
    # No fonts from elsewhere: whoever looks at the picture asks nobody for anything.
    form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    # The colours of Neovim's own scheme.
    theme = TerminalTheme((20, 22, 27), (224, 226, 234), [(224, 226, 234)] * 8)
    console.save_svg(target, title="Neovim, midfill", code_format=form, theme=theme)
    print(f"{target}: {Path(target).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1])
