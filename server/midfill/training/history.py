"""A repository's history: commits, trees, and the lines that each commit has added.

Runs git by `evaluation.git`, which keeps it from running programs, and reads objects only, never the working
copy. The repository is not trusted: paths that lead out of it, malformed dates and authors, and missing
objects are expected. Works on bytes and texts, knows nothing of models. Any thread.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from midfill.errors import MidfillError
from midfill.evaluation.git import Git, NoRepositoryError, is_plain

_MAX_BLOB_BYTES = 400_000
# Texts are read in portions of this size, up to a total.
_PORTION_BYTES = 64 << 20
_MAX_TEXTS_BYTES = 1 << 30
_PATCH = ("--no-ext-diff", "--no-textconv", "--no-color", "--unified=0", "--diff-algorithm=histogram")
_HUNK = re.compile(rb"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", re.MULTILINE)
_BOT = re.compile(
    r"\[bot\]|\b(?:dependabot|renovate|pre-commit-ci|github-actions|greenkeeper|weblate|snyk)\b|-bot@",
    re.IGNORECASE,
)
_REGULAR = frozenset({"100644", "100755"})


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit, without its message.

    Attributes:
        id: its hash.
        parents: their hashes.
        time_s: when it was committed, in seconds since 1970.
        author: name and e-mail address.
    """

    id: str
    parents: tuple[str, ...]
    time_s: int
    author: str

    @property
    def is_bot(self) -> bool:
        """Return whether a program made the commit, by its author's name."""
        return _BOT.search(self.author) is not None


@dataclass(frozen=True, slots=True)
class Change:
    """A file that a commit changed.

    Attributes:
        path: its path after the commit.
        old, new: hashes of the contents; `old` is "" for a new file, `new` for one that was deleted.
        moved: the file had another path before.
    """

    path: str
    old: str
    new: str
    moved: bool


@dataclass(frozen=True, slots=True)
class Hunk:
    """Lines that a commit added to a file, replacing others; either range may be empty.

    Attributes:
        first, end: lines of the new text, from 0, half open.
        removed_first, removed_end: lines of the old text, likewise.
    """

    first: int
    end: int
    removed_first: int
    removed_end: int


