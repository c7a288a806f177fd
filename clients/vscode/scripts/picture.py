"""Take the picture of ghost text in VS Code: the packaged extension, a real VS Code, the default model.

Run it with a Python that has `midfill[editors]`, where tests/editors/install.sh has installed VS Code.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE.parents[1] / "tests" / "editors"))

import real_vscode  # noqa: E402 - from the tests, which drive it

TARGET = HERE / "media" / "ghost-text.png"
TEXT = '''\
import csv
from dataclasses import dataclass


@dataclass
class Reading:
    station: str
    celsius: float


def read(path):
    with open(path, newline="") as file:
        return [Reading(row["station"], float(row["celsius"])) for row in csv.DictReader(file)]


def mean_by_station(readings):
    """The mean temperature of each station."""
'''


def take(folder: Path) -> None:
    """Open the text, type what leads to a suggestion, and take the picture."""
    code = real_vscode.VSCode(folder, real_vscode.package())
    try:
        code.configure(
            midfill__server__command=[sys.executable, "-P", "-m", "midfill"],
            midfill__maxNewTokens=64,
            midfill__maxNewTokensInvoked=64,
            midfill__eagerness="always",
            workbench__colorTheme="Default Dark Modern",
            editor__fontSize=13,
        )
        window = real_vscode.Window(code, folder / "weather")
        window.page.set_viewport_size({"width": 860, "height": 500})
        window.shows("qwen2.5-coder-0.5b")
        window.open("readings.py", TEXT)
        window.press("Control+B")
        window.type("    totals = {}\nfor reading in readings:\n")
        window.again("ghost text", lambda: window.ghost, lambda: window.press("Alt+Backslash"))
        window.page.screenshot(path=TARGET)
        sys.stdout.write(f"{window.ghost}\n{TARGET}: {TARGET.stat().st_size} bytes\n")
    finally:
        code.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        take(Path(name))
