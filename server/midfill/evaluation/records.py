"""Results of an evaluation as a file of JSON lines, from which a stopped run can resume.

The first line tells what was measured and how; a run with another model, seed or setting cannot resume it.
The file contains source text, and only its owner can read it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from midfill.errors import MidfillError
from midfill.system import text_files
from midfill.system.file_errors import why_unreadable, why_unwritable


class Records:
    """The results of one run, by id.

    Attributes:
        header: what was measured, and how.
        rows: the results so far, in order, by id.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        """Resume the file at `path`, or create it; with None nothing is written.

        Raises `MidfillError` if the file is of another run, naming the difference, or cannot be used.
        """
        self.header = json.loads(json.dumps(header))
        self.rows: dict[str, dict[str, Any]] = {}
        self._path = path
        if path is None:
            return
        found = _read(path) if path.exists() else (None, {})
        if found[0] is None and found[1]:
            raise MidfillError(
                f"{path} has results without a header, so it cannot be resumed. Use another file."
            )
        if found[0] is not None:
            _must_agree(path, found[0], self.header)
            self.rows = found[1]
            # A killed run may have left an incomplete line.
            if not path.read_bytes().endswith(b"\n"):
                self._write("\n")
            return
        self._write(json.dumps(self.header) + "\n")

    def keep(self, row: Mapping[str, Any]) -> None:
        """Add one result, which has an "id"."""
        self.rows[row["id"]] = dict(row)
        if self._path is not None:
            self._write(json.dumps(row) + "\n")

    def _write(self, text: str) -> None:
        if self._path is None:
            return
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "a", encoding="utf-8") as out:
                out.write(text)
        except OSError as error:
            raise MidfillError(f"Cannot write results to {self._path}: {why_unwritable(error)}.") from error


def read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the header and the results of a finished or unfinished run. Raises `MidfillError`."""
    header, rows = _read(path)
    if header is None:
        raise MidfillError(
            f"{path} is not a file of results. To make one, run: midfill eval ... --results FILE"
        )
    return header, rows


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    try:
        lines = text_files.read(path).splitlines()
    except (OSError, UnicodeError) as error:
        raise MidfillError(f"Cannot read results from {path}: {why_unreadable(error)}.") from error
    header = None
    rows = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            # An incomplete line of a killed run; that result is made again.
            continue
        if isinstance(row, dict) and "eval" in row:
            header = row
        elif isinstance(row, dict) and "id" in row:
            rows[row["id"]] = row
    return header, rows


def _must_agree(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            raise MidfillError(
                f"{path} has results with {key} = {old.get(key)!r}, but this run has {new.get(key)!r}. "
                "Use another file, or delete this one."
            )
