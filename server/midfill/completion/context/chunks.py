"""Splits a source file into chunks of a few lines, its definitions with their signatures, and its imports.

Chunks follow the syntax tree: a small definition is one chunk, a large one is split, and small neighbours are
joined. Languages without a grammar are split at blank lines. Runs in the indexing process and, for the
imports of the current document, on the event loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from tree_sitter import Node

from midfill.completion.context.bundle import MAX_CHUNK_LINES
from midfill.completion.context.files import SourceFile
from midfill.text.syntax import parsed

_MAX_CHUNK_CHARS = 640
_MIN_CHUNK_CHARS = 20
_MAX_SIGNATURE_CHARS = 480
_MAX_DEFINITIONS = 400

# Names of the grammars' nodes.
_DEFINES = re.compile(
    r"(?:function|method|class|struct|enum|interface|trait|constructor|type_alias|protocol|object|record)"
    r"(?:_signature)?_(?:definition|declaration|item|spec|specifier)\Z|\A(?:method|class|module|singleton_method)\Z"
)
_IMPORTS = re.compile(
    r"import|include|use_declaration|using_directive|namespace_use|require|package_clause", re.ASCII
)
_WORD = re.compile(r"[^\W\d]\w+")
_TERM = re.compile(r"[^\W\d_]\w{1,63}")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_MAY_IMPORT = re.compile(r"\b(?:import|include|use|using|require|package)")
_IMPORT_LINE = re.compile(
    r"^\s*(?:from\s+[\w.]+\s+import\b|import\b|use\b|using\b|#\s*include\b|require\b|(?:const|let|var)\b.*\brequire\()"
)


# Parsing a file that is not code to its grammar may take a hundred times as long.
_FILE_BUDGET_S = 0.5
_IMPORTS_BUDGET_S = 0.02
_MAX_IMPORT_CHARS = 2_000
_MAX_HEAD_BYTES = 2_000


@dataclass(frozen=True, slots=True)
class FileChunk:
    """A few lines of a file, without the blank ones around them.

    Attributes:
        line: its first line, from 0.
        text: its lines.
        terms: its search terms, separated by spaces; see `terms`.
    """

    line: int
    text: str
    terms: str


@dataclass(frozen=True, slots=True)
class Definition:
    """A name that a file defines, and how the definition begins: `def f(x: int) -> str:`."""

    name: str
    signature: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """The parts of a file that may become context. None of them may hold a secret."""

    chunks: tuple[FileChunk, ...]
    definitions: tuple[Definition, ...]


def parse(file: SourceFile) -> Parsed:
    """Split a file; lines that may hold a secret are left out."""
    lines = file.text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    source = "\n".join(lines)
    data = source.encode("utf-8", "replace")
    tree = parsed(data, file.language_id, _FILE_BUDGET_S)
    root = None if tree is None else tree.root_node
    ranges = _by_tree(root) if root is not None else _by_blank_lines(lines)
    chunks = tuple(_chunks(_joined(ranges, lines), lines, file.secret_lines))
    definitions = tuple(_definitions(root, data, file.secret_lines)) if root is not None else ()
    return Parsed(chunks, definitions)


def terms(text: str) -> list[str]:
    """Return the search terms of a text: its words and the parts of compound words, in lower case."""
    return [term for word in _TERM.findall(text) for term in _with_parts(word)]


# 50,000 entries would take 19 MB in a server whose user keeps typing new words, and save a sixth of the time.
@lru_cache(maxsize=10_000)
def _with_parts(word: str) -> tuple[str, ...]:
    parts = _PART.findall(word)
    more = [part.lower() for part in parts if len(part) > 2] if len(parts) > 1 else []
    return (word.lower(), *more)


def imported_names(lines: list[str], language_id: str) -> set[str]:
    """Return the names in the import statements among some lines: modules, and what is imported from them."""
    # Longer lines are data.
    lines = [line for line in lines if len(line) <= _MAX_IMPORT_CHARS]
    names: set[str] = set()
    begins = [row for row, line in enumerate(lines) if _MAY_IMPORT.search(line)]
    if not begins:
        return names
    # The lines after the last import need not be read.
    end, depth = begins[-1], 0
    for line in lines[end:]:
        end += 1
        depth += sum(line.count(opener) for opener in "([{") - sum(line.count(closer) for closer in ")]}")
        if depth <= 0:
            break
    data = "".join(lines[:end]).encode("utf-8", "replace")
    if (tree := parsed(data, language_id, _IMPORTS_BUDGET_S)) is None:
        return {word for line in lines if _IMPORT_LINE.match(line) for word in _WORD.findall(line)}
    for node in tree.root_node.children:
        text = _text(node, data)
        if _IMPORTS.search(node.type) or (node.type.endswith("declaration") and "require(" in text):
            names.update(_WORD.findall(text))
    return names


def _by_tree(root: Node) -> Iterator[tuple[int, int]]:
    """Yield half-open ranges of lines: nodes that are small enough, and the pieces of larger ones."""
    nodes = list(reversed(root.children))
    while nodes:
        node = nodes.pop()
        first, end = node.start_point.row, node.end_point.row + (node.end_point.column > 0)
        small = end - first <= MAX_CHUNK_LINES and node.end_byte - node.start_byte <= _MAX_CHUNK_CHARS
        if small or not node.child_count:
            yield first, end
            continue
        children = node.children
        # The lines down to the first child with lines of its own belong together: `class A(B):`.
        nodes += reversed([child for child in children if child.end_point.row > child.start_point.row])
        body = next((child for child in children if child.end_point.row > child.start_point.row), None)
        yield first, min(end, first + 1 if body is None else max(first + 1, body.start_point.row))


def _by_blank_lines(lines: list[str]) -> Iterator[tuple[int, int]]:
    first = 0
    for row, line in enumerate(lines):
        if not line.strip():
            yield first, row
            first = row + 1
    yield first, len(lines)


def _joined(ranges: Iterator[tuple[int, int]], lines: list[str]) -> Iterator[tuple[int, int]]:
    """Yield the ranges, small neighbours joined and long ones cut."""
    begin, end, size = 0, 0, 0
    for first, after in ranges:
        for start in range(max(first, end), after, MAX_CHUNK_LINES):
            stop = min(after, start + MAX_CHUNK_LINES)
            more = sum(map(len, lines[end:stop]))
            if end and (stop - begin > MAX_CHUNK_LINES or size + more > _MAX_CHUNK_CHARS):
                yield begin, end
                begin, size, more = start, 0, sum(map(len, lines[start:stop]))
            elif not end:
                begin = start
            end, size = stop, size + more
    yield begin, end


def _chunks(
    ranges: Iterator[tuple[int, int]], lines: list[str], secret_lines: frozenset[int]
) -> Iterator[FileChunk]:
    for first, end in ranges:
        if secret_lines and any(row in secret_lines for row in range(first, end)):
            continue
        text = "\n".join(lines[first:end])
        body = text.strip("\n")
        if len(body.strip()) >= _MIN_CHUNK_CHARS and len(body) <= 2 * _MAX_CHUNK_CHARS:
            body = body.rstrip()
            yield FileChunk(first + len(text) - len(text.lstrip("\n")), body, " ".join(terms(body)))


def _definitions(root: Node, data: bytes, secret_lines: frozenset[int]) -> Iterator[Definition]:
    """Yield what others can import: definitions that are not inside functions; classes with their members."""
    nodes, found = list(reversed(root.children)), 0
    while nodes and found < _MAX_DEFINITIONS:
        node = nodes.pop()
        if not _DEFINES.search(node.type):
            nodes += reversed(node.children)
        elif name := _name(node, data):
            rows = range(node.start_point.row, node.end_point.row + 1)
            if not secret_lines.intersection(rows):
                found += 1
                yield Definition(name, _signature(node, data))


def _text(node: Node, data: bytes) -> str:
    return data[node.start_byte : node.end_byte].decode("utf-8", "replace")


def _name(node: Node, data: bytes) -> str:
    name = node.child_by_field_name("name")
    while name is None and (inner := node.child_by_field_name("declarator")) is not None:
        node = inner
        name = inner if inner.type.endswith("identifier") else None
    return "" if name is None else _text(name, data)


def _signature(node: Node, data: bytes) -> str:
    """Return a definition up to its body; for one with members, their signatures too."""
    body = node.child_by_field_name("body")
    text = _head(node, body, data)
    if body is None or "function" in node.type or "method" in node.type:
        return text[:_MAX_SIGNATURE_CHARS]
    for child in body.children:
        member = child.child_by_field_name("definition") or child
        if _DEFINES.search(member.type) and (name := _name(member, data)):
            # Private members and most of Python's special ones are not called from other files.
            if name.startswith("_") and name not in {"__init__", "__call__"}:
                continue
            more = "\n    " + _head(member, member.child_by_field_name("body"), data)
            if len(text) + len(more) > _MAX_SIGNATURE_CHARS:
                break
            text += more
    return text[:_MAX_SIGNATURE_CHARS]


def _head(node: Node, body: Node | None, data: bytes) -> str:
    """Return the text before the body, in one line."""
    end = min(node.end_byte if body is None else body.start_byte, node.start_byte + _MAX_HEAD_BYTES)
    head = data[node.start_byte : end].decode("utf-8", "replace")
    text = re.sub(r"(?<![ \t])[ \t]*+(?:#|//)[^\n]*\n", "\n", head)
    return re.sub(r"([(\[{]) |,? (?=[)\]}])", r"\1", " ".join(text.split()))
