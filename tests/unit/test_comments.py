"""Which lines are comments: by the grammar, by the table of languages, and by nothing else.

Each case is a language, a text with a cursor, and what the model writes there.
"""

import io
import tokenize
from pathlib import Path

import pytest
from planted_places import place_of, suggested

import midfill
from midfill.completion.postprocess import brackets
from midfill.completion.reasons import Reason
from midfill.text import languages, notation, syntax

# The token limit cuts the last line. What is left then.
AT_THE_LIMIT = [
    ("c", "void f(int *p)\n{\n    ▮\n", "*p = 1;\n    *q = 2;\n    *r = 300000", "*p = 1;\n    *q = 2;"),
    ("c", "int f(int n)\n{\n    ▮\n", "--n;\n    --m;\n    --kkkkk", "--n;\n    --m;"),
    (
        "cpp",
        "int f(int n) {▮\n",
        "\n    ++n;\n    --m;\n    *it = 1;\n    x(",
        "\n    ++n;\n    --m;\n    *it = 1;",
    ),
    ("go", "func f(p *int) {\n\t▮\n}\n", "*p = 1\n\t*q = 2\n\t*rrrrrrr", "*p = 1\n\t*q = 2"),
    ("rust", "fn f(p: &mut i32) {\n    ▮\n}\n", "*p = 1;\n    *q = 2;\n    *rrrrr", "*p = 1;\n    *q = 2;"),
    ("rust", "▮\nfn f() {}\n", "use a;\n#[derive(A)]\nstru", "use a;\n#[derive(A)]"),
    ("lua", "▮\nx = 1\n", "local a = 1\n-- foo\nloc", "local a = 1"),
    ("python", "# Adds\n▮\nx = 1\n", "# a\n# b\n# cc", "# a\n# b"),
    ("python", "# Adds ▮\nx = 1\n", "all\n# b\n# cc", "all\n# b"),
    ("javascript", "// Adds▮\nx = 1\n", " all\n// b\n// c", " all\n// b"),
    (
        "java",
        "/**\n * Foo.\n * ▮\n */\nclass A {}\n",
        "@param a b\n * @param c d\n * @p",
        "@param a b\n * @param c d",
    ),
    ("java", "/**▮\n", "\n * Foo.\n *\n * @param c d\n * @pa", "\n * Foo.\n *\n * @param c d"),
    ("php", "<?php\n/**\n * Foo.\n *▮\n */\n", "\n * @param c d\n * @par", "\n * @param c d"),
    ("css", "a {\n  ▮\n}\n", "--main: red;\n  --side: blue;\n  --fff", "--main: red;\n  --side: blue;"),
    ("markdown", "- a\n▮\n", "- b\n* c\n- dd", "- b\n* c"),
    ("restructuredtext", "* a\n▮\n", "* b\n* c\n* dd", "* b\n* c"),
    ("shellscript", "tool \\\n    ▮\n", "--one \\\n    --two \\\n    --th", "--one \\\n    --two \\"),
    ("yaml", "a:\n  ▮\n", '- b\n  - "*"\n  - cc', '- b\n  - "*"'),
    ("python", "x = 1\n▮\n", "y = 2\n# Now\n# more\nz =", "y = 2"),
    ("javascript", "x = 1\n▮\n", "y = 2;\n/**\n * Doc of\n ", "y = 2;"),
    ("javascript", "x = 1\n▮\n", "y = 2;\n/* Doc */\nfunct", "y = 2;"),
    ("python", "def f(a, b):\n    return max(a,▮\n", "\n        *b,\n        *", "\n        *b,"),
    ("python", "from a import (▮\n", "\n    b,\n    # c\n    dd", "\n    b,"),
    ("makefile", "all:\n\t▮\n", "cc a\n\t%.o\n# x\nbb", "cc a\n\t%.o"),
    ("tex", "\\begin{a}\n▮\n", "% a\n% b\n% ", "% a\n% b"),
    ("sql", "SELECT a\n▮\n", "FROM b\n-- c\nWH", "FROM b"),
    ("erlang", "f() ->\n    ▮\n", "a,\n    %% b\n    cc", "a,"),
    ("plaintext", "Dear all,\n▮\n", "; a\n-- b\n// c\n# ddd", "; a\n-- b\n// c"),
    ("python", "x = 1  # ▮\n", "foo\n# more\n# eeee", "foo\n# more"),
    ("go", "x := 1 // ▮\n", "foo\n// more\n// eeee", "foo\n// more"),
    ("python", 's = "# ▮\n', 'foo"\n# more\n# eeeee', 'foo"'),
    ("sql", "select 1; -- ▮\n", "foo\n-- more\n-- eeee", "foo\n-- more"),
    ("javascript", "x();\n/*▮\n", "\n * a\n * b\n * ccc", "\n * a\n * b"),
    (
        "cpp",
        "void f() {\n  for (;;) {\n    ▮\n",
        "*++p = 1;\n    --*q;\n    #pragma x\n    zzzzzzz",
        "*++p = 1;\n    --*q;\n    #pragma x",
    ),
    ("dockerfile", "FROM a\n▮\n", "RUN x\n# now\nCOPY", "RUN x"),
    ("haskell", "x = 1\n▮\n", "y = 2\n-- now\nz = 3", "y = 2"),
    ("html", "<p>\n▮\n", "<a>\n<!-- now -->\n<bbbb", "<a>"),
]
# What is a comment in other languages. All of it is kept.
NO_COMMENT = [
    ("dockerfile", 'FROM a\nENTRYPOINT ["x", \\\n▮\n', '  "--a", \\\n  "-b"]\n'),
    ("dockerfile", "FROM a\nRUN x \\\n▮\n", "    --mount=type=cache \\\n    --foo\n"),
    ("makefile", "x: y\n\tz\n\n▮\n", "%.d: %.c\n"),
    ("makefile", "x: y\n▮\n", "\t--foo\n"),
    ("objective-c", "@class A;\n▮\n", "#pragma mark - B\n"),
    ("objective-c", "int x;\n▮\n", "*p = 1;\n"),
    ("objective-cpp", "int x;\n▮\n", '#import "a.h"\n'),
    ("cuda-cpp", "int x;\n▮\n", "#include <a>\n"),
    ("glsl", "int x;\n▮\n", "#version 330\n"),
    ("markdown", "a\n\n▮\n", "* * *\n"),
    ("markdown", "a\n\n▮\n", "-- b\n"),
    ("markdown", "a\n\n▮\n", "<!-- toc -->\n"),
    ("markdown", "a\n\n▮\n", "### B\n\ntext\n"),
    ("mdx", "a\n\n▮\n", "# B\n"),
    ("restructuredtext", "a\n\n▮\n", "* b\n* c\n"),
    ("restructuredtext", "a\n\n▮\n", ".. note::\n"),
    ("asciidoc", "a\n\n▮\n", "// b\n"),
    ("asciidoc", "a\n\n▮\n", "* b\n** c\n"),
    ("org", "a\n▮\n", "* B\n** C\n"),
    ("latex", "a\n▮\n", "% b\n"),
    ("plaintext", "a\n▮\n", "# b\n"),
    ("plaintext", "a\n▮\n", "-- b\n"),
    ("gitcommit", "a\n\n▮\n", "* b\n* c\n"),
    ("git-commit", "a\n\n▮\n", "# b\n"),
    ("scss", "a {}\n▮\n", "#b { c: d }\n"),
    ("less", "a {}\n▮\n", "#b { c: d }\n"),
    ("sass", "a\n  b: c\n▮\n", "#b\n  c: d\n"),
    ("css", "a {}\n▮\n", "#b { c: d }\n"),
    ("css", ":root {\n▮\n", "  --a: b;\n"),
    ("stylus", "a\n  b c\n▮\n", "#b\n  c d\n"),
    ("vue", "<script>\nx = 1\n▮\n", "#y = 2\n"),
    ("vue", "<style>\na {}\n▮\n", "--b: c;\n"),
    ("svelte", "<a>\n▮\n", "{#if x}\n"),
    ("html", "<style>\n▮\n", "#a { b: c }\n"),
    ("html", "<p>\n▮\n", "* a\n"),
    ("perl", "my $x;\n▮\n", "%h = (a => 1);\n"),
    ("perl", "my $x;\n▮\n", "--$x;\n"),
    ("matlab", "x = 1;\n▮\n", "#a\n"),
    ("javascript", "class A {\n▮\n", "  #x = 1;\n"),
    ("javascript", "x;\n▮\n", "--y;\n"),
    ("ruby", "x\n▮\n", "*a, b = c\n"),
    ("python", "x = 1\n▮\n", "*a, b = c\n"),
    ("haskell", "f x = a\n▮\n", "--> b\n"),
    ("clojure", "(def a 1)\n▮\n", "#_(b)\n"),
    ("rust", "fn a() {}\n▮\n", "#[test]\n"),
    ("rust", "fn a() {}\n▮\n", "#![allow(x)]\n"),
    ("csharp", "int x;\n▮\n", "#region A\n"),
    ("c", "int x;\n▮\n", "#define A 1\n"),
    ("c", "int x;\n▮\n", "#line 3\n"),
    ("php", "<?php\n$x = 1;\n▮\n", "#[Attribute]\n"),
    ("yaml", "a: b\n▮\n", "---\n"),
    ("yaml", "a: b\n▮\n", "*x : y\n"),
    ("toml", "a = 1\n▮\n", "[b]\n"),
    ("ini", "a = 1\n▮\n", "[b]\n"),
    ("vim", "let x = 1\n▮\n", "%s/a/b/\n"),
    ("tex", "a\n▮\n", "%b\n"),
    ("ignore", "*.o\n▮\n", "*.a\n"),
    # What runs the file.
    ("shellscript", "▮\necho a\n", "#!/bin/sh\n"),
    ("python", "▮\nprint(1)\n", "#!/usr/bin/env python3\n"),
    ("ignore", "*.o\n▮\n", "!b\n"),
    ("diff", "-a\n▮\n", "--- b\n"),
    ("sql", "select a\n▮\n", "*\n"),
    ("sql", "select a,\n▮\n", "%b\n"),
    ("r", "x <- 1\n▮\n", "%in% y\n"),
    ("julia", "x = 1\n▮\n", "%y\n"),
    ("nim", "x\n▮\n", "%y\n"),
    ("foo", "x\n▮\n", "# y\n"),
    ("foo", "x\n▮\n", "// y\n"),
    ("", "x\n▮\n", "# y\n"),
    ("ada", "x\n▮\n", "# y\n"),
    ("fortran", "x = 1\n▮\n", "*y\n"),
    ("cobol", "x\n▮\n", "* y\n"),
    ("vb", "x\n▮\n", "#If a\n"),
    ("bat", "x\n▮\n", "%y%\n"),
    ("properties", "a=b\n▮\n", "*c=d\n"),
    ("graphql", "type A {\n▮\n", "  *b\n"),
    ("handlebars", "<a>\n▮\n", "{{#if x}}\n"),
    ("pug", "a\n▮\n", "#b\n"),
    ("haml", "a\n▮\n", "%b\n"),
    ("haml", "a\n▮\n", "#b\n"),
    ("slim", "a\n▮\n", "#b\n"),
    ("asm", "a\n▮\n", "#b\n"),
    ("lisp", "(a)\n▮\n", "#b\n"),
    ("fish", "x\n▮\n", "%a\n"),
    ("powershell", "$x\n▮\n", "--$x\n"),
    ("powershell", "$x\n▮\n", "%{ a }\n"),
    ("awk", "x\n▮\n", "--y\n"),
    ("terraform", "a {\n▮\n", "  *b\n"),
]
# Nothing but a comment.
COMMENTS = [
    ("python", "x = 1\n▮\n", "# a\n"),
    ("dockerfile", "FROM a\n▮\n", "# a\n"),
    ("makefile", "a = 1\n▮\n", "# b\n"),
    ("sql", "select a;\n▮\n", "-- b\n"),
    ("sql", "select a;\n▮\n", "/* b\n c */\n"),
    ("vue", "<a>\n▮\n", "<!-- b -->\n"),
    ("scss", "a {}\n▮\n", "// b\n"),
    ("less", "a {}\n▮\n", "/* b */\n"),
    ("perl", "$x;\n▮\n", "# b\n"),
    ("objective-c", "int x;\n▮\n", "// b\n"),
    ("yaml", "a: b\n▮\n", "# c\n"),
    ("toml", "a = 1\n▮\n", "# c\n# d\n"),
    ("ini", "a=b\n▮\n", "; c\n"),
    ("javascript", "x;\n▮\n", "/**\n * a\n */\n"),
    ("haskell", "x = 1\n▮\n", "-- b\n"),
    ("matlab", "x\n▮\n", "% b\n"),
    ("clojure", "(a)\n▮\n", ";; b\n"),
    ("vim", "let x = 1\n▮\n", '" b\n'),
    ("erlang", "x.\n▮\n", "%% b\n"),
    ("xml", "<a>\n▮\n", "<!-- b\nc -->\n"),
    ("html", "<a>\n▮\n", "<!-- b -->\n"),
    ("fsharp", "x\n▮\n", "// b\n"),
    ("terraform", "a\n▮\n", "# b\n"),
    ("cmake", "a()\n▮\n", "# b\n"),
    ("groovy", "a()\n▮\n", "// b\n"),
    ("powershell", "$x\n▮\n", "# b\n"),
    ("r", "x\n▮\n", "# b\n"),
    ("julia", "x\n▮\n", "# b\n"),
    ("ocaml", "let x = 1\n▮\n", "(* b *)\n"),
    ("lua", "x = 1\n▮\n", "-- b\n"),
    ("ruby", "x\n▮\n", "# b\n"),
    ("rust", "fn a() {}\n▮\n", "/// b\n"),
    ("shellscript", "x\n▮\n", "# b\n"),
    ("bat", "x\n▮\n", "REM b\n"),
    ("properties", "a=b\n▮\n", "# c\n"),
    ("proto", "a\n▮\n", "// b\n"),
]
ROOT = Path(midfill.__file__).parent


