"""A folder such as a stranger's repository may be: whatever of it is run or imported leaves a mark."""

from __future__ import annotations

import os

MODULES = [
    *("asyncio", "encodings", "ensurepip", "json", "midfill", "numpy", "pip", "sitecustomize", "torch"),
    *("runpy", "tomllib", "usercustomize", "venv"),
]
# Not git and the like: editors start those by themselves, and find them as they do.
PROGRAMS = ["midfill", "py", "python", "python3", *(f"python3.{minor}" for minor in range(11, 15))]


class Hostile:
    """Fills a folder.

    Args:
        folder: is made if it is not there.
        marks: a file outside of it.
    """

    def __init__(self, folder, marks):
        self.folder = folder
        self._marks = marks
        folder.mkdir(parents=True, exist_ok=True)
        for name in MODULES:
            mark = f"import os\nos.system('echo module {name} >> {marks}')\n"
            (folder / f"{name}.py").write_text(mark)
            package = folder / "lib" / name
            package.mkdir(parents=True)
            for file in ("__init__.py", "__main__.py"):
                (package / file).write_text(mark)
        for name in PROGRAMS:
            for place in (folder, folder / "bin"):
                place.mkdir(exist_ok=True)
                (place / name).write_text(f"#!/bin/sh\necho program {name} >> {marks}\nexit 1\n")
                (place / name).chmod(0o755)

    def environment(self, variables):
        """Those variables, with folders that are relative to the current one before all others."""
        before = {"PATH": [".", "bin", ""], "PYTHONPATH": ["", "lib"]}
        return {
            name: os.pathsep.join([*folders, *filter(None, [variables.get(name)])])
            for name, folders in before.items()
        }

    @property
    def ran(self):
        """What has been run or imported."""
        return self._marks.read_text().splitlines() if self._marks.exists() else []
