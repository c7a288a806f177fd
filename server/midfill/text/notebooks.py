"""Notebooks: which cells belong to which notebook, and the joined text that a cell is part of.

The cells' texts are ordinary documents, kept with all others; this module keeps only their order. For the
model, the cells of one language are one text: definitions in a cell above are in the prompt, and prose
between them is not. Knows nothing of LSP. Runs on the event loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from midfill.text.documents import Document, Point, Snapshot


@dataclass(slots=True)
class Notebooks:
    """All open notebooks."""

    _cells: dict[str, list[str]] = field(default_factory=dict)
    _notebook_of: dict[str, str] = field(default_factory=dict)

    def open(self, uri: str, cells: Iterable[str]) -> None:
        """Start a notebook with these cells (URIs), in order. Replaces an open one with the same URI."""
        self.close(uri)
        self._cells[uri] = []
        self.splice(uri, 0, 0, cells)

    def splice(self, uri: str, start: int, num_deleted: int, cells: Iterable[str]) -> None:
        """Replace a run of cells by others; indices outside the notebook are clamped."""
        own = self._cells.get(uri)
        if own is None:
            return
        start = max(0, min(start, len(own)))
        end = max(start, min(start + num_deleted, len(own)))
        new = list(cells)
        for cell in own[start:end]:
            self._notebook_of.pop(cell, None)
        own[start:end] = new
        # Last, since moving a cell deletes and inserts it in one change.
        for cell in new:
            self._notebook_of[cell] = uri

    def close(self, uri: str) -> list[str]:
        """Forget a notebook. Returns its cells."""
        cells = self._cells.pop(uri, [])
        for cell in cells:
            self._notebook_of.pop(cell, None)
        return cells

    def whole(self, snapshot: Snapshot, documents: Mapping[str, Document]) -> Snapshot:
        """Return the cursor in the text that the model sees: all cells of the cell's language, joined.

        A document that is not a cell is returned as it is. The result keeps the cell's URI and version; only
        its lines, and the cursor's line, are those of the joined text.
        """
        cell = snapshot.document
        notebook = self._notebook_of.get(cell.uri)
        if notebook is None:
            return snapshot
        lines: list[str] = []
        shift: int | None = None
        for uri in self._cells[notebook]:
            document = cell if uri == cell.uri else documents.get(uri)
            if document is None or document.language_id != cell.language_id:
                continue
            if lines:
                lines[-1] += cell.line_ending
            # A cell that a client lists twice by mistake counts where it is first.
            if uri == cell.uri and shift is None:
                shift = len(lines)
            lines += document.lines
        if shift is None:
            return snapshot
        joined = replace(cell, lines=lines, num_chars=sum(map(len, lines)))
        return Snapshot(joined, Point(snapshot.cursor.line + shift, snapshot.cursor.column))