@pytest.mark.parametrize(("language", "marked", "model", "expected"), AT_THE_LIMIT)
def test_at_the_token_limit_comments_go_and_code_stays(language, marked, model, expected):
    assert suggested(place_of(language, marked), model, complete=False) == (expected, None)


@pytest.mark.parametrize(("language", "marked", "model"), NO_COMMENT)
def test_what_other_languages_take_for_a_comment_is_none(language, marked, model):
    assert suggested(place_of(language, marked), model) == (model.rstrip(), None)


@pytest.mark.parametrize(("language", "marked", "model"), COMMENTS)
def test_a_comment_alone_is_no_suggestion_unless_it_was_asked_for(language, marked, model):
    assert suggested(place_of(language, marked), model) == ("", Reason.COMMENT_ONLY)
    assert suggested(place_of(language, marked, invoked=True), model) == (model.rstrip(), None)


def test_other_names_are_names_of_languages_in_the_table():
    assert set(notation._ALIASES.values()) <= set(notation._TABLE)
    assert all(languages.normalise(name) == name for name in {*notation._TABLE, *notation._ALIASES})
    assert not set(notation._ALIASES) & set(notation._TABLE)
    assert not notation._PROSE & (set(notation._TABLE) | set(notation._ALIASES) | notation._MARKUP)


