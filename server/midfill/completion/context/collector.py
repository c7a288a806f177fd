"""Collects context: pieces of other files that help the model at the cursor.

Sources are open documents, recent edits, the definitions of imported names, and chunks of the repository that
resemble the text around the cursor. Everything comes from memory: the index is built in the background
(`indexer`), and nothing here reads a file. `files` leaves out what may be a secret; recent edits are checked
here. Runs on the event loop.

The chosen pieces stay the same while the user works in one region, because a change of the context makes the
whole prompt new for the KV cache.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from midfill.completion.context.bundle import (
    EMPTY_BUNDLE,
    MAX_CHUNK_LINES,
    ContextBundle,
    ContextSource,
    Folder,
    Snippet,
)
from midfill.settings import Settings
from midfill.text.documents import Document, Snapshot, changed_lines
from midfill.text.secret_filter import MAX_LINE, is_excluded, severity
from midfill.text.secret_watch import SecretWatch, Verdict
from midfill.text.uris import file_of

if TYPE_CHECKING:
    from midfill.completion.context.indexer import Indexer

# The context is chosen again when the cursor is further than this from where it was chosen.
_STAYS_FOR_LINES = 40
_RENEWED_AFTER_LINES = 12
_MAX_FROZEN = 64
# The search query: lines above the cursor and a few below.
_QUERY_ABOVE = 20
_QUERY_BELOW = 6
_NEAR_LINES = 40
_MAX_CANDIDATES = 16
_MAX_DEFINITIONS = 4
# Imports are at the top of a file.
_IMPORT_LINES = 200
# A chunk with half of its lines near the cursor makes the model repeat them; of two that share nine lines in
# ten, one is enough. The shares are those of llama.vim.
_MAX_LIKE_CURSOR = 0.5
_MAX_LIKE_CHOSEN = 0.9
# As a share of the best chunk's score; chunks with lower scores share only common words.
_MIN_SHARE = 0.4
# Open documents are more likely to be about the same subject.
_OPEN_BOOST = 1.25
# No tokenizer packs more characters of code into a token on average.
_CHARS_PER_TOKEN = 5
_LITTLE_ROOM = 100
_MAX_EDITS = 8
_MAX_EDIT_LINES = 12
_BURST_LINES = 8
# Larger documents are neither searched for secrets nor indexed while they are edited.
_MAX_CHARS = 200_000


@dataclass(frozen=True, slots=True)
class _Frozen:
    """The choice for a document: the cursor's line, and the state of everything else it was made from."""

    line: int
    state: tuple[int, int, bool]
    collected: ContextBundle


@dataclass(slots=True)
class _Burst:
    """Edits near each other in one document, with the lines that it had before them."""

    document: Document
    before: list[str]
    line: int


