"""Notation: how languages write comments and multi-line strings, and which languages are prose. A table.

For languages without a grammar, and for a text that ends before its string does. A language that is not in
the table has neither comments nor jumps. Pure; knows language identifiers and no editors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Notation:
    """How a language writes comments and strings.

    Attributes:
        line: marks of comments that go to the end of their line.
        block: opening and closing marks of other comments.
        strings: regular expressions for the beginnings of multi-line strings, and what their matches expand
            to at the strings' ends.
        jumps: `return`, `raise`, `break` and the like at the beginning of a line leave a block.
        quoted: double quotes make a string.
    """

    line: tuple[str, ...] = ()
    block: Pairs = ()
    strings: Pairs = ()
    jumps: bool = False
    quoted: bool = True


# Every line is text for people, and nothing is code.
_PROSE = frozenset(
    {
        "adoc",
        "asciidoc",
        "asciidoctor",
        "chatagent",
        "chatmode",
        "context",
        "creole",
        "csv",
        "diff",
        "djot",
        "dokuwiki",
        "email",
        "fountain",
        "fundamental",
        "gemtext",
        "gfm",
        "git-commit",
        "git-rebase",
        "gitcommit",
        "gitrebase",
        "hgcommit",
        "jjdescription",
        "scminput",
        "vcs-commit",
        "help",
        "instructions",
        "latex",
        "livebook",
        "livemd",
        "log",
        "mail",
        "markdoc",
        "markdown",
        "mdc",
        "mdx",
        "mediawiki",
        "message",
        "myst",
        "norg",
        "org",
        "pandoc",
        "patch",
        "plaintex",
        "plaintext",
        "po",
        "pod",
        "prompt",
        "qmd",
        "quarto",
        "rdoc",
        "restructuredtext",
        "rmarkdown",
        "rmd",
        "rnoweb",
        "rst",
        "rtf",
        "skill",
        "svncommit",
        "telekasten",
        "tex",
        "texinfo",
        "text",
        "textile",
        "tsv",
        "txt",
        "typst",
        "vimdoc",
        "vimwiki",
        "wiki",
        "wikitext",
    }
)
# The element that a line is in decides whether it is code.
_MARKUP = frozenset({"handlebars", "html", "htmldjango", "svelte", "svg", "vue", "xhtml", "xml", "xsl"})

_SLASHES: Pairs = (("/*", "*/"),)
_TRIPLE: Pairs = ((r'"""', '"""'),)
_TRIPLES: Pairs = ((r'"""', '"""'), (r"'''", "'''"))
_ANY_QUOTES: Pairs = ((r'"', '"'), (r"'", "'"))
_BACKTICK: Pairs = ((r"`", "`"),)
_QUOTES = ("'", '"')
# The text is on the following lines, up to one that consists of the word.
_HEREDOC: Pairs = ((r"<<[-~]?\s*\\?[\"'`]?(\w+)[\"'`]?", "\n\\1\n"),)

_C = Notation(("//",), _SLASHES, jumps=True)
_SHELL = Notation(("#",), strings=(*_HEREDOC, *_ANY_QUOTES), jumps=True)
_HASH = Notation(("#",))
_MARKUP_NOTATION = Notation(block=(("<!--", "-->"),), jumps=True, quoted=False)
_LISP = Notation((";",), (("#|", "|#"),), ((r'"', '"'),))
_JAVASCRIPT = Notation(("//",), _SLASHES, _BACKTICK, jumps=True)
_HASKELL = Notation(("--",), (("{-", "-}"),))
_BASIC = Notation(("'",), jumps=True)
_SQL = Notation(("--",), _SLASHES, ((r"'", "'"),))

_TABLE: dict[str, Notation] = {
    # With a grammar.
    "c": _C,
    "cpp": Notation(("//",), _SLASHES, ((r'R"([^\s()\\]{0,16})\(', ')\\1"'),), jumps=True),
    "csharp": Notation(("//",), _SLASHES, (*_TRIPLE, (r'@\$?"|\$@"', '"')), jumps=True),
    "css": Notation(block=_SLASHES),
    "dart": Notation(("//",), _SLASHES, _TRIPLES, jumps=True),
    "elixir": Notation(("#",), strings=(*_TRIPLES, (r'"', '"')), jumps=True),
    "go": Notation(("//",), _SLASHES, _BACKTICK, jumps=True),
    "haskell": _HASKELL,
    "java": Notation(("//",), _SLASHES, _TRIPLE, jumps=True),
    "javascript": _JAVASCRIPT,
    "javascriptreact": _JAVASCRIPT,
    "json": Notation(),
    "jsonc": Notation(("//",), _SLASHES),
    "julia": Notation(("#",), (("#=", "=#"),), (*_TRIPLE, (r'"', '"')), jumps=True),
    "kotlin": Notation(("//",), _SLASHES, _TRIPLE, jumps=True),
    "lua": Notation(("--",), (("--[[", "]]"),), ((r"\[(=*)\[", "]\\1]"),), jumps=True),
    "nix": Notation(("#",), _SLASHES, ((r"''", "''"), (r'"', '"'))),
    "objective-c": _C,
    "objective-cpp": _C,
    "ocaml": Notation(block=(("(*", "*)"),), strings=((r'"', '"'), (r"\{(\w*)\|", "|\\1}"))),
    "perl": Notation(("#",), (("=pod", "\n=cut\n"),), (*_HEREDOC, *_ANY_QUOTES), jumps=True),
    "php": Notation(
        ("//", "#"), _SLASHES, ((r"<<<\s*[\"']?(\w+)[\"']?", "\n\\1;\n"), *_ANY_QUOTES), jumps=True
    ),
    "powershell": Notation(("#",), (("<#", "#>"),), ((r'@"', '\n"@'), (r"@'", "\n'@")), jumps=True),
    "python": Notation(("#",), strings=_TRIPLES, jumps=True),
    "r": Notation(("#",), strings=_ANY_QUOTES),
    "ruby": Notation(("#",), (("=begin", "\n=end\n"),), (*_HEREDOC, *_ANY_QUOTES), jumps=True),
    "rust": Notation(("//",), _SLASHES, ((r'r(#+)"', '"\\1'), (r'"', '"')), jumps=True),
    "scala": Notation(("//",), _SLASHES, _TRIPLE, jumps=True),
    "scss": Notation(("//",), _SLASHES),
    "shellscript": _SHELL,
    "swift": Notation(("//",), _SLASHES, ((r'(#*)"""', '"""\\1'),), jumps=True),
    "terraform": Notation(("#", "//"), _SLASHES, _HEREDOC),
    "toml": Notation(("#",), strings=_TRIPLES),
    "typescript": _JAVASCRIPT,
    "typescriptreact": _JAVASCRIPT,
    "yaml": _HASH,
    "zig": Notation(("//",), jumps=True),
    # Without one.
    "ada": Notation(("--",), jumps=True),
    "asm": Notation((";", "//"), _SLASHES, quoted=False),
    "awk": Notation(("#",), jumps=True),
    "bat": Notation(("rem ", "REM ", "::"), quoted=False),
    "bibtex": Notation(("%",), quoted=False),
    "clojure": Notation((";",), strings=((r'"', '"'),)),
    "cmake": Notation(("#",), (("#[[", "]]"),)),
    "coffeescript": Notation(("#",), (("###", "###"),), _TRIPLES, jumps=True),
    "crystal": Notation(("#",), strings=_HEREDOC, jumps=True),
    "cuda-cpp": _C,
    "d": Notation(("//",), (*_SLASHES, ("/+", "+/")), _BACKTICK, jumps=True),
    "dockerfile": _HASH,
    "elm": _HASKELL,
    "erlang": Notation(("%",)),
    "fish": Notation(("#",), jumps=True),
    "fortran": Notation(("!",), jumps=True),
    "fsharp": Notation(("//",), (("(*", "*)"),), _TRIPLE),
    "gdscript": Notation(("#",), strings=_TRIPLES, jumps=True),
    "glsl": _C,
    "graphql": Notation(("#",), strings=_TRIPLE),
    "groovy": Notation(("//",), _SLASHES, _TRIPLES, jumps=True),
    "haxe": _C,
    "hlsl": _C,
    "ignore": Notation(("#",), quoted=False),
    "ini": Notation((";", "#"), quoted=False),
    "jinja": Notation(block=(("{#", "#}"),), quoted=False),
    "less": Notation(("//",), _SLASHES),
    "makefile": Notation(("#",), quoted=False),
    "matlab": Notation(("%",), (("%{", "%}"),), jumps=True),
    "nim": Notation(("#",), (("#[", "]#"),), _TRIPLE, jumps=True),
    "pascal": Notation(("//",), (("{", "}"), ("(*", "*)")), jumps=True),
    "prisma": Notation(("//",)),
    "prolog": Notation(("%",), _SLASHES),
    "properties": Notation(("#", "!"), quoted=False),
    "proto": Notation(("//",), _SLASHES),
    "pug": Notation(("//",), quoted=False),
    "sass": Notation(("//",), _SLASHES),
    "scheme": _LISP,
    "solidity": _C,
    "sql": _SQL,
    "starlark": Notation(("#",), strings=_TRIPLES, jumps=True),
    "stylus": Notation(("//",), _SLASHES),
    "systemverilog": _C,
    "tcl": Notation(("#",), jumps=True),
    "vala": Notation(("//",), _SLASHES, _TRIPLE, jumps=True),
    "vb": _BASIC,
    "verilog": _C,
    "vhdl": Notation(("--",), jumps=True),
    "vim": Notation(('"',), strings=(), jumps=True, quoted=False),
    "wgsl": _C,
}
# Languages that are written like another one. `languages` handles the editors' names for one language.
_ALIASES = {
    "commonlisp": "scheme",
    "conf": "ini",
    "dotenv": "properties",
    "elisp": "scheme",
    "gitignore": "ignore",
    "purescript": "haskell",
    "racket": "scheme",
    "verse": "starlark",
}
_UNKNOWN = Notation()


def of(language_id: str) -> Notation:
    """Return a language's notation; one without comments for a language that is not known."""
    if language_id in _MARKUP:
        return _MARKUP_NOTATION
    return _TABLE.get(_ALIASES.get(language_id, language_id), _UNKNOWN)


