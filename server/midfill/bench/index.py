"""`midfill bench index`: the cost of a workspace index: build time, memory, and time of a look-up."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import psutil

from midfill.completion.context.collector import ContextCollector
from midfill.engine.api import Progress
from midfill.errors import MidfillError
from midfill.settings import Settings
from midfill.text.documents import Document, Point, Snapshot
from midfill.text.languages import language_id

_SAMPLE_EVERY_S = 0.05
_SOURCES = ("imports", "open", "repository")


def bench_index(
    folder: Path, settings: Settings, report: Progress, *, lookups: int, seed: int
) -> dict[str, Any]:
    """Index a folder as the server does, then choose the context at random positions in its files.

    The memory is the peak of this process (beyond what it had before) and the process that reads the files,
    together. Raises `MidfillError` if nothing in the folder is indexed.
    """
    me = psutil.Process()
    before = me.memory_info().rss
    context = ContextCollector(settings.model_copy(update={"context": settings.context or _SOURCES}))
    begun = time.monotonic()
    try:
        context.open_folders([(folder.name, folder)])
        indexer = context.indexer
        if indexer is None or not indexer.folders:
            raise MidfillError(
                f"{folder} is the home folder or the root of the file system, which midfill does not index."
            )
        peak = before
        while not indexer.scanned.wait(_SAMPLE_EVERY_S):
            report(f"{indexer.index.num_files} files", None)
            peak = max(peak, _memory(me))
        scan_s = time.monotonic() - begun
        paths = indexer.index.paths()
        if not paths:
            raise MidfillError(
                f"Nothing in {folder} is indexed: it has no source code, or all of it is ignored."
            )
        chosen = _choose(context, folder, sorted(paths), lookups, random.Random(seed))
        update_s = time.monotonic()
        indexer.changed([paths[0]])
        indexer.wait(60)
        update_s = time.monotonic() - update_s
        return {
            "folder": folder.name,
            "files": len(paths),
            "chunks": indexer.index.num_chunks,
            "scan_s": round(scan_s, 1),
            "peak_mb": round((peak - before) / 1e6, 1),
            "steady_mb": round((me.memory_info().rss - before) / 1e6, 1),
            "update_ms": round(1000 * update_s, 1),
            "choose_ms": chosen,
        }
    finally:
        context.close()


def _memory(me: psutil.Process) -> int:
    total: int = me.memory_info().rss
    for child in me.children():
        try:
            total += child.memory_info().rss
        except psutil.Error:
            continue
    return total


def _choose(
    context: ContextCollector, folder: Path, paths: list[str], lookups: int, chooser: random.Random
) -> dict[str, float]:
    """Return the milliseconds to choose the context at a position, without reading the file."""
    taken = []
    for _ in range(lookups):
        path = chooser.choice(paths)
        text = (folder / path).read_text("utf-8", "replace")
        document = Document.open((folder / path).as_uri(), language_id(path), 0, text)
        line = chooser.randrange(len(document.lines))
        snapshot = Snapshot(document, Point(line, len(document.lines[line].rstrip("\r\n"))))
        begun = time.perf_counter()
        context.collect(snapshot)
        taken.append(1000 * (time.perf_counter() - begun))
        context.closed(document.uri)
    taken.sort()
    return {
        "p50": round(taken[len(taken) // 2], 2),
        "p95": round(taken[len(taken) * 95 // 100], 2),
        "max": round(taken[-1], 2),
    }
