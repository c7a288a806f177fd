"""Syntax by tree-sitter: brackets, strings, comments and errors of a piece of source.

All functions take text and a language identifier and return None without a grammar, so that the caller can
use indentation instead. The pieces are windows of a file and incomplete, so the questions are about tokens,
which survive an unclosed brace further up, and not about whole nodes, which do not. Knows nothing of
documents or models. Any thread; keeps nothing but the grammars.
"""

from __future__ import annotations

import ast
import bisect
import itertools
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache

from tree_sitter import Language, Node, Parser, Tree
from tree_sitter_language_pack import SupportedLanguage, get_language

from midfill.text import notation

# For one parse, which runs on the event loop while a key may be waiting.
_BUDGET_S = 0.004
# This much text on both sides of quotes shows which side is in a string.
_SIDE = 800
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_CLOSERS = frozenset(_BRACKETS.values())
_RUBY = dict.fromkeys(
    ("def", "class", "module", "do", "begin", "case", "if", "unless", "while", "until", "for"), "end"
)


@dataclass(frozen=True, slots=True)
class _Grammar:
    """How to parse a language.

    Attributes:
        name: the grammar's name in the language pack.
        keywords: words that open a block, with the words that close it.
        lead: text that the grammar needs first to take the rest for code.
        stray: closers that may also occur without an opener, as `)` in a shell's `case` does.
        tokens_only: only brackets, strings and comments of its tree are used, no whole nodes.
    """

    name: SupportedLanguage
    keywords: Mapping[str, str] = field(default_factory=dict)
    lead: bytes = b""
    stray: frozenset[str] = frozenset()
    tokens_only: bool = False


# By LSP language identifier. `typescript` cannot parse JSX, `tsx` cannot parse `<T>x`.
_GRAMMARS = {
    "c": _Grammar("c"),
    "cpp": _Grammar("cpp"),
    "csharp": _Grammar("csharp"),
    "css": _Grammar("css"),
    "dart": _Grammar("dart"),
    "elixir": _Grammar("elixir", {"do": "end", "fn": "end"}),
    "go": _Grammar("go"),
    "haskell": _Grammar("haskell", tokens_only=True),
    "java": _Grammar("java"),
    "javascript": _Grammar("javascript"),
    "javascriptreact": _Grammar("javascript"),
    "json": _Grammar("json"),
    "jsonc": _Grammar("json"),
    "julia": _Grammar("julia", tokens_only=True),
    "kotlin": _Grammar("kotlin"),
    "lua": _Grammar("lua", {"function": "end", "if": "end", "do": "end", "repeat": "until"}),
    "nix": _Grammar("nix", tokens_only=True),
    "objective-c": _Grammar("objc", tokens_only=True),
    "ocaml": _Grammar("ocaml", tokens_only=True),
    # Not Perl's: its scanner does not end on some texts, and nothing can stop it.
    "php": _Grammar("php", lead=b"<?php "),
    "python": _Grammar("python"),
    "r": _Grammar("r", tokens_only=True),
    "ruby": _Grammar("ruby", _RUBY),
    "rust": _Grammar("rust"),
    "scala": _Grammar("scala"),
    "scss": _Grammar("scss", tokens_only=True),
    "shellscript": _Grammar(
        "bash",
        {"if": "fi", "do": "done", "case": "esac"},
        stray=frozenset({")"}),
    ),
    "swift": _Grammar("swift"),
    "toml": _Grammar("toml", tokens_only=True),
    "typescript": _Grammar("typescript"),
    "typescriptreact": _Grammar("tsx"),
    "yaml": _Grammar("yaml", tokens_only=True),
    "zig": _Grammar("zig"),
}
# A node whose type has one of these words is not code.
_OPAQUE = (
    "string",
    "comment",
    "char",
    "rune",
    "regex",
    "heredoc",
    "nowdoc",
    "sigil",
    "pod",
    "block_scalar",
    "jsx_text",
)
# A node whose type has one of these words is code inside a text.
_EMBEDS = ("interpolation", "substitution", "interpolated_expression", "jsx_expression")
_LOOPS = frozenset({"while", "until", "for"})
_MODIFIERS = frozenset({"if", "unless", "while", "until"})


class _ParserInput(threading.local):
    """The parser's input, one for each thread.

    py-tree-sitter never frees the object that a read callback returns (0.25 and 0.26; and it checks the time
    only with such a callback), so every text would be kept. It gets the same object each time, with other
    contents.
    """

    def __init__(self) -> None:
        self.buffer = bytearray()


_source = _ParserInput()


@dataclass(frozen=True, slots=True)
class Delimiter:
    """A bracket, or a word that opens or closes a block.

    Attributes:
        start, end: its range, in code points.
        text: as written.
        closer: its closing counterpart; "" if it closes something itself.
    """

    start: int
    end: int
    text: str
    closer: str

    def shifted(self, distance: int) -> Delimiter:
        """Return the delimiter, moved to the right by some characters."""
        return Delimiter(self.start + distance, self.end + distance, self.text, self.closer)


