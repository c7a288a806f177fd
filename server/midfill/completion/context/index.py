"""The index of a repository: its chunks by BM25, its definitions by name.

BM25 comes from tantivy, in memory. Of the libraries compared, rank-bm25 scores every chunk in Python and
bm25s must be rebuilt for each change; tantivy updates file by file and searches in one or two milliseconds.
The indexing thread calls `add`, `remove` and `commit`; the event loop calls `search` and `define`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from math import log
from typing import Any

import tantivy

from midfill.completion.context.chunks import Parsed, terms

# Tantivy needs at least 15 MB for a writer's thread.
_WRITER_BYTES = 15_000_000
# A word in every eighth chunk distinguishes nothing, and its list is the longest to walk.
_MAX_SHARE = 1 / 8
_SHORT = 200
_MAX_TERMS = 24
# Up to this many chunks of the file itself may score higher than the wanted ones.
_MAX_OWN = 16
_SEPARATOR = "\n"


@dataclass(frozen=True, slots=True)
class IndexedPiece:
    """A piece of a file of the repository.

    Attributes:
        path: relative to the workspace folder.
        line: its first line, from 0; 0 for a definition.
        text: its lines.
        score: the BM25 score; 0 for a definition.
    """

    path: str
    line: int
    text: str
    score: float = 0.0


@dataclass(slots=True)
class RepositoryIndex:
    """A searchable index that is updated file by file."""

    _index: tantivy.Index = field(init=False)
    _writer: tantivy.IndexWriter = field(init=False)
    _definitions: dict[str, dict[str, str]] = field(default_factory=dict)
    _names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        schema = tantivy.SchemaBuilder()
        schema.add_text_field("path", stored=True, tokenizer_name="raw", index_option="basic")
        # Terms are made here, where camel case is known; the index keeps how often each occurs.
        schema.add_text_field("terms", tokenizer_name="whitespace", index_option="freq")
        # Not searched: line, newline, text.
        schema.add_bytes_field("chunk", stored=True)
        self._index = tantivy.Index(schema.build())
        self._writer = self._index.writer(_WRITER_BYTES, 1)

    @property
    def num_chunks(self) -> int:
        """The number of chunks as of the last commit."""
        return self._index.searcher().num_docs

    @property
    def num_files(self) -> int:
        """The number of files."""
        return len(self._names)

    def add(self, path: str, parsed: Parsed) -> None:
        """Add a file, or replace it. It can be found after `commit`."""
        self.remove(path)
        for chunk in parsed.chunks:
            document = tantivy.Document()
            document.add_text("path", path)
            document.add_text("terms", chunk.terms)
            document.add_bytes("chunk", f"{chunk.line}{_SEPARATOR}{chunk.text}".encode("utf-8", "replace"))
            self._writer.add_document(document)
        for definition in parsed.definitions:
            # A new dictionary for each change, so that the event loop can continue to read the old one.
            known = self._definitions.get(definition.name, {})
            self._definitions[definition.name] = known | {path: definition.signature}
        self._names[path] = tuple({definition.name for definition in parsed.definitions})

    def remove(self, path: str) -> None:
        """Remove a file."""
        if path not in self._names:
            return
        self._writer.delete_documents_by_term("path", path)
        for name in self._names.pop(path):
            rest = {other: text for other, text in self._definitions[name].items() if other != path}
            if rest:
                self._definitions[name] = rest
            else:
                del self._definitions[name]

    def commit(self) -> None:
        """Make added and removed files visible to searches."""
        self._writer.commit()
        self._index.reload()

    def paths(self) -> list[str]:
        """Return the paths of all files."""
        return list(self._names)

    def search(
        self, text: Sequence[str], limit: int, *, but: tuple[str, range] = ("", range(0))
    ) -> list[IndexedPiece]:
        """Return the chunks that are most like some lines; the last lines weigh most.

        `but` is a file, and those of its lines that are left out.
        """
        weights: dict[str, float] = {}
        for number, line in enumerate(reversed(text)):
            for term in terms(line):
                weights.setdefault(term, 1 / (1 + number / 8))
        searcher = self._index.searcher()
        chosen = _most_distinctive(weights, searcher)
        if not chosen:
            return []
        schema = self._index.schema
        clauses = [
            (
                tantivy.Occur.Should,
                tantivy.Query.boost_query(tantivy.Query.term_query(schema, "terms", term), weight),
            )
            for term, weight in chosen
        ]
        # Chunks of the file itself are filtered here: a "must not" clause would skip whole blocks.
        hits = searcher.search(tantivy.Query.boolean_query(clauses), limit + _MAX_OWN, count=False).hits
        path, lines = but
        found: list[IndexedPiece] = []
        for score, address in hits:
            piece = _found(searcher.doc(address), score)
            if piece.path != path or piece.line not in lines:
                found.append(piece)
            if len(found) == limit:
                break
        return found

    def define(self, names: Iterable[str], *, without: str = "") -> list[tuple[str, IndexedPiece]]:
        """Return imported names with definitions, from the files whose paths mention most of the names."""
        names = set(names)
        found = []
        for name in sorted(names):
            signatures = {
                path: text for path, text in self._definitions.get(name, {}).items() if path != without
            }
            if not signatures:
                continue
            best = max(signatures, key=lambda path: (_num_named(path, names), -len(path), path))
            # Many files define `main`; the import names the one that is meant.
            if _num_named(best, names):
                found.append((name, IndexedPiece(best, 0, signatures[best])))
        return found


def _most_distinctive(weights: Mapping[str, float], searcher: tantivy.Searcher) -> list[tuple[str, float]]:
    """Return the terms that can add most to a chunk's score: near the cursor, and in few chunks.

    They are also the quickest to look up.
    """
    num_docs = searcher.num_docs
    worth = []
    for term, weight in weights.items():
        df = searcher.doc_freq("terms", term)
        if 0 < df <= max(_SHORT, _MAX_SHARE * num_docs):
            worth.append((weight * log(1 + (num_docs - df + 0.5) / (df + 0.5)), term, weight))
    return [(term, weight) for _, term, weight in nlargest(_MAX_TERMS, worth)]


def _num_named(path: str, names: set[str]) -> int:
    return len(names.intersection(re.split(r"[/.]", path)))


def _found(document: tantivy.Document, score: float) -> IndexedPiece:
    stored: Any = document.get_first("chunk")
    line, _, text = bytes(stored).decode("utf-8").partition(_SEPARATOR)
    return IndexedPiece(str(document.get_first("path")), int(line), text, score)