def is_prose(language_id: str) -> bool:
    """Return whether every line of a language is text for people."""
    language = language_id.lower()
    return "markdown" in language or not _PROSE.isdisjoint({language, *language.split(".")})


def is_markup(language_id: str) -> bool:
    """Return whether a language mixes text for people with code, by its elements."""
    return language_id in _MARKUP


def openings(text: str, language_id: str, *, whole: bool = True) -> list[tuple[int, str, bool]]:
    """Return the strings and comments that may be open at a text's end, by counting marks; the last first.

    For each: its offset, its closing mark, and whether it is a comment. A guess that a grammar has to
    confirm, since marks in comments and strings are counted too; but whatever is not in the list is not open.
    A text that is not `whole` may begin within a string, and counting quotes means nothing then.
    """
    found = []
    notation = of(language_id)
    for begin, end in notation.block:
        at = text.rfind(begin)
        if at >= 0 and end.strip() not in text[at + len(begin) :]:
            found.append((at, end, True))
    for begin, end in notation.strings:
        *_, last = (None, *_starts(text, begin, end, whole=whole))
        if last is not None:
            found.append((*last, False))
    return sorted(found, reverse=True)


def _starts(text: str, begin: str, end: str, *, whole: bool) -> Iterator[tuple[int, str]]:
    """Yield the strings of one kind that a text does not end."""
    if begin == end:
        escaped = text.replace("\\\\", "  ").replace("\\" + begin, "  ") if len(begin) == 1 else text
        if escaped.count(begin) % 2 or (begin in escaped and not whole and begin not in _QUOTES):
            yield escaped.rfind(begin), end
        return
    for match in _compiled(begin).finditer(text):
        closer = match.expand(end)
        rest = text[match.end() :]
        if closer.startswith("\n"):
            word = re.escape(closer.strip())
            if "\n" in rest and not re.search(rf"\n[ \t]*{word}(?!\w)", rest):
                yield match.start(), closer
        elif closer not in (rest.replace(2 * closer, "") if len(closer) == 1 else rest):
            # A doubled quote is part of the text.
            yield match.start(), closer


