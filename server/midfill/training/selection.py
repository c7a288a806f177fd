"""Select training data: the commits and files to use, what is skipped and why, and the split by time.

Training uses the tree before the held-out commits and the lines that earlier commits added; the next commits
choose (dev), the newest decide the verdict (test). What is skipped is counted by reason. Runs no model.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from midfill.completion.context.files import (
    FileFilter,
    SourceFile,
    classify,
    is_third_party,
    rejection_by_name,
)
from midfill.errors import MidfillError
from midfill.settings import Settings
from midfill.training.history import Change, Commit, Hunk, Repository

MAX_COMMITS = 2000
_MAX_USABLE = 400
"""Newest commits to use at most: git is run for each of their hunks."""

_MAX_CHANGES = 20
_MAX_TREE_FILES = 5000
# Share of a hunk's lines that the commit removed elsewhere, from which on the hunk counts as moved code.
_MOVED_SHARE = 0.8
_TELLING_CHARS = 4
_LICENCE_FILES = ("LICENSE", "LICENCE", "COPYING")
_SPDX = re.compile(r"SPDX-License-Identifier:\s*([^\s*/#]+)")
_GNU = re.compile(r"GNU (?:Lesser |Affero |Library )?General Public License", re.IGNORECASE)
_HEAD_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Addition:
    """Lines that a commit has added to a usable file.

    Attributes:
        commit: the commit's hash.
        file: the file as it was after the commit.
        rows: the added lines, from 0.
    """

    commit: str
    file: SourceFile
    rows: range


@dataclass(frozen=True, slots=True)
class Split:
    """The additions of each usable commit, split by time. `train` may be empty, the others not."""

    train: tuple[tuple[Addition, ...], ...]
    dev: tuple[tuple[Addition, ...], ...]
    test: tuple[tuple[Addition, ...], ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """The selected data of a repository.

    Attributes:
        repository: its name.
        head: hash of the newest commit.
        tree: the usable files as they were before the held-out commits.
        touched: number of training commits that changed a file, by path.
        split: the additions, by time.
        dropped_files, dropped_commits, dropped_hunks: numbers of those that were skipped, by reason.
    """

    repository: str
    head: str
    tree: tuple[SourceFile, ...]
    touched: Mapping[str, int]
    split: Split
    dropped_files: Mapping[str, int]
    dropped_commits: Mapping[str, int]
    dropped_hunks: Mapping[str, int]


def divide(num_commits: int) -> tuple[int, int, int]:
    """Return the numbers of usable commits, in order of time, for training, dev and test.

    In a short history, test gets enough for a verdict (20) before training gets more than half; in a long
    one, no more than it needs.
    """
    test = min(60, max(min(24, num_commits * 2 // 5), num_commits // 4))
    dev = min(12, max(1, num_commits // 10)) if num_commits - test > 1 else 0
    return num_commits - test - dev, dev, test


def select(repository: Repository, settings: Settings) -> Selection:
    """Select from a history. Raises `MidfillError` if it is too short for training and evaluation."""
    return _Selector(repository, settings).run()


class _Selector:
    """State of one call of `select`."""

    def __init__(self, repository: Repository, settings: Settings) -> None:
        self._repository = repository
        self._settings = settings
        self._filter = FileFilter(repository.root, settings.excluded_files)
        self._dropped_paths: dict[str, str] = {}
        self._files: dict[tuple[str, str], SourceFile | None] = {}
        self._dropped_commits: Counter[str] = Counter()
        self._dropped_hunks: Counter[str] = Counter()
        self._seen_hunks: set[str] = set()
        self._licence = ""

    def run(self) -> Selection:
        commits = self._repository.commits(MAX_COMMITS)
        head = commits[-1].id
        head_tree = self._repository.tree(head)
        self._licence = self._read_licence(head_tree)
        changes = self._usable_changes(commits)
        self._read([(change.path, change.new) for _, found in changes for change in found if change.new])
        additions = [(commit, self._additions(commit, found)) for commit, found in changes]
        usable = [(commit, tuple(found)) for commit, found in additions if found]
        self._dropped_commits["nothing to learn in it"] += len(additions) - len(usable)
        num_train, num_dev, num_test = divide(len(usable))
        if not (num_train and num_dev and num_test):
            raise MidfillError(
                f"{self._repository.root} has {len(usable)} commits with usable source code. Training needs "
                "at least 4, and 20 test commits for a verdict. Commits skipped: "
                f"{_counted(self._dropped_commits) or 'none'}."
            )
        tree = self._repository.tree(usable[num_train - 1][0].id)
        paths = [(path, blob) for path, blob in tree.items() if self._admits(path)][:_MAX_TREE_FILES]
        self._read(paths)
        kept = [file for place in paths if (file := self._files[place]) is not None]
        parts = [found for _, found in usable]
        touched = Counter(
            path for found in parts[:num_train] for path in {addition.file.path for addition in found}
        )
        # A file that held a secret in any version is skipped in all versions.
        barred = {path for path, reason in self._dropped_paths.items() if reason == "secret"}
        parts = [tuple(one for one in found if one.file.path not in barred) for found in parts]
        split = Split(
            tuple(parts[:num_train]),
            tuple(parts[num_train : num_train + num_dev]),
            tuple(parts[num_train + num_dev :]),
        )
        tree_files = self._without_copies([file for file in kept if file.path not in barred])
        return Selection(
            repository=self._repository.name,
            head=head,
            tree=tuple(tree_files),
            touched=touched,
            split=split,
            dropped_files=dict(Counter(self._dropped_paths.values()).most_common()),
            dropped_commits=dict(self._dropped_commits.most_common()),
            dropped_hunks=dict(self._dropped_hunks.most_common()),
        )

    def _usable_changes(self, commits: Sequence[Commit]) -> list[tuple[Commit, list[Change]]]:
        candidates = []
        for commit in commits:
            if len(commit.parents) > 1:
                self._dropped_commits["merge"] += 1
            elif commit.is_bot:
                self._dropped_commits["bot"] += 1
            elif not commit.parents:
                # Its files are part of the tree anyway.
                self._dropped_commits["first commit"] += 1
            else:
                candidates.append(commit)
        found = []
        for commit, changes in self._repository.changes(reversed(candidates)):
            admitted = [change for change in changes if self._admits(change.path)]
            if any(change.new for change in admitted):
                found.append((commit, admitted[:_MAX_CHANGES]))
            else:
                self._dropped_commits["no source code"] += 1
            if len(found) == _MAX_USABLE:
                break
        found.reverse()
        return found

    def _admits(self, path: str) -> bool:
        """Return whether a path is usable; record the reason if not."""
        if path in self._dropped_paths:
            return False
        pure = PurePosixPath(path)
        reason = rejection_by_name(pure, self._settings.excluded_files)
        if reason is None and is_third_party(pure):
            reason = "vendored or hidden"
        if reason is None and self._filter.ignores(path):
            reason = "ignored"
        if reason is not None:
            self._dropped_paths[path] = reason
        return reason is None

    def _read(self, places: Iterable[tuple[str, str]]) -> None:
        """Read versions of files, and keep the usable ones."""
        new = [place for place in dict.fromkeys(places) if place not in self._files]
        texts = self._repository.texts(blob for _, blob in new)
        for path, blob in new:
            text = texts[blob]
            file = self._classify(path, text.replace("\r\n", "\n")) if text is not None else "binary or large"
            if isinstance(file, str):
                self._files[path, blob] = None
                # A secret in any version outweighs other reasons.
                if self._dropped_paths.get(path) != "secret":
                    self._dropped_paths[path] = file
            else:
                self._files[path, blob] = file

    def _classify(self, path: str, text: str) -> SourceFile | str:
        head = text[:_HEAD_CHARS]
        if _GNU.search(head) and not _GNU.search(self._licence):
            return "another licence"
        spdx = _SPDX.search(head)
        if spdx and "GPL" in spdx[1] and not _GNU.search(self._licence):
            return "another licence"
        return classify(path, text)

    def _read_licence(self, tree: Mapping[str, str]) -> str:
        blobs = [blob for path, blob in tree.items() if path.upper().startswith(_LICENCE_FILES)]
        return "\n".join(text for text in self._repository.texts(blobs).values() if text)

    def _additions(self, commit: Commit, changes: Sequence[Change]) -> list[Addition]:
        """Return a commit's additions, without moved code and code that was seen before."""
        hunks = {change: self._repository.hunks(change) for change in changes if change.new}
        olds = self._repository.texts(change.old for change in changes if change.old)
        removed: set[str] = set()
        for change in changes:
            old = (olds.get(change.old) or "").split("\n")
            ranges: list[tuple[int, int]] = (
                [(hunk.removed_first, hunk.removed_end) for hunk in hunks[change]]
                if change.new
                else [(0, len(old))]
            )
            removed.update(line.strip() for first, end in ranges for line in old[first:end])
        found = []
        for change, ranges_of in hunks.items():
            file = self._files[change.path, change.new]
            if file is None:
                self._dropped_hunks["file left out"] += len(ranges_of)
                continue
            lines = file.text.split("\n")
            for hunk in ranges_of:
                if hunk.first == hunk.end:
                    continue
                if (reason := self._why_not(lines[hunk.first : hunk.end], removed)) is not None:
                    self._dropped_hunks[reason] += 1
                else:
                    found.append(Addition(commit.id, file, _rows(hunk)))
        return found

    def _why_not(self, lines: Sequence[str], removed: set[str]) -> str | None:
        telling = [text for line in lines if len(text := line.strip()) >= _TELLING_CHARS]
        if not telling:
            return "blank or brackets"
        if sum(line in removed for line in telling) >= _MOVED_SHARE * len(telling):
            return "moved"
        key = hashlib.sha256("\n".join(telling).encode("utf-8", "replace")).hexdigest()
        if key in self._seen_hunks:
            return "seen before"
        self._seen_hunks.add(key)
        return None

    def _without_copies(self, files: Sequence[SourceFile]) -> list[SourceFile]:
        seen: set[str] = set()
        kept = []
        for file in files:
            key = "\n".join(line.strip() for line in file.text.split("\n") if line.strip())
            if key in seen:
                self._dropped_paths[file.path] = "duplicate"
            else:
                seen.add(key)
                kept.append(file)
        return kept


def _rows(hunk: Hunk) -> range:
    return range(hunk.first, hunk.end)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items() if count)
