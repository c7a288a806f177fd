"""Recorded typing: documents, keys with their times, and requests for suggestions.

A typing session is one document and the keys typed into it at one place. `read_trace` reads sessions from a
file of JSON lines, `{"t": milliseconds, "send": {"method", "params"}}`, with LSP messages. Knows nothing of
servers; pure except for reading the file.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from midfill.errors import MidfillError
from midfill.lsp.messages import MalformedError, read_edited, read_inline_completion, read_opened, read_uri
from midfill.system.file_errors import why_unreadable
from midfill.text.documents import Change, Document, Encoding


@dataclass(frozen=True, slots=True)
class Key:
    """One edit by a key.

    Attributes:
        gap_s: seconds since the previous key, or since the document was opened.
        changes: the changes of the text; positions in UTF-16.
        cursor: (line, character) after it.
        request_after_s: seconds until the editor requests a suggestion, if no other key comes first; None if
            it does not.
    """

    gap_s: float
    changes: tuple[Change, ...]
    cursor: tuple[int, int]
    request_after_s: float | None


@dataclass(frozen=True, slots=True)
class TypingSession:
    """A document and the keys typed into it.

    Attributes:
        rest_s: seconds from the last key until the document is closed.
    """

    uri: str
    language_id: str
    text: str
    keys: tuple[Key, ...]
    rest_s: float

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return sum(key.gap_s for key in self.keys) + self.rest_s

    def documents(self) -> list[Document]:
        """Return the document after each key."""
        document = Document.open(self.uri, self.language_id, 1, self.text)
        documents = []
        for key in self.keys:
            document = document.edit(key.changes, document.version + 1, Encoding.UTF16)
            documents.append(document)
        return documents


def read_trace(path: Path) -> list[TypingSession]:
    """Read the sessions of a .jsonl or .jsonl.gz file. Raises `MidfillError` naming file and line."""
    number = 0
    reader = _Reader()
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007 - the error names it
                if not line.isspace():
                    reader.read(json.loads(line))
            sessions = reader.end()
    except UnicodeDecodeError as error:
        raise MidfillError(f"{path}, line {number + 1}: this is not text in UTF-8.") from error
    except (OSError, EOFError) as error:
        raise MidfillError(f"Cannot read {path}: {why_unreadable(error)}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = "not JSON" if isinstance(error, json.JSONDecodeError) else str(error) or "not a message"
        raise MidfillError(f"{path}, line {number}: this is not a row of a typing trace ({why}).") from error
    if not sessions:
        raise MidfillError(f"{path} has no session with typing in it.")
    return sessions


@dataclass(slots=True)
class _Reader:
    """Converts rows to sessions. One document is open at a time."""

    sessions: list[TypingSession] = field(default_factory=list)
    open: TypingSession | None = None
    last_s: float = 0.0
    key_s: float = 0.0

    def read(self, row: Any) -> None:
        """Process one row. Raises `ValueError` (`MalformedError`), `KeyError` or `TypeError` if invalid."""
        now_s, method, params = float(row["t"]) / 1000, row["send"]["method"], row["send"].get("params")
        if now_s < self.last_s:
            raise MalformedError(f"its time {row['t']} is before that of the row above")
        if method == "textDocument/didOpen":
            self._close(self.last_s)
            opened = read_opened(params)
            self.open = TypingSession(opened.uri, opened.language_id, opened.text, (), 0.0)
            self.key_s = now_s
        elif method == "textDocument/didChange":
            edited = read_edited(params)
            changes = tuple(edited.changes)
            if not changes or changes[-1].start is None:
                raise MalformedError("a change without a range")
            key = Key(now_s - self.key_s, changes, cursor_after(changes[-1]), None)
            session = self._of(edited.uri)
            self.open = replace(session, keys=(*session.keys, key))
            self.key_s = now_s
        elif method == "textDocument/inlineCompletion":
            request = read_inline_completion(params)
            session = self._of(request.uri)
            if not session.keys:
                raise MalformedError("a request before the first key")
            key = replace(session.keys[-1], cursor=request.position, request_after_s=now_s - self.key_s)
            self.open = replace(session, keys=(*session.keys[:-1], key))
        elif method == "textDocument/didClose":
            self._of(read_uri(params))
            self._close(now_s)
        # `$/cancelRequest` and other messages are skipped: the replay sends its own.
        self.last_s = now_s

    def end(self) -> list[TypingSession]:
        """Return all sessions with at least one key."""
        self._close(self.last_s)
        return self.sessions

    def _of(self, uri: str) -> TypingSession:
        if self.open is None or self.open.uri != uri:
            raise MalformedError("its document is not the one that is open")
        return self.open

    def _close(self, now_s: float) -> None:
        if self.open is not None and self.open.keys:
            self.sessions.append(replace(self.open, rest_s=now_s - self.key_s))
        self.open = None


def cursor_after(change: Change) -> tuple[int, int]:
    """Return the cursor (in UTF-16) after an edit that has a range: at the end of its text."""
    line, column = change.start or (0, 0)
    *above, last = change.text.split("\n")
    return line + len(above), len(last.encode("utf-16-le")) // 2 + (0 if above else column)


def total_s(sessions: Iterable[TypingSession]) -> float:
    """Return the duration of all sessions in seconds."""
    return sum(session.seconds for session in sessions)
