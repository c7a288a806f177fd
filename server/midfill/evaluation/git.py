"""Run git safely: read the objects of a repository without running any program that the repository names.

A repository's configuration can name programs: hooks, filters, text conversions, a file system monitor, an
external diff, a pager, a program for signatures, and remotes from which missing objects are fetched. No list
of such options is ever complete, so the configuration is not read at all when objects are read: git works in
a temporary repository with an empty configuration that borrows the objects. Only two questions are answered
with the repository's configuration: where it is, and what its HEAD is. For these, all options that could
matter are overridden, and every transport is forbidden. The folder of the files is determined here too, since
`core.worktree` is not trusted. Works on bytes. The only module that starts git. Any thread.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from midfill.errors import MidfillError
from midfill.system.programs import find_program

_MAX_OUTPUT_BYTES = 512 << 20
_MAX_MEMORY_BYTES = 2 << 30
_MAX_SAID_BYTES = 64 << 10
_MAX_SMALL_FILE_BYTES = 16 << 20
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4096
_LIMIT_S = 600.0
# Reading HEAD takes milliseconds, but a configuration can include a file that blocks for ever.
_ASK_LIMIT_S = 60.0
_BLOCK_BYTES = 1 << 16

# Needed for the two questions that read the repository's configuration; otherwise redundant, since the
# configuration is empty then.
_OPTIONS = {
    "core.alternateRefsCommand": "",
    "core.askPass": "",
    "core.attributesFile": os.devnull,
    "core.editor": ":",
    "core.excludesFile": os.devnull,
    "core.fsmonitor": "false",
    "core.gitProxy": "",
    "core.hooksPath": os.devnull,
    "core.pager": "",
    "core.sshCommand": "false",
    "core.untrackedCache": "false",
    "credential.helper": "",
    "diff.external": "",
    "gc.auto": "0",
    "gpg.program": "false",
    "interactive.diffFilter": "",
    "log.mailmap": "false",
    "log.showSignature": "false",
    "maintenance.auto": "false",
    "protocol.allow": "never",
    "safe.bareRepository": "explicit",
    "submodule.recurse": "false",
}
_FLAGS = ("--no-optional-locks", "--no-pager", "--no-replace-objects", "--literal-pathspecs")

# GIT_ALLOW_PROTOCOL overrides every `protocol.*.allow` of any configuration, in every version since 2.4;
# GIT_NO_LAZY_FETCH works in versions since May 2024.
_ENVIRONMENT = {
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_ASKPASS": "",
    "GIT_EDITOR": ":",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_PAGER": "",
    "GIT_PROTOCOL_FROM_USER": "0",
    "GIT_SSH_COMMAND": "false",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
    "SSH_ASKPASS": "",
}


class GitError(MidfillError):
    """git is missing, failed, or exceeded a limit."""


class NoRepositoryError(GitError):
    """A folder is not in a repository with files."""


class Git:
    """The objects of the repository that a folder belongs to, as they are now.

    Attributes:
        folder: the given folder.
        root: the folder that contains `.git`, whatever the repository's configuration says.
        prefix: the folder relative to the root, with slashes and one at its end; "" for the root.
        head: the hash of the commit at HEAD, or None if there are no commits yet.

    Raises `NoRepositoryError` if there is no repository, and `GitError` if git cannot be run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        git_folder = Path(_text(_ask(folder, "rev-parse", "--absolute-git-dir")))
        self.root = _root_of(folder, git_folder)
        below = folder.resolve().relative_to(self.root).as_posix()
        self.prefix = "" if below == "." else f"{below}/"
        self.head = _head_of(folder)
        self._own = _borrowing_folder(git_folder, self.head)
        self._objects = _common(git_folder) / "objects"
        weakref.finalize(self, shutil.rmtree, self._own, ignore_errors=True)

    def run(self, *arguments: str, given: bytes = b"") -> bytes:
        """Run a git command that reads objects; return its output.

        Its arguments name objects by hash, or "HEAD", never files of the working copy.

        Args:
            arguments: the command and its arguments.
            given: its input.

        Raises:
            GitError: it failed, or took too much time or memory.
        """
        # The user's configuration could change the output, so it is ignored too.
        nothing = str(self._own / "nothing")
        variables = {
            "GIT_CONFIG_GLOBAL": nothing,
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_DIR": str(self._own),
            "GIT_OBJECT_DIRECTORY": str(self._objects),
        }
        return _run(self.root, arguments, given, variables, _LIMIT_S)