@dataclass(frozen=True, slots=True)
class Outline:
    """The delimiters, strings and comments of a text from `start` on.

    Attributes:
        open: the closers still needed at `start`, outermost first.
        delimiters: those from `start` on, in order.
        opaque: (start, end, is a comment) of comments, strings and the like that end after `start`, in order.
    """

    open: tuple[str, ...]
    delimiters: tuple[Delimiter, ...]
    opaque: tuple[tuple[int, int, bool], ...]

    def within(self, offset: int) -> bool:
        """Return whether an offset is inside a string or a comment that began before it."""
        index = bisect.bisect_left(self.opaque, offset, key=lambda span: span[0])
        return index > 0 and offset < self.opaque[index - 1][1]

    def ends_comment(self, offset: int) -> bool:
        """Return whether a comment that began before an offset ends there, or continues."""
        return any(start < offset <= end for start, end, comment in self.opaque if comment)

    def is_comment(self, start: int, end: int) -> bool:
        """Return whether a range without blanks at its ends is nothing but comment."""
        return any(first <= start and end <= last for first, last, comment in self.opaque if comment)


def knows(language_id: str) -> bool:
    """Return whether there is a grammar for a language."""
    return language_id in _GRAMMARS


def new_parser(language_id: str) -> Parser | None:
    """Return a parser for questions about whole nodes; for one thread. None without a grammar."""
    grammar = _GRAMMARS.get(language_id)
    return None if grammar is None or grammar.tokens_only else Parser(_language(grammar.name))


def parsed(data: bytes, language_id: str, budget_s: float) -> Tree | None:
    """Return the tree of a whole text. None without a grammar, or after `budget_s` of CPU time."""
    grammar = _GRAMMARS.get(language_id)
    return None if grammar is None else _parse(data, grammar, budget_s=budget_s)


def outline(text: str, language_id: str, start: int = 0) -> Outline | None:
    """Return the outline of a text from `start` on. None without a grammar, or if it takes too long."""
    growing = Growing.of(text[:start], language_id)
    return None if growing is None else growing.outline(text[start:])


@dataclass(frozen=True, slots=True)
class Enclosing:
    """The string or comment that a cursor is in.

    Attributes:
        start: where it begins, in the text before the cursor, in code points.
        rest: its part after the cursor.
        comment: it is a comment.
    """

    start: int
    rest: str
    comment: bool


def openings(text: str, language_id: str, *, whole: bool) -> list[tuple[int, str, bool]]:
    """Return the strings and comments that may be open at the end of a text; see `notation.openings`.

    Args:
        text: the text above a cursor.
        language_id: its language.
        whole: the text begins where the file does. If not, it may begin within a string, and an apparent
            opening mark may be a closing one.
    """
    found = notation.openings(text, language_id, whole=whole)
    if whole:
        return found
    return [one for one in found if not _is_end(text, one[0], one[1], language_id)]


def _is_end(text: str, at: int, quote: str, language_id: str) -> bool:
    """Return whether quotes end a string, by which side of them the grammar can parse."""
    if not text.startswith(quote, at):
        return False
    # Without the line that is being written, so that the question at the next key is the same.
    after = text[at + len(quote) : text.rfind("\n") + 1][:_SIDE]
    before = text[max(0, text.rfind(quote, 0, at) + len(quote), at - _SIDE) : at]
    if at - len(before) > 0:
        # Begin with a whole line.
        before = before.partition("\n")[2]
    return _share_wrong(after, language_id) <= _share_wrong(before, language_id)


@lru_cache(maxsize=16)
def _share_wrong(text: str, language_id: str) -> float:
    """Return the number of syntax errors per line of a text, whose last line is incomplete."""
    lines = textwrap.dedent(text).strip("\n").split("\n")
    if len(lines) > 1:
        lines.pop()
    # One-word lines are too short to show errors.
    num_told = sum(len(line.split()) > 1 for line in lines)
    num_wrong = count_errors("\n".join(lines), language_id)
    return 0.5 if num_wrong is None or not num_told else num_wrong / num_told


