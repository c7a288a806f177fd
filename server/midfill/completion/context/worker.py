"""The indexing process: reads workspace folders, writes what may become context as JSON lines, and ends.

A separate process at the lowest priority, so that reading thousands of files takes neither the interpreter
lock nor memory from the server, which answers keys. It is started as `python -P -m
midfill.completion.context.worker` with one JSON object on stdin, {"folders": [[prefix, path], ...],
"excluded_files": [...]}, and ends when stdin does.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import IO, Any

import psutil

from midfill.completion.context.chunks import Definition, FileChunk, Parsed, parse
from midfill.completion.context.files import FileFilter

# More code than the largest repositories have; a folder of data or of checkouts is not worth more memory.
MAX_FILES = 20_000
MAX_CHARS = 200_000_000


def main() -> None:
    """Serve the request on stdin."""
    _be_nice()
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    scan(request["folders"], request["excluded_files"], sys.stdout.buffer)


def scan(folders: list[tuple[str, str]], excluded_files: list[str], out: IO[bytes]) -> None:
    """Write one line for each file that may become context."""
    num_files = num_chars = 0
    for prefix, folder in folders:
        file_filter = FileFilter(Path(folder), excluded_files)
        for path in file_filter.walk():
            file = file_filter.read(path)
            if file is None:
                continue
            num_files += 1
            num_chars += len(file.text)
            if num_files > MAX_FILES or num_chars > MAX_CHARS:
                return
            out.write(encode(prefix + path, parse(file)))
    out.flush()


def encode(path: str, parsed: Parsed) -> bytes:
    """Return a file as one line of JSON."""
    chunks = [(chunk.line, chunk.text, chunk.terms) for chunk in parsed.chunks]
    definitions = [(one.name, one.signature) for one in parsed.definitions]
    return json.dumps([path, chunks, definitions]).encode() + b"\n"


def decode(line: bytes) -> tuple[str, Parsed]:
    """Return path and content of a line that `encode` made. Raises `ValueError`."""
    value: Any = json.loads(line)
    path, chunks, definitions = value
    return path, Parsed(
        tuple(FileChunk(*chunk) for chunk in chunks), tuple(Definition(*one) for one in definitions)
    )


def _be_nice() -> None:
    me = psutil.Process()
    with contextlib.suppress(psutil.Error, OSError, AttributeError):
        me.nice(19 if os.name == "posix" else psutil.IDLE_PRIORITY_CLASS)  # type: ignore[attr-defined]
        me.ionice(psutil.IOPRIO_CLASS_IDLE)


def _end_with_input() -> None:
    # The parent process has ended, or needs no more. Not `sys.stdin`, whose lock would keep the interpreter
    # from exiting.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
