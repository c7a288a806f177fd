"""Watches open documents for CERTAIN secrets, from version to version.

Only the changes since the last judged version are judged: those of one key at once, larger ones by a thread,
block by block, so that neither the event loop nor another document waits. The state belongs to the event
loop; the thread gets lines and returns numbers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum

from midfill.text.documents import Document
from midfill.text.secret_filter import MAX_LINE, Severity, find_secrets, severity

_LOG = logging.getLogger(__name__)

# Judging takes 0.1 us per character of code, ten times that for the worst text: this many characters keep the
# event loop for a few milliseconds at most.
_MAX_CHARS_AT_ONCE = 4_000
# The thread judges this much of one document before another one's turn.
_BLOCK_CHARS = 32_000


class Verdict(Enum):
    """The verdict on a document."""

    CLEAN = "clean"
    SECRET = "secret"  # noqa: S105 - the verdict's code
    PENDING = "pending"
    """It is being judged."""


@dataclass(frozen=True, slots=True)
class _Judged:
    """The last version that was judged: its lines, and the number of lines for each hash of a secret line."""

    lines: Sequence[str] = ()
    secrets: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True)
class SecretWatch:
    """Judges the open documents, and keeps the verdicts.

    Attributes:
        in_background: judge large changes in a thread, which needs an event loop; else at once.
    """

    in_background: bool = True
    _judged: dict[str, _Judged] = field(default_factory=dict)
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _pool: ThreadPoolExecutor | None = None

    def verdict(self, document: Document) -> Verdict:
        """Return the verdict on a document; begin to judge it if that is necessary."""
        uri = document.uri
        known = self._judged.get(uri, _Judged())
        first, old_end, new_end = document.changes_since(known.lines)
        if old_end > first or new_end > first:
            added = document.lines[first:new_end]
            if self.in_background and _exceeds(added, _MAX_CHARS_AT_ONCE):
                if uri not in self._tasks:
                    self._tasks[uri] = asyncio.get_running_loop().create_task(self._judge(document))
                return Verdict.PENDING
            known = _replaced(known, document, known.lines[first:old_end], _secret_lines(added))
            if uri not in self._tasks:
                self._judged[uri] = known
        return Verdict.SECRET if known.secrets.total() else Verdict.CLEAN

    async def wait(self, document: Document, within_s: float) -> bool:
        """Wait until a document has been judged. Returns False if that takes longer; judging continues."""
        try:
            async with asyncio.timeout(within_s):
                while self.verdict(document) is Verdict.PENDING:
                    await asyncio.wait([self._tasks[document.uri]])
        except TimeoutError:
            return False
        return True

    def forget(self, uri: str) -> None:
        """Drop the state of a document that was closed."""
        self._judged.pop(uri, None)
        if (task := self._tasks.pop(uri, None)) is not None:
            task.cancel()

    async def _judge(self, document: Document) -> None:
        """Judge the changes of a document, a block at a time."""
        uri = document.uri
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="midfill-secrets")
        known = self._judged.get(uri, _Judged())
        first, old_end, new_end = document.changes_since(known.lines)
        found: list[int] = []
        try:
            for block in _blocks(document.lines[first:new_end]):
                found += await asyncio.get_running_loop().run_in_executor(self._pool, _secret_lines, block)
        except Exception as error:
            # Not its message, which may quote the text.
            _LOG.error("the search for secrets in a document failed: %s", type(error).__name__)
        else:
            self._judged[uri] = _replaced(known, document, known.lines[first:old_end], found)
        finally:
            if self._tasks.get(uri) is asyncio.current_task():
                del self._tasks[uri]


def _replaced(known: _Judged, document: Document, removed: Sequence[str], found: Sequence[int]) -> _Judged:
    """Return the state after lines were removed, and lines with secrets were added."""
    secrets = known.secrets
    if found or (secrets and any(hash(line) in secrets for line in removed)):
        secrets = secrets.copy()
        secrets.subtract(hash(line) for line in removed if hash(line) in known.secrets)
        secrets.update(found)
        secrets = +secrets
    return _Judged(document.lines, secrets)


def _secret_lines(lines: Sequence[str]) -> list[int]:
    """Return the hashes of the lines that hold a CERTAIN secret."""
    # Long lines one by one, in pieces: one call for a whole line would keep the other threads waiting.
    found = [hash(line) for line in lines if len(line) > MAX_LINE and severity(line) is Severity.CERTAIN]
    text = "\n".join(["" if len(line) > MAX_LINE else line.rstrip("\r\n") for line in lines])
    short = find_secrets(text)
    return found + [hash(lines[number]) for number, worst in short.items() if worst is Severity.CERTAIN]


def _exceeds(lines: Sequence[str], max_chars: int) -> bool:
    num_chars = 0
    for line in lines:
        num_chars += len(line) + 1
        if num_chars > max_chars:
            return True
    return False


def _blocks(lines: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield lines in blocks of about `_BLOCK_CHARS`."""
    begin, num_chars = 0, 0
    for at, line in enumerate(lines):
        num_chars += len(line) + 1
        if num_chars > _BLOCK_CHARS:
            yield lines[begin : at + 1]
            begin, num_chars = at + 1, 0
    if begin < len(lines):
        yield lines[begin:]