def enclosing(before: str, after: str, language_id: str) -> Enclosing | None:
    """Return the string or comment that a cursor between two texts is in.

    None in code, in code that is embedded in a string, without a grammar, or if it takes too long.
    """
    grammar = _GRAMMARS.get(language_id)
    if grammar is None:
        return None
    # A word in place of the inserted text, so that there is a token at the cursor.
    head, tail = _lead(before, grammar) + _encode(before), _encode(after)
    tree = _parse(head + b"x" + tail, grammar)
    if tree is None:
        return None
    outermost = None
    node = tree.root_node.descendant_for_byte_range(len(head), len(head) + 1)
    while node is not None and not (node.is_named and _names(node.type, _EMBEDS)):
        if _is_opaque(node) and node.start_byte < len(head):
            outermost = node
        node = node.parent
    if outermost is None:
        return None
    start = len(head[: outermost.start_byte].decode("utf-8", "replace")) - len(_lead(before, grammar))
    rest = tail[: max(0, outermost.end_byte - len(head) - 1)].decode("utf-8", "replace")
    return Enclosing(max(0, start), rest, "comment" in outermost.type)


def count_errors(text: str, language_id: str, budget_s: float = _BUDGET_S) -> int | None:
    """Return the number of syntax errors in a text.

    None without a grammar, or if parsing takes longer than `budget_s`.
    """
    grammar = _GRAMMARS.get(language_id)
    if grammar is None:
        return None
    tree = _parse(_lead(text, grammar) + _encode(text), grammar, budget_s=budget_s)
    if tree is None:
        return None
    count, nodes = 0, [tree.root_node]
    while nodes:
        node = nodes.pop()
        wrong = [child for child in node.children if child.has_error or child.is_missing]
        # A missing hidden token, such as the end of a line, is not the child of any node.
        count += node.is_error or node.is_missing or (node.has_error and not wrong)
        nodes += wrong
    return count


def first_error(text: str, language_id: str) -> int | None:
    """Return the line, from 0, at which the language's own parser gives up.

    None if it parses all of the text, or if there is no such parser. Python has one, which checks indentation
    that the grammar accepts. A text that begins inside a block is parsed as one.
    """
    if language_id != "python":
        return None
    begins = text.lstrip("\r\n")
    inside = begins[:1] in {" ", "\t"}
    try:
        with warnings.catch_warnings():
            # The user's invalid escapes are not reported here.
            warnings.simplefilter("ignore")
            ast.parse("if 1:\n" + text if inside else text)
    except SyntaxError as error:
        return max(0, (error.lineno or 1) - 1 - inside)
    except (ValueError, RecursionError, MemoryError):
        # A null byte; or nested deeper than the parser goes.
        return 0
    return None


@dataclass(slots=True)
class Growing:
    """A growing text that is parsed incrementally.

    Attributes:
        before: the text that does not change.
    """

    before: bytes
    _grammar: _Grammar
    _data: bytes = b""
    _tree: Tree | None = None

    @staticmethod
    def of(before: str, language_id: str) -> Growing | None:
        """Return a growing text that begins with `before`. None without a grammar."""
        grammar = _GRAMMARS.get(language_id)
        return None if grammar is None else Growing(_lead(before, grammar) + _encode(before), grammar)

    def outline(self, text: str) -> Outline | None:
        """Return the outline of `text`, which follows `before`; offsets count from the start of `text`.

        None, from then on, once it has taken too long.
        """
        data = self.before + _encode(text)
        if self._tree is not None:
            same = _num_common(self._data, data)
            at = _point(data, same)
            old_end, new_end = _point(self._data, len(self._data)), _point(data, len(data))
            self._tree.edit(same, len(self._data), len(data), at, old_end, new_end)
        elif self._data:
            return None
        self._tree, self._data = _parse(data, self._grammar, self._tree), data
        return None if self._tree is None else _read(self._tree, data, len(self.before), self._grammar)


def _parse(
    data: bytes, grammar: _Grammar, old: Tree | None = None, budget_s: float = _BUDGET_S
) -> Tree | None:
    """Return the tree of a text; None if it is not ready within the budget.

    Grammars take ten times as long for a text that is not code to them, such as one that begins within a
    string. The budget is CPU time of this thread, so that answers do not depend on other programs.
    """
    deadline = time.thread_time() + budget_s
    buffer = _source.buffer

    def read(byte: int, _: object) -> bytearray:
        buffer[:] = memoryview(data)[byte:]
        return buffer

    def late(*_: object) -> bool:
        return time.thread_time() > deadline

    parser = Parser(_language(grammar.name))
    try:
        if old is None:
            return parser.parse(read, progress_callback=late)
        return parser.parse(read, old, progress_callback=late)
    except ValueError:  # the budget is spent
        return None
    finally:
        buffer.clear()