class Repository:
    """The repository that a folder belongs to.

    Raises `MidfillError` if there is no git, no repository, or one that git does not trust.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise MidfillError(f"{folder} is not a folder. Give the folder of a git repository.")
        try:
            self._git = Git(folder)
        except NoRepositoryError as error:
            raise MidfillError(
                f"{error} Adapters are trained on a git repository's history: open one, or name it by --repo."
            ) from error
        self.root = self._git.root

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.name

    def commits(self, limit: int) -> list[Commit]:
        """Return up to `limit` newest commits reachable from HEAD, the oldest first, parents before children.

        Raises `MidfillError` if there are none.
        """
        if self._git.head is None:
            raise MidfillError(f"{self.root} has no commits yet, so there is nothing to train on.")
        out = self._git.run(
            *("log", "-z", "--date-order", f"-n{limit}", "--format=%H%x1f%P%x1f%ct%x1f%an <%ae>", "HEAD")
        )
        found = []
        for record in out.decode("utf-8", "replace").split("\0"):
            # A malformed commit may have no date.
            id_, parents, time_s, author = (*record.split("\x1f", 3), "", "", "")[:4]
            if id_:
                seconds = int(time_s) if time_s.isascii() and time_s.isdigit() else 0
                found.append(Commit(id_, tuple(parents.split()), seconds, author))
        found.reverse()
        return found

    def tree(self, commit: str) -> dict[str, str]:
        """Return the regular files of a commit, without links and submodules: content hashes by path.

        Entries that lead out of the repository or into `.git` are skipped.
        """
        files = {}
        for record in self._git.run("ls-tree", "-r", "-z", "--full-tree", commit).split(b"\0"):
            meta, _, name = record.partition(b"\t")
            if name:
                mode, _, blob = meta.decode().split()
                if mode in _REGULAR and is_plain(path := os.fsdecode(name)):
                    files[path] = blob
        # A path cannot be a file and a folder.
        folders = {parent for path in files for parent in _parents(path)}
        return {path: blob for path, blob in files.items() if path not in folders}

    def changes(self, commits: Iterable[Commit]) -> Iterator[tuple[Commit, list[Change]]]:
        """Iterate over the changes of each commit to regular files. None of the commits may be a merge."""
        for commit in commits:
            out = self._git.run("diff-tree", "-r", "-M", "-z", "--raw", "--no-commit-id", "--root", commit.id)
            yield commit, list(_changes(out.split(b"\0")))

    def hunks(self, change: Change) -> list[Hunk]:
        """Return the hunks of a change; a new file is one hunk."""
        if not change.old:
            text = self.texts([change.new])[change.new]
            return [] if text is None else [Hunk(0, text.count("\n") + 1, 0, 0)]
        if change.old == change.new:
            return []
        out = self._git.run("diff", *_PATCH, change.old, change.new)
        found = []
        for match in _HUNK.finditer(out):
            old_start, old_count, start, count = (1 if one is None else int(one) for one in match.groups())
            # The line of an empty range is the one before it.
            first, old_first = start - (count > 0), old_start - (old_count > 0)
            found.append(Hunk(first, first + count, old_first, old_first + old_count))
        return found

    def texts(self, blobs: Iterable[str]) -> dict[str, str | None]:
        """Return texts by hash; None for a blob that is missing, large, binary or not in UTF-8.

        Raises `MidfillError` if they are too large together.
        """
        wanted = sorted(set(blobs))
        found: dict[str, str | None] = dict.fromkeys(wanted)
        for portion in self._portions(wanted):
            out = self._git.run(
                "cat-file", "--batch=%(objectname) %(objectsize)", given="\n".join(portion).encode()
            )
            at = 0
            while at < len(out):
                end = out.index(b"\n", at)
                blob, size = out[at:end].decode().split()
                data = out[end + 1 : end + 1 + int(size)]
                at = end + int(size) + 2
                if b"\0" not in data:
                    with contextlib.suppress(UnicodeDecodeError):
                        found[blob] = data.decode("utf-8-sig")
        return found

    def _portions(self, wanted: list[str]) -> Iterator[list[str]]:
        """Iterate over the blobs of moderate size, in portions for one call of git each."""
        if not wanted:
            return
        asked = "\n".join(wanted).encode()
        lines = self._git.run(
            "cat-file", "--batch-check=%(objectname) %(objecttype) %(objectsize)", given=asked
        ).split(b"\n")
        portion: list[str] = []
        portion_bytes = total_bytes = 0
        for line in lines:
            # A clone without all objects answers "<hash> missing".
            blob, kind, size = (*line.decode().split(), "", "", "")[:3]
            if kind != "blob" or int(size) > _MAX_BLOB_BYTES:
                continue
            total_bytes += int(size)
            if total_bytes > _MAX_TEXTS_BYTES:
                raise MidfillError(
                    f"{self.root} has more than {_MAX_TEXTS_BYTES >> 20} MB of source text, which is too "
                    "much to read. Exclude files with a .midfillignore."
                )
            if portion_bytes + int(size) > _PORTION_BYTES:
                yield portion
                portion, portion_bytes = [], 0
            portion.append(blob)
            portion_bytes += int(size)
        if portion:
            yield portion


def _changes(fields: list[bytes]) -> Iterator[Change]:
    """Parse the records of `git diff-tree -z --raw`."""
    at = 0
    while at < len(fields) and fields[at]:
        old_mode, mode, old, new, status = fields[at].decode().lstrip(":").split()
        renamed = status[0] in "RC"
        path = os.fsdecode(fields[at + 1 + renamed])
        at += 2 + renamed
        if (mode if new.strip("0") else old_mode) in _REGULAR and is_plain(path):
            yield Change(path, old if old.strip("0") else "", new if new.strip("0") else "", renamed)


def _parents(path: str) -> Iterator[str]:
    """Iterate over the parent folders of a path."""
    at = path.find("/")
    while at >= 0:
        yield path[:at]
        at = path.find("/", at + 1)
