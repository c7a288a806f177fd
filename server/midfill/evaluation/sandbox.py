"""Run programs that a model has partly written, with limits.

Each runs in its own folder and process group, with an empty environment and limits on time, memory and file
sizes. Where `unshare` works (Linux), it also has no network, and a process namespace that ends with it, so
that no child outlives it. It has your permissions to read and write files: run trusted tasks only.
"""

from __future__ import annotations

import asyncio
import functools
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from midfill.system.programs import find_program

_WALL_S = 10.0
_COMPILER_WALL_S = 30.0
# CPU seconds; a Java program is compiled first.
_CPU_S = 20
_FILE_BYTES = 1 << 20
_COMPILER_FILE_BYTES = 8 << 20
_MEMORY_MB = 1024
_FILES = {"python": "main.py", "javascript": "main.js", "java": "Main.java", "cpp": "main.cpp"}
_COMPILED = "main"
_ISOLATED = ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--")


def missing(language: str) -> str | None:
    """Return a sentence why programs in `language` cannot be run here, or None if they can."""
    if language == "python":
        return None
    if language == "javascript":
        return None if find_program("node") else "`node` is not on the PATH."
    if language == "java":
        # `java` without the compiler cannot run a source file.
        return None if find_program("java") and find_program("javac") else "There is no JDK on the PATH."
    if language == "cpp":
        return None if find_program("g++") else "`g++` is not on the PATH."
    return f"Programs in {language} cannot be run."


@functools.cache
def isolation() -> tuple[str, ...]:
    """Return the command that isolates network and processes; () where the system does not allow it."""
    unshare, true = find_program("unshare"), find_program("true")
    if unshare is None or true is None:
        return ()
    command = (unshare, *_ISOLATED)
    try:
        # Containers often have the program, but forbid what it does.
        tried = subprocess.run([*command, true], capture_output=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if tried.returncode == 0 else ()


async def passes(language: str, program: str) -> bool:
    """Run a program; return whether it ends with status 0 within its limits. Check `missing` first."""
    with _written(language, program) as folder:
        return await _compile(language, folder) and await _run(language, _command(language), folder)


async def prints(language: str, program: str, expected: Sequence[tuple[str, Sequence[str]]]) -> bool:
    """Run a program with each input on stdin; return whether it prints one of the right outputs each time.

    Args:
        language: as for `missing`, which is to be checked first.
        program: the source text.
        expected: (input, right outputs) of each run. Blanks at the ends of lines and blank lines at the end
            do not count.
    """
    with _written(language, program) as folder:
        if not await _compile(language, folder):
            return False
        for given, outputs in expected:
            (folder / "stdin").write_text(given, encoding="utf-8")
            if not await _run(language, _command(language), folder, keeps_output=True):
                return False
            printed = (folder / "stdout").read_text(encoding="utf-8", errors="replace")
            if _significant(printed) not in map(_significant, outputs):
                return False
    return True


def _significant(output: str) -> list[str]:
    return [line.rstrip() for line in output.rstrip().splitlines()]


@contextmanager
def _written(language: str, program: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="midfill-eval-", ignore_cleanup_errors=True) as folder:
        path = Path(folder)
        # Line ends stay as they are.
        (path / _FILES[language]).write_bytes(program.encode("utf-8", errors="replace"))
        (path / "stdin").touch()
        yield path


async def _compile(language: str, folder: Path) -> bool:
    """Compile a program in a language that needs it; return whether it can be run."""
    if language != "cpp":
        return True
    command = [find_program("g++") or "g++", "-std=c++20", "-O1", "-w", "-o", _COMPILED, _FILES[language]]
    return await _run(language, command, folder, wall_s=_COMPILER_WALL_S, file_bytes=_COMPILER_FILE_BYTES)


async def _run(
    language: str,
    command: Sequence[str],
    folder: Path,
    *,
    keeps_output: bool = False,
    wall_s: float | None = None,
    file_bytes: int = _FILE_BYTES,
) -> bool:
    """Run a command in `folder`; return whether its status is 0.

    It reads the file `stdin` and, if `keeps_output`, writes `stdout`, which is limited in size as any file.
    """
    output = folder / "stdout" if keeps_output else Path(os.devnull)
    with (folder / "stdin").open("rb") as stdin, output.open("wb") as stdout:
        process = await asyncio.create_subprocess_exec(
            *isolation(),
            *command,
            stdin=stdin,
            stdout=stdout,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=folder,
            env={
                "PATH": os.environ.get("PATH", ""),
                "HOME": str(folder),
                "TMPDIR": str(folder),
                "LANG": "C.UTF-8",
            },
            start_new_session=True,
            preexec_fn=functools.partial(_limit, language, file_bytes),
        )
    try:
        return await asyncio.wait_for(process.wait(), wall_s or _WALL_S) == 0
    except TimeoutError:
        return False
    finally:
        _end_group(process.pid)
        await process.wait()


def _command(language: str) -> list[str]:
    if language == "cpp":
        return [f"./{_COMPILED}"]
    file = _FILES[language]
    if language == "python":
        return [sys.executable, "-I", "-S", file]
    found = find_program({"javascript": "node", "java": "java"}[language]) or language
    if language == "javascript":
        return [found, f"--max-old-space-size={_MEMORY_MB}", file]
    return [found, "-ea", f"-Xmx{_MEMORY_MB}m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", file]


def _limit(language: str, file_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # node and java reserve address space that they never use; their memory is limited by options.
    if language in {"python", "cpp"}:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_MB << 20, _MEMORY_MB << 20))


def _end_group(process_id: int) -> None:
    try:
        os.killpg(process_id, 9)
    except ProcessLookupError:
        return