def is_plain(path: str) -> bool:
    """Return whether a path in a tree names a file below the root on every system, and not one of git's.

    A crafted tree may have entries that git itself would not check out: absolute paths, `..`, `.git`, and
    names that Windows treats as these.
    """
    encoded = os.fsencode(path)
    if not path or len(encoded) > _MAX_PATH_BYTES or any(mark in path for mark in '\\:"<>|?*'):
        return False
    if any(ord(mark) < 0x20 or ord(mark) == 0x7F for mark in path):
        return False
    parts = path.split("/")
    return PurePosixPath(path).as_posix() == path and all(_is_plain_part(part) for part in parts)


def _is_plain_part(part: str) -> bool:
    # Windows ignores dots and spaces at the end of a name, macOS invisible characters.
    seen = "".join(mark for mark in part if mark.isprintable()).rstrip(". ").lower()
    return bool(seen) and seen not in {".git", "git~1"} and len(os.fsencode(part)) <= _MAX_NAME_BYTES


def _ask(folder: Path, *arguments: str) -> bytes:
    """Run a git command that reads the repository's configuration."""
    return _run(folder, arguments, b"", {}, _ASK_LIMIT_S)


def _root_of(folder: Path, git_folder: Path) -> Path:
    """Return the folder whose `.git` leads to `git_folder`."""
    below = folder.resolve()
    for candidate in (below, *below.parents):
        entry = candidate / ".git"
        with suppress(OSError, ValueError):
            target = entry
            if entry.is_file():
                text = _small_file(entry).decode("utf-8", "surrogateescape")
                target = candidate / text.removeprefix("gitdir:").strip()
            if target.resolve() == git_folder.resolve():
                return candidate
    raise NoRepositoryError(f"{folder} is in no git repository with a working copy.")


def _head_of(folder: Path) -> str | None:
    try:
        head = _text(_ask(folder, "rev-parse", "--verify", "--quiet", "HEAD"))
    except GitError:
        return None
    if len(head) not in {40, 64} or not set(head) <= set("0123456789abcdef"):
        raise GitError(f"HEAD of {folder} is {head[:80]!r}, which is not a commit.")
    return head


def _borrowing_folder(git_folder: Path, head: str | None) -> Path:
    """Make a temporary repository without objects: a HEAD, and a configuration written here."""
    own = Path(tempfile.mkdtemp(prefix="midfill-git-"))
    (own / "refs").mkdir()
    (own / "objects").mkdir()
    (own / "nothing").touch()
    (own / "HEAD").write_text(f"{head}\n" if head else "ref: refs/heads/none\n", encoding="ascii")
    long = head is not None and len(head) == 64
    config = f"[core]\n\trepositoryformatversion = {int(long)}\n\tbare = true\n"
    config += "[extensions]\n\tobjectFormat = sha256\n" if long else ""
    (own / "config").write_text(config, encoding="ascii")
    # A shallow clone lists the commits whose parents are missing.
    with suppress(OSError, ValueError):
        (own / "shallow").write_bytes(_small_file(_common(git_folder) / "shallow"))
    return own


def _common(git_folder: Path) -> Path:
    """Return the folder with the objects, which linked worktrees share."""
    with suppress(OSError, ValueError):
        text = _small_file(git_folder / "commondir").decode("utf-8", "surrogateescape").strip()
        return git_folder / text
    return git_folder


def _small_file(path: Path) -> bytes:
    """Read a small regular file. Raises `OSError` or `ValueError` for anything else."""
    if not path.is_file():
        raise FileNotFoundError(path)
    with path.open("rb") as stream:
        data = stream.read(_MAX_SMALL_FILE_BYTES + 1)
    if len(data) > _MAX_SMALL_FILE_BYTES:
        raise ValueError("too large")
    return data