def _read(tree: Tree, data: bytes, begin: int, grammar: _Grammar) -> Outline:
    """Return the outline of the text from `begin` on, given a tree of all of it."""
    offset = _Offset(data, begin)
    before: list[Delimiter] = []
    delimiters: list[Delimiter] = []
    opaque: list[tuple[int, int, bool]] = []
    opaque_end = 0
    for node in _walk(tree.root_node, begin):
        if node.is_named:
            # Of nested strings and comments, the outermost counts.
            if _is_opaque(node) and node.end_byte > max(begin, opaque_end):
                opaque_end = node.end_byte
                opaque.append((offset(node.start_byte), offset(opaque_end), "comment" in node.type))
        elif (closer := _closer(node, grammar, data)) is not None:
            text = node.type
            found = Delimiter(offset(node.start_byte), offset(node.end_byte), text, closer)
            (before if node.start_byte < begin else delimiters).append(found)
    open_, _ = balance(before, stray=grammar.stray)
    if grammar.stray:
        delimiters = list(_without_stray(open_, delimiters, grammar.stray))
    return Outline(open_, tuple(delimiters), tuple(opaque))


def balance(
    delimiters: list[Delimiter] | tuple[Delimiter, ...],
    before: tuple[str, ...] = (),
    stray: frozenset[str] = frozenset(),
) -> tuple[tuple[str, ...], tuple[Delimiter, ...]]:
    """Return the closers still needed after `delimiters`, given those before; and the unmatched closers."""
    depth = list(before)
    unmatched = []
    for one in delimiters:
        if one.closer:
            depth.append(one.closer)
        elif one.text in stray and depth[-1:] != [one.text]:
            continue
        elif depth:
            depth.pop()
        else:
            unmatched.append(one)
    return tuple(depth), tuple(unmatched)


def _without_stray(
    before: tuple[str, ...], delimiters: list[Delimiter], stray: frozenset[str]
) -> Iterator[Delimiter]:
    for index, one in enumerate(delimiters):
        if one.text not in stray or balance(delimiters[:index], before, stray)[0][-1:] == (one.text,):
            yield one


def _walk(root: Node, begin: int) -> Iterator[Node]:
    """Yield tokens and opaque nodes in order, without complete nodes before `begin`."""
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if node.child_count and node.end_byte <= begin and not node.has_error:
            continue
        if not node.child_count or _is_opaque(node):
            yield node
        nodes += reversed(node.children)


def _is_opaque(node: Node) -> bool:
    return node.is_named and _names(node.type, _OPAQUE)


@cache
def _names(kind: str, words: tuple[str, ...]) -> bool:
    """Return whether a node's type contains one of the words. Cached: there are few types."""
    return any(word in kind for word in words)


def _closer(node: Node, grammar: _Grammar, data: bytes) -> str | None:
    """Return the closer of an anonymous token; "" if it closes something; None if it does neither."""
    text = node.type
    if node.is_missing or not text:
        return None
    # Also "${", "#{", "$(" and the like; but not the "#[" of comments, which are named nodes.
    if text[-1] in _BRACKETS and not text[0].isalnum():
        return _BRACKETS[text[-1]] * text.count(text[-1])
    if not text.strip(")]}"):
        return ""
    if text in grammar.keywords:
        return grammar.keywords[text] if _opens_block(node, grammar, data) else None
    return "" if text in grammar.keywords.values() else None


def _opens_block(node: Node, grammar: _Grammar, data: bytes) -> bool:
    """Return whether a keyword opens a block here: not in `return if x`, nor twice in `while x do`."""
    parent = node.parent
    closer = grammar.keywords[node.type]
    if parent is not None and not parent.has_error:
        return any(child.type == closer for child in parent.children)
    if grammar.keywords is not _RUBY:
        return True
    line = data[data.rfind(b"\n", 0, node.start_byte) + 1 : node.start_byte].decode(errors="replace").strip()
    if node.type == "do":
        return line.partition(" ")[0] not in _LOOPS
    return node.type not in _MODIFIERS or not line or line.endswith("=")


def _lead(text: str, grammar: _Grammar) -> bytes:
    return b"" if grammar.lead[:2] in _encode(text) else grammar.lead


def _encode(text: str) -> bytes:
    # A lone surrogate becomes one byte, so that code points can still be counted.
    return text.encode("utf-8", "replace")


class _Offset:
    """Converts byte offsets in `data` to code points from `begin` on; negative before it."""

    def __init__(self, data: bytes, begin: int) -> None:
        self._begin = begin
        self._counts: list[int] | None = None
        if not data.isascii():
            starts = ((byte & 0xC0) != 0x80 for byte in data)
            self._counts = [0, *itertools.accumulate(starts)]

    def __call__(self, byte: int) -> int:
        if self._counts is None:
            return byte - self._begin
        return self._counts[byte] - self._counts[self._begin]


def _num_common(old: bytes, new: bytes) -> int:
    """Return how many bytes two texts share at their beginning."""
    low, high = 0, min(len(old), len(new))
    if old[:high] == new[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if old[:middle] == new[:middle] else (low, middle - 1)
    return low


def _point(data: bytes, byte: int) -> tuple[int, int]:
    return data.count(b"\n", 0, byte), byte - data.rfind(b"\n", 0, byte) - 1


@cache
def _language(name: SupportedLanguage) -> Language:
    return get_language(name)