@dataclass(slots=True)
class ContextCollector:
    """Collects context for the documents of one editor.

    Attributes:
        settings: the ones in force; change them by `configure`.
        secrets: the verdicts on secrets in open documents.
    """

    settings: Settings
    secrets: SecretWatch = field(default_factory=lambda: SecretWatch(in_background=False))
    indexer: Indexer | None = None
    _folders: tuple[Folder, ...] = ()
    _open: dict[str, Document] = field(default_factory=dict)
    # The index's names for the open documents.
    _paths: set[str] = field(default_factory=set)
    _dirty: set[str] = field(default_factory=set)
    _frozen: OrderedDict[str, _Frozen] = field(default_factory=OrderedDict)
    _burst: _Burst | None = None
    _edits: deque[tuple[str, Snippet]] = field(default_factory=lambda: deque(maxlen=_MAX_EDITS))
    _num_edits: int = 0

    def open_folders(self, folders: Sequence[tuple[str, Path]]) -> None:
        """Index these workspace folders, (name, path), instead of the earlier ones.

        Without folders, nothing is read. The file system's root and the user's home are skipped: editors name
        them when the user has not chosen a folder.
        """
        given = [(name, path) for name, path in folders if path not in {Path(path.anchor), Path.home()}]
        self._folders = tuple(
            Folder("" if number == 0 else f"{name or path.name}/", path)
            for number, (name, path) in enumerate(given)
        )
        self._restart()

    def configure(self, settings: Settings) -> None:
        """Take new settings."""
        old, self.settings = self.settings, settings
        if settings.context != old.context or settings.excluded_files != old.excluded_files:
            self._restart()

    async def indexed(self) -> tuple[int, int]:
        """Wait until the folders have been read. Returns the number of files and of chunks."""
        indexer = self.indexer
        if indexer is None:
            return 0, 0
        await asyncio.to_thread(indexer.scanned.wait)
        return indexer.index.num_files, indexer.index.num_chunks

    def close(self) -> None:
        """Stop the background work."""
        if self.indexer is not None:
            self.indexer.close()
            self.indexer = None

    def _restart(self) -> None:
        self.close()
        self._frozen.clear()
        sources = self.settings.context
        if not sources:
            return
        folders = self._folders if {ContextSource.REPOSITORY, ContextSource.IMPORTS} & set(sources) else ()
        # Imported lazily: slow, and unused while `context` is empty.
        from midfill.completion.context.indexer import Indexer

        self.indexer = Indexer(folders, self.settings.excluded_files)
        self._dirty = set(self._open)
        self._paths = {self._path(uri) for uri in self._open}
        self._flush("")

    # Notifications from the editor

    def opened(self, document: Document) -> None:
        """Take an opened document."""
        self._open[document.uri] = document
        if self.indexer is None:
            return
        self._paths.add(self._path(document.uri))
        self._dirty.add(document.uri)
        self._flush("")

    def edited(self, old: Document, new: Document) -> None:
        """Take a changed document."""
        self._open[new.uri] = new
        if self.indexer is None:
            return
        if new.uri not in self._dirty:
            self._dirty.add(new.uri)
            # Other documents may find this one changed; this one excludes itself.
            self._flush(new.uri)
        if ContextSource.EDITS in self.settings.context:
            self._note_edit(old, new)

    def closed(self, uri: str) -> None:
        """Drop a closed document."""
        document = self._open.pop(uri, None)
        self._frozen.pop(uri, None)
        self.secrets.forget(uri)
        self._dirty.discard(uri)
        if document is not None and self.indexer is not None:
            self._paths.discard(self._path(uri))
            self.indexer.close_document(self._path(uri))

    def files_changed(self, uris: Sequence[str]) -> None:
        """Take the URIs of workspace files that were written, created or deleted."""
        if self.indexer is None:
            return
        paths = [self.indexer.path_of(file) for uri in uris if (file := file_of(uri)) is not None]
        self.indexer.changed([path for path in paths if path is not None])

    def _flush(self, but: str) -> None:
        """Give the index the texts of changed documents, except the one that is being typed into."""
        if self.indexer is None:
            return
        for uri in self._dirty - {but}:
            document = self._open.get(uri)
            if document is not None and document.num_chars <= _MAX_CHARS and self._may_be_shown(uri):
                self.indexer.put(self._path(uri), document.text)
        self._dirty &= {but}

    def _may_be_shown(self, uri: str) -> bool:
        # Cells are parts of a notebook, which has a text for itself; "git:" and the like are other versions.
        return uri.partition(":")[0] in {"file", "untitled"} and not is_excluded(
            uri, self.settings.excluded_files
        )

    def _note_edit(self, old: Document, new: Document) -> None:
        first, _, _ = changed_lines(old.lines, new.lines)
        burst = self._burst
        if burst is not None and burst.document.uri == new.uri and abs(first - burst.line) <= _BURST_LINES:
            burst.document, burst.line = new, first
            return
        self._end_burst()
        self._burst = _Burst(new, old.lines, first)

    def _end_burst(self) -> None:
        burst, self._burst = self._burst, None
        if burst is not None and (snippet := self._as_snippet(burst)) is not None:
            self._edits.append((burst.document.uri, snippet))
            self._num_edits += 1

    def _as_snippet(self, burst: _Burst) -> Snippet | None:
        document = burst.document
        if document.num_chars > _MAX_CHARS or not self._may_be_shown(document.uri):
            return None
        first, old_end, new_end = changed_lines(burst.before, document.lines)
        removed = [line.rstrip("\r\n") for line in burst.before[first:old_end]]
        added = [line.rstrip("\r\n") for line in document.lines[first:new_end]]
        if not 0 < len(removed) + len(added) <= _MAX_EDIT_LINES or not "".join(removed + added).strip():
            return None
        # A very long line counts as a possible secret, whatever is in it.
        if any(len(line) > MAX_LINE or severity(line) for line in removed + added):
            return None
        if self.secrets.verdict(document) is not Verdict.CLEAN:
            return None
        lines = [f"-{line}" for line in removed] + [f"+{line}" for line in added]
        return Snippet(ContextSource.EDITS, self._path(document.uri) + ".diff", "\n".join(lines))

    # Requests

    def collect(self, snapshot: Snapshot) -> ContextBundle:
        """Return the context for a cursor; the same object as long as it stays the same."""
        if self.indexer is None or not self.settings.context_tokens:
            return EMPTY_BUNDLE
        uri, line = snapshot.document.uri, snapshot.cursor.line
        self._flush(uri)
        old = self._frozen.get(uri)
        state = self._state(uri)
        if old is not None and old.state == state and abs(line - old.line) <= _STAYS_FOR_LINES:
            return old.collected
        # The index takes this text a moment later; until then it finds the previous one.
        self._flush("")
        before = old.collected.snippets if old else ()
        repository = self._folders[0].path.name if self._folders else ""
        new = ContextBundle(
            tuple(_in_stable_order(self._choose(snapshot), before)), self._path(uri), repository
        )
        if old is not None and new == old.collected:
            new = old.collected
        self._frozen[uri] = _Frozen(line, state, new)
        self._frozen.move_to_end(uri)
        if len(self._frozen) > _MAX_FROZEN:
            self._frozen.popitem(last=False)
        return new

    def renew(self, snapshot: Snapshot) -> bool:
        """Choose the context again, before the next request would have to. Returns whether it has changed.

        Call it when no request waits: the next prompt is new to the KV cache.
        """
        uri = snapshot.document.uri
        old = self._frozen.get(uri)
        if old is None:
            return False
        near = abs(snapshot.cursor.line - old.line) <= _RENEWED_AFTER_LINES
        if near and old.state == self._state(uri):
            return False
        # Farther than any line, so that the context is chosen again.
        self._frozen[uri] = replace(old, line=-2 * _STAYS_FOR_LINES)
        return self.collect(snapshot) is not old.collected

    def _state(self, uri: str) -> tuple[int, int, bool]:
        """Return the state whose change demands a new choice: other documents, recent edits, end of scan.

        Files that change on disk count only when the context is chosen again; a build that writes files all
        the time must not make every prompt new.
        """
        if self.indexer is None:
            return 0, 0, False
        others = self.indexer.num_texts - self.indexer.texts.get(self._path(uri), 0)
        return others, self._num_edits, self.indexer.scanned.is_set()

    def _choose(self, snapshot: Snapshot) -> list[Snippet]:
        """Return the pieces that fit into the budget, best first."""
        near = _lines_near(snapshot)
        chosen: list[Snippet] = []
        chosen_lines: list[set[str]] = []
        room = self.settings.context_tokens * _CHARS_PER_TOKEN
        for snippet in self._candidates(snapshot):
            lines = _distinctive_lines(snippet.text)
            if not lines or len(lines & near) > _MAX_LIKE_CURSOR * len(lines):
                continue
            if any(len(lines & other) > _MAX_LIKE_CHOSEN * len(lines) for other in chosen_lines):
                continue
            if len(snippet.text) <= room:
                chosen.append(snippet)
                chosen_lines.append(lines)
                room -= len(snippet.text) + len(snippet.path)
            if room < _LITTLE_ROOM:
                break
        return chosen

    def _candidates(self, snapshot: Snapshot) -> Iterator[Snippet]:
        sources = self.settings.context
        if ContextSource.EDITS in sources:
            self._end_burst()
            for uri, snippet in reversed(self._edits):
                if uri != snapshot.document.uri:
                    yield snippet
        if ContextSource.IMPORTS in sources:
            yield from self._imported(snapshot)
        if ContextSource.REPOSITORY in sources or ContextSource.OPEN in sources:
            yield from self._similar(snapshot)

    def _imported(self, snapshot: Snapshot) -> Iterator[Snippet]:
        """Yield definitions of imported names that are used near the cursor, the nearest first."""
        if self.indexer is None:
            return
        from midfill.completion.context.chunks import imported_names

        document = snapshot.document
        names = imported_names(document.lines[:_IMPORT_LINES], document.language_id)
        found = self.indexer.index.define(names, without=self._path(document.uri))
        cursor = snapshot.cursor.line
        begin = max(0, cursor - _NEAR_LINES)
        above = "".join(document.lines[begin:cursor]) + snapshot.line_before
        offsets = {name: above.rfind(name) for name, _ in found}
        used = sorted((pair for pair in found if offsets[pair[0]] >= 0), key=lambda pair: -offsets[pair[0]])
        for _, piece in used[:_MAX_DEFINITIONS]:
            yield Snippet(ContextSource.IMPORTS, piece.path, piece.text)

    def _similar(self, snapshot: Snapshot) -> Iterator[Snippet]:
        if self.indexer is None:
            return
        cursor = snapshot.cursor.line
        lines = snapshot.document.lines
        query = [
            *reversed(lines[cursor + 1 : cursor + 1 + _QUERY_BELOW]),
            *lines[max(0, cursor - _QUERY_ABOVE) : cursor],
            snapshot.line_before,
        ]
        own = self._path(snapshot.document.uri)
        # Near lines are in the prompt already. Far parts of the document are as useful as another file.
        near = range(cursor - _NEAR_LINES - MAX_CHUNK_LINES, cursor + _NEAR_LINES)
        found = self.indexer.index.search(query, _MAX_CANDIDATES, but=(own, near))
        opened = self._paths | {own}
        if ContextSource.REPOSITORY not in self.settings.context:
            found = [piece for piece in found if piece.path in opened]
        found = [piece for piece in found if piece.score >= _MIN_SHARE * found[0].score]
        found.sort(key=lambda piece: -piece.score * (_OPEN_BOOST if piece.path in opened else 1))
        for piece in found:
            source = ContextSource.OPEN if piece.path in opened else ContextSource.REPOSITORY
            yield Snippet(source, piece.path, piece.text)

    def _path(self, uri: str) -> str:
        """Return the index's name for a document: its path in the workspace, else the end of its URI."""
        file = file_of(uri)
        path = self.indexer.path_of(file) if file is not None and self.indexer is not None else None
        return path if path is not None else unquote(uri).rpartition("/")[2]


def _in_stable_order(best_first: list[Snippet], before: Sequence[Snippet]) -> list[Snippet]:
    """Return the earlier snippets that were chosen again, in order; then the new ones, the best last."""
    chosen = set(best_first)
    stay = [snippet for snippet in before if snippet in chosen]
    return stay + [snippet for snippet in reversed(best_first) if snippet not in set(stay)]


def _lines_near(snapshot: Snapshot) -> set[str]:
    cursor = snapshot.cursor.line
    lines = snapshot.document.lines[max(0, cursor - _NEAR_LINES) : cursor + _NEAR_LINES + MAX_CHUNK_LINES]
    return _distinctive_lines("".join(lines))


def _distinctive_lines(text: str) -> set[str]:
    """Return the lines by which texts can be compared: no blank lines, no lone brackets."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 3}
