"""Keeps the workspace's index up to date in the background.

One thread makes all changes to the `RepositoryIndex`. A process (`worker`) does the first scan of the
folders; files that change later, and the texts of open documents, are few, and the thread reads them. The
event loop only puts jobs into a queue.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from midfill.completion.context import worker
from midfill.completion.context.bundle import Folder
from midfill.completion.context.chunks import parse
from midfill.completion.context.files import FileFilter, to_source_file
from midfill.completion.context.ignore import IGNORE_FILES
from midfill.completion.context.index import RepositoryIndex
from midfill.text.secret_filter import is_excluded

_LOG = logging.getLogger(__name__)

_COMMAND = [sys.executable, "-P", "-X", "utf8", "-m", "midfill.completion.context.worker"]
_COMMIT_EVERY_S = 2.0
# After more changes at once (a branch was checked out) a process scans everything again.
_MANY = 50


class Indexer:
    """The indexing thread and its queue.

    Args:
        folders: the folders to scan; without any, nothing is read.
        excluded_files: patterns of names, as in the settings.
    """

    def __init__(self, folders: Sequence[Folder], excluded_files: Sequence[str]) -> None:
        self.index = RepositoryIndex()
        self.folders = tuple(folders)
        self._excluded = tuple(excluded_files)
        self._filters = [(folder, FileFilter(folder.path, excluded_files)) for folder in folders]
        self._jobs: queue.Queue[tuple[Any, ...]] = queue.Queue(maxsize=10_000)
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        # Paths whose text comes from the editor, not the disk. Used by the thread only.
        self._open: set[str] = set()
        self._taken: list[str] = []
        # How many texts of each open document the index has taken; replaced, never changed in place. And how
        # many in all, those of documents closed since included.
        self.texts: Mapping[str, int] = {}
        self.num_texts = 0
        self.scanned = threading.Event()
        threading.Thread(target=self._run, name="midfill-index", daemon=True).start()
        if folders:
            self._jobs.put(("scan",))
        else:
            self.scanned.set()

    def path_of(self, file: Path) -> str | None:
        """Return the index's name for a file of the workspace; None if it is not in a folder."""
        for folder in self.folders:
            with contextlib.suppress(ValueError):
                return folder.prefix + file.relative_to(folder.path).as_posix()
        return None

    def put(self, path: str, text: str) -> None:
        """Take the text of an open document."""
        self._put("text", path, text)

    def close_document(self, path: str) -> None:
        """Use the text on disk again for a file."""
        self._put("closed", path)

    def changed(self, paths: Sequence[str]) -> None:
        """Take the paths of files that were written, created or deleted."""
        if len(paths) > _MANY or any(path.rpartition("/")[2] in IGNORE_FILES for path in paths):
            self._put("scan")
            return
        for path in paths:
            self._put("changed", path)

    def wait(self, timeout_s: float) -> bool:
        """Wait until all earlier jobs are done; for evaluations and tests. Returns False on timeout."""
        done = threading.Event()
        self._put("call", done.set)
        return done.wait(timeout_s)

    def close(self) -> None:
        """Stop the process and the thread."""
        self._closed = True
        # Releases whoever waits for the scan.
        self.scanned.set()
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.kill()
        self._put("close")

    def _put(self, *job: Any) -> None:
        # Full only if thousands of changes came within seconds; the next scan finds the lost ones.
        with contextlib.suppress(queue.Full):
            self._jobs.put_nowait(job)

    def _run(self) -> None:
        while True:
            kind, *arguments = self._jobs.get()
            if kind == "close" or self._closed:
                return
            try:
                if kind == "scan":
                    self._scan()
                elif kind == "call":
                    self._commit()
                    arguments[0]()
                else:
                    self._update(kind, *arguments)
                if self._jobs.empty():
                    self._commit()
            except Exception as error:
                # Not its message, which may quote a file.
                _LOG.error("an indexing job failed: %s", type(error).__name__)

    def _commit(self) -> None:
        self.index.commit()
        texts = dict(self.texts)
        for path in self._taken:
            texts[path] = texts.get(path, 0) + 1
        self.texts = {path: count for path, count in texts.items() if path in self._open}
        self.num_texts += len(self._taken)
        self._taken.clear()

    def _update(self, kind: str, path: str, text: str | None = None) -> None:
        if kind == "text":
            self._open.add(path)
            self._taken.append(path)
        elif kind == "closed":
            self._open.discard(path)
            self._taken.append(path)
        elif path in self._open:
            return
        file = None
        if text is not None:
            if not is_excluded(path, self._excluded):
                file = to_source_file(path, text)
        else:
            file = self._read(path)
        if file is None:
            self.index.remove(path)
        else:
            self.index.add(path, parse(file))

    def _read(self, path: str) -> Any:
        # The longest prefix first: the first folder's is empty and matches everything.
        for folder, file_filter in sorted(self._filters, key=lambda pair: -len(pair[0].prefix)):
            if path.startswith(folder.prefix):
                relative = path.removeprefix(folder.prefix)
                return file_filter.read(relative) if file_filter.admits(relative) else None
        return None

    def _scan(self) -> None:
        """Read all folders in a process, and remove the files that are gone."""
        for _, file_filter in self._filters:
            file_filter.forget_ignores()
        begun = committed = time.monotonic()
        request = {
            "folders": [(folder.prefix, os.fspath(folder.path)) for folder in self.folders],
            "excluded_files": self._excluded,
        }
        seen = set()
        with subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            self._process = process
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            for line in process.stdout:
                if self._closed:
                    return
                path, parsed = worker.decode(line)
                seen.add(path)
                if path not in self._open:
                    self.index.add(path, parsed)
                if time.monotonic() - committed > _COMMIT_EVERY_S:
                    self.index.commit()
                    committed = time.monotonic()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if process.returncode == 0:
            for path in set(self.index.paths()) - seen - self._open:
                self.index.remove(path)
        self.index.commit()
        self.scanned.set()
        _LOG.info(
            "indexed %d files (%d chunks) in %.1f s, status %s",
            self.index.num_files,
            self.index.num_chunks,
            time.monotonic() - begun,
            process.returncode,
        )