def _text(line: bytes) -> str:
    return os.fsdecode(line.removesuffix(b"\n").removesuffix(b"\r"))


def _environment() -> dict[str, str]:
    """Return the environment without variables that set git's repository, configuration or programs."""
    dropped = {"EDITOR", "PAGER", "VISUAL"}
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.upper().startswith("GIT_") and key not in dropped
    }
    return kept | _ENVIRONMENT


def _run(
    place: Path, arguments: tuple[str, ...], given: bytes, variables: Mapping[str, str], limit_s: float
) -> bytes:
    """Run git in the repository at `place`, or in `GIT_DIR` if the variables have it; return its output."""
    # Not git.bat or git.cmd: Windows runs these by a shell with different quoting rules.
    git = find_program("git.exe" if sys.platform == "win32" else "git")
    if git is None:
        raise GitError("git is not on the PATH. Install git.")
    options = [part for key, value in _OPTIONS.items() for part in ("-c", f"{key}={value}")]
    command = [git, *_FLAGS, *options, "-C", variables.get("GIT_DIR", str(place)), *arguments]
    try:
        with _started(command, given, {**_environment(), **variables}) as (process, said):
            out, why_ended = _read(process, limit_s)
    except OSError as error:
        raise GitError(f"git cannot be started ({error.strerror}). Reinstall git.") from error
    if why_ended:
        raise GitError(f"git {arguments[0]} in {place} was stopped: {why_ended}.")
    if process.returncode == 0:
        return out
    raise _error(said.decode("utf-8", "replace").strip(), arguments[0], place)


@contextmanager
def _started(
    command: list[str], given: bytes, environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], bytearray]]:
    """Start git with an input, give the process and its stderr so far, and wait for it."""
    said = bytearray()
    with tempfile.TemporaryFile() as written:
        written.write(given)
        written.seek(0)
        with subprocess.Popen(
            command, stdin=written, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        ) as process:
            _limit_memory(process.pid)
            assert process.stderr is not None
            reader = threading.Thread(target=_drain, args=(process.stderr, said), daemon=True)
            reader.start()
            try:
                yield process, said
            finally:
                if process.poll() is None:
                    process.kill()
                reader.join()


def _read(process: subprocess.Popen[bytes], limit_s: float) -> tuple[bytes, str]:
    """Read a process's output up to its end or to a limit; return it, and the reached limit or ""."""
    assert process.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    out = bytearray()
    try:
        while block := process.stdout.read(_BLOCK_BYTES):
            out += block
            if len(out) > _MAX_OUTPUT_BYTES:
                process.kill()
                return b"", f"it wrote more than {_MAX_OUTPUT_BYTES >> 20} MB"
        process.wait()
    finally:
        timer.cancel()
    return bytes(out), f"it took longer than {limit_s:.0f} s" if late.is_set() else ""


def _drain(stream: IO[bytes], into: bytearray) -> None:
    """Read a stream to its end and keep its beginning, so that the writer never blocks."""
    with suppress(OSError, ValueError):
        while block := stream.read(_BLOCK_BYTES):
            into += block[: _MAX_SAID_BYTES - len(into)]


def _limit_memory(process_id: int) -> None:
    """Limit a process's memory, where the system can do that from outside.

    A few small trees that contain each other ten times list ten thousand million files.
    """
    if sys.platform == "linux":
        import resource

        with suppress(OSError, ValueError):
            resource.prlimit(process_id, resource.RLIMIT_DATA, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))


def _error(said: str, command: str, place: Path) -> GitError:
    if "dubious ownership" in said:
        return GitError(
            f"git does not trust {place}, because another user owns it. If you do: "
            f"git config --global --add safe.directory {place}"
        )
    if "not a git repository" in said or "cannot use bare repository" in said:
        return NoRepositoryError(f"{place} is in no git repository with a working copy.")
    return GitError(f"git {command} failed in {place}: {said.partition(chr(10))[0]}")