def test_every_language_with_a_grammar_is_in_the_table():
    assert all(notation.of(language) is not notation._UNKNOWN for language in syntax._GRAMMARS)


def test_a_language_that_is_not_known_has_neither_comments_nor_jumps():
    assert notation.of("no such language") == notation.Notation()
    assert not list(notation.comments("# a\n// b\n-- c\n/* d */\n", "no such language"))


@pytest.mark.parametrize(
    "name",
    [
        "completion/postprocess/clean.py",
        "engine/local.py",
        "completion/context/collector.py",
        "lsp/protocol.py",
    ],
)
def test_the_cursor_is_known_to_be_in_a_string_wherever_that_begins(name):
    """Of files longer than what is read, too: what begins far above is told from what ends there."""
    text = (ROOT / name).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    strings = [
        range(token.start[0], token.end[0] - 1)
        for token in tokens
        if token.type == tokenize.STRING and token.end[0] > token.start[0]
    ]
    lines = text.split("\n")
    wrong = []
    for row in range(4, len(lines) - 1, 5):
        if lines[row].strip():
            continue
        cursor = place_of("python", "\n".join([*lines[:row], "    ▮", *lines[row + 1 :]]))
        if (brackets.enclosing(cursor) is not None) != any(row in string for string in strings):
            wrong.append(row + 1)
    assert not wrong
