"""Where the block ends that a suggestion belongs to, and what of it stands below already.

Each case is a language, a text with a cursor, what the model writes there, and what is left of it; None for
all of it but the line end, or why nothing is.
"""

import pytest
from planted_places import place_of, suggested

from midfill.completion.reasons import Reason

# A line that ends one block and begins the next is part of what was begun before the cursor.
GOES_ON = [
    (
        "javascript",
        "function f() {\n  if (a) {▮\n",
        "\n    b();\n  } else {\n    c();\n  }\n}\n",
        "\n    b();\n  } else {\n    c();\n  }",
    ),
    (
        "javascript",
        "function f() {\n  if (a) {▮\n  }\n}\n",
        "\n    b();\n  } else {\n    c();\n  }\n}\n",
        "\n    b();\n  } else {\n    c();",
    ),
    (
        "java",
        "class A {\n    void f() {\n        try {▮\n",
        "\n            a();\n        } catch (E e) {\n            b();\n        }\n        c();\n    }\n",
        "\n            a();\n        } catch (E e) {\n            b();\n        }",
    ),
    (
        "go",
        "package a\n\nfunc f() {\n\tif a {\n\t\tb()▮\n}\n",
        "\n\t} else if c {\n\t\td()\n\t}\n}\n",
        "\n\t} else if c {\n\t\td()\n\t}",
    ),
]
# The asterisk before the end of a comment stands deeper than what the comment is for.
AFTER_COMMENTS = [
    ("javascript", "a();\n\n/**\n * Raw.\n */▮\n", "\nexports.raw = 1;\n"),
    ("java", "class A {\n    /**\n     * One.\n     */▮\n}\n", "\n    int f() {\n        return 1;\n    }\n"),
    ("c", "/*\n * One.\n */▮\n", "\nint f(void)\n{\n    return 1;\n}\n"),
    ("css", "/*\n * One.\n */▮\n", "\na {\n  b: c;\n}\n"),
    ("go", "package a\n\n/*\n * One.\n */▮\n", "\nfunc f() {\n\treturn\n}\n"),
]
# The closer of a block, in a column where none begins, stands below already.
CLOSED_BELOW = [
    ("javascript", "function f() {\n  a();\n  ▮\n}\n", "}\n", Reason.REPEATS_TEXT),
    # With a comma that the file does not have.
    (
        "json",
        '{\n  "a": {▮\n  }\n}\n',
        '\n    "b": 1\n  },\n  "c": 2\n',
        '\n    "b": 1',
    ),
    ("ruby", "def f\n  a\n  ▮\nend\n", "end\n", Reason.CLOSES_BLOCK),
    ("ruby", "def f\n  a\n  ▮\nend\n", "b\n  end\n", "b"),
    ("lua", "function f()\n  a()\n  ▮\nend\n", "end\n", Reason.CLOSES_BLOCK),
    ("shellscript", "if a; then\n  b\n  ▮\nfi\n", "fi\n", Reason.CLOSES_BLOCK),
    ("html", "<div>\n  ▮\n</div>\n", "</div>\n", Reason.CLOSES_BLOCK),
    ("html", "<div>\n  <p>a</p>\n  ▮\n</div>\n", "<p>b</p>\n  </div>\n", "<p>b</p>"),
    ("vue", "<template>\n  <div>\n    ▮\n  </div>\n</template>\n", "</div>\n", Reason.CLOSES_BLOCK),
    ("ruby", "def f\n  if a\n    b\n  ▮\nend\n", "end\n", None),
    ("ruby", "def f\n  x = if a\n    b\n  ▮\nend\n", "end\n", None),
    ("ruby", "def f\n  a.each do |b|\n    c\n  ▮\nend\n", "end\n", None),
    ("html", "<div>\n  <div>\n    a\n  ▮\n</div>\n", "</div>\n", None),
    ("javascript", "if (a) {\n  if (b) {\n    c();\n  ▮\n}\n", "}\n", None),
]
# The next line at another indentation, where no semicolon says that the line before it has ended.
REPEATS = [
    (
        "lua",
        "function f()\n  ▮\n  return g(a, 1)\nend\n",
        "local a = 1\n    return g(a, 1)\nend\n",
        "local a = 1",
    ),
    ("shellscript", 'f() {\n  ▮\n  echo "$a" b\n}\n', 'a=1\n    echo "$a" b\n}\n', "a=1"),
    ("elixir", "def f do\n  ▮\n  g(a, 1)\nend\n", "a = 1\n    g(a, 1)\nend\n", "a = 1"),
    ("haskell", "f = do\n  ▮\n  print (g 1)\n  h\n", "a <- b\n    print (g 1)\n    h\n", "a <- b"),
    ("toml", '[a]\n▮\nb = "c d"\n', 'x = 1\n  b = "c d"\n', "x = 1"),
    (
        "lua",
        "function f()\n  ▮\n  return g(a, 1)\nend\n",
        "if b then\n    return g(a, 1)\n  end\n",
        "if b then\n    return g(a, 1)\n  end",
    ),
    # After a statement nothing is deeper, so that a short line is no other one either.
    ("javascript", "f(() => {\n  ▮\n  return;\n});\n", "a();\n    return;\n", "a();"),
    ("python", "def f():\n  ▮\n  foo()\n", "a()\n    foo()\n", "a()"),
    ("lua", "while a do\n  ▮\n  break\nend\n", "b()\n    break\nend\n", "b()"),
    ("lua", "while a do\n  ▮\n  break\nend\n", "if b then\n    break\n  end\n", None),
    # The same line in another block, or of another comment, below is no repeat.
    (
        "typescript",
        "/**\n * F.\n * @param a - The one.▮\n */\nf(a, b);\n/**\n * G.\n * @param b - The other.\n */\n",
        "\n * @param b - The other.\n",
        None,
    ),
    (
        "python",
        "def f(a):\n    if a:\n        return 1\n    ▮\n\n\ndef g(a):\n    if a:\n        return h(a, 2)\n",
        "else:\n        return h(a, 2)\n",
        None,
    ),
]
# Some lines again and again: one copy is enough.
CYCLES = [
    ("python", "def f():\n    ▮\n", "print(a)\n    print(b)\n    " * 9, "print(a)\n    print(b)"),
    ("javascript", "f();\n▮\n", "a(1);\nb(2);\nc(3);\n" * 6, "a(1);\nb(2);\nc(3);"),
    ("markdown", "a\n\n▮\n", "Do it now.\n\nAnd then.\n\n" * 6, "Do it now.\n\nAnd then."),
    (
        "asm",
        "f:\n▮\n",
        "    push rax\n    call g\n    push rbx\n    call g\n    push rcx\n    call g\n",
        None,
    ),
]
# A recipe has no blocks.
RECIPES = [
    (
        "makefile",
        "a:\n\tif b; then \\\n▮\n",
        "\t    c; \\\n\tfi\n\nd:\n\te\n",
        "\t    c; \\\n\tfi",
    ),
]
# What closes behind the cursor what was opened on another line, or on its own.
BEHIND = [
    ("clojure", "(defn f []\n  (a)\n▮)\n", "  (b)\n", None),
    ("javascript", "foo(() => {\n  a();\n  ▮})\n", "b({c: 1})\n", None),
    ("javascript", "foo(() => {\n  a();\n  ▮})\n", "b(1)})\n", "b(1)"),
    ("c", "foo(a,\n    ▮);\n", "b(1)\n", None),
    ("c", "foo(a,\n    ▮);\n", "b(1));\n", "b(1)"),
    ("python", "x = f(▮)\n", "len(a)\n", None),
    ("python", "x = f(▮)\n", "len(a))\n", "len(a)"),
    ("python", "x = f(a[▮])\n", "0])\n", "0"),
]
# Who asks there gets one line without its end.
BEHIND_INVOKED = [
    ("clojure", "(defn f []\n  (a)\n▮)\n", "  (b)\n", None),
    ("python", 'def f():\n    """Do ▮."""\n', "it (now)\n", None),
    ("markdown", "See (the ▮).\n", "manual\n", None),
    ("python", "f(▮)\n", "\n    a,\n", "\n    a,\n"),
]
# What ran away leads to nothing, and is not closed.
RUN_AWAY = [
    ("python", "x = ▮\n", "f(" * 300, Reason.REPEATS_ITSELF),
    ("python", "a = 1\n▮\n", "y = 2\nx = " + "f(" * 300, "y = 2"),
]
FENCES = [
    ("python", "x = 1\n▮\n", "y = 2\n~~~\nmore\n", "y = 2"),
    ("markdown", "a\n\n▮\n", "~~~\nx\n~~~\n", None),
]


@pytest.mark.parametrize("invoked", [False, True])
@pytest.mark.parametrize(
    ("language", "marked", "model", "expected"),
    [
        *GOES_ON,
        *((*case, None) for case in AFTER_COMMENTS),
        *CLOSED_BELOW,
        *REPEATS,
        *CYCLES,
        *RUN_AWAY,
        *RECIPES,
        *FENCES,
    ],
)
def test_a_suggestion_ends_with_its_block(language, marked, model, expected, invoked):
    found = suggested(place_of(language, marked, invoked=invoked), model)
    if isinstance(expected, Reason):
        assert found == ("", expected)
    else:
        assert found == (expected or model.rstrip(), None)


@pytest.mark.parametrize(("language", "marked", "model", "expected"), BEHIND_INVOKED)
def test_what_stands_behind_the_cursor_stays_on_its_line(language, marked, model, expected):
    found = suggested(place_of(language, marked, invoked=True), model)
    assert found == (expected or model.rstrip(), None)


@pytest.mark.parametrize(("language", "marked", "model", "expected"), BEHIND)
def test_what_is_closed_behind_the_cursor_is_not_closed_twice(language, marked, model, expected):
    assert suggested(place_of(language, marked), model) == (expected or model.rstrip(), None)