def comments(text: str, language_id: str) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, is a comment) of comments and multi-line strings, for languages without a grammar.

    An unterminated one extends to the end.
    """
    notation = of(language_id)
    pattern = _scanner(language_id)
    at = 0
    while pattern is not None and (match := pattern.search(text, at)):
        at = match.end()
        if match.lastgroup == "line":
            yield match.start("line"), at, True
        elif match.lastgroup == "block":
            closer = dict(notation.block)[match["block"]]
            end = text.find(closer, at)
            at = len(text) if end < 0 else end + len(closer)
            yield match.start(), at, True
        elif match.lastgroup == "open":
            at = _end_of_string(text, match.start(), at, notation)
            yield match.start(), at, False


def _end_of_string(text: str, start: int, at: int, notation: Notation) -> int:
    for begin, end in notation.strings:
        if match := _compiled(begin).match(text, start):
            closer = match.expand(end)
            if closer.startswith("\n"):
                found = re.compile(rf"\n[ \t]*{re.escape(closer.strip())}(?!\w)").search(text, match.end())
                return len(text) if found is None else found.end()
            found_at = text.find(closer, match.end())
            return len(text) if found_at < 0 else found_at + len(closer)
    return at


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


@cache
def _scanner(language_id: str) -> re.Pattern[str] | None:
    notation = of(language_id)
    parts = []
    if notation.block:
        parts.append("(?P<block>" + "|".join(re.escape(begin) for begin, _ in notation.block) + ")")
    if notation.line:
        # Not the first line of a script; and a mark within a word does not begin a comment.
        marks = "|".join(re.escape(mark) for mark in notation.line)
        parts.append(rf"(?:(?<=\s)|\A)(?P<line>(?:{marks})(?!!/)[^\n]*)")
    if notation.strings:
        # Inner groups are needed only for the end of the string, which is matched again.
        bare = (re.sub(r"(?<!\\)\((?!\?)", "(?:", begin) for begin, _ in notation.strings)
        parts.append("(?P<open>" + "|".join(bare) + ")")
    if notation.quoted and not any(begin == '"' for begin, _ in notation.strings):
        parts.append(r'"(?:\\.|[^"\\\n])*"')
    return re.compile("|".join(parts)) if notation.line or notation.block else None
