import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midfill.text import syntax
from midfill.text.syntax import Growing, balance, count_errors, first_error, knows, outline

# A language, a piece of unfinished code full of traps, and the closers that it still awaits.
UNFINISHED = [
    (
        "python",
        "def f():\n    '''it's (\nabc\n    '''\n    x = f\"{a['b']} (\"  # don't (\n    z = g(1,\n",
        ")",
    ),
    ("javascript", "class A {\n  f(a) {\n    // don't {\n    r = /[(]/g; s = `a ${b(`c ${d}`)} (`;\n", "}}"),
    ("javascriptreact", "function F() {\n  return (\n    <p title={a}>it's (\n", "})"),
    ("typescript", "class A<T> {\n  f(a: T[]): void { // don't {\n    if (a) {\n", "}}}"),
    ("typescriptreact", "const F = () => {\n  return (<p>{a}</p>", "})"),
    ("go", "func f() {\n\ts := `it's (`; r := '(' // don't (\n\tif x {\n", "}}"),
    ("rust", "fn f<'a>(x: &'a str) {\n    let c = '('; let s = r#\"(\"#; // don't (\n    match x {\n", "}}"),
    ("java", "class A {\n  int f(int a) {\n    char c = '('; // don't {\n    g(a,", "}})"),
    ("c", "int f(void) {\n  char c = '('; /* don't ( */\n#ifdef X\n  if (c) {\n", "}}"),
    ("cpp", 'int f() {\n  auto s = R"(( )"; // don\'t (\n  std::vector<int> v{', "}}"),
    ("csharp", "class A { void F() { var s = $\"a {x + 1} (\"; var c = '('; // don't (\n", "}}"),
    ("php", "function f($x) {\n  $s = \"a {$x['b']} (\"; // don't (\n  if ($x) {\n", "}}"),
    ("kotlin", 'fun f(x: Int): Int {\n  val s = "a ${x + 1} (" // don\'t (\n  if (x > 1) {\n', "}}"),
    ("swift", 'func f(x: Int) -> Int {\n  let s = "a \\(x + 1) (" // don\'t (\n  if x {\n', "}}"),
    ("scala", 'object A {\n  def f(x: Int) = {\n    val s = s"a ${x} (" // don\'t (\n', "}}"),
    ("css", 'a { content: "("; /* don\'t ( */\n', "}"),
    ("json", '{"a": [1, "(", {"b": ', "}]}"),
]
KEYWORDS = [
    (
        "ruby",
        'def f(x)\n  foo if bar\n  while y do\n    z.each do |a|\n      s = "#{b[1]} (" # don\'t do\n',
        ["end"] * 3,
    ),
    ("ruby", "def f\n  a = if x\n    1\n  end\n  return unless b\n  case c\n  when 1 then 2\n", ["end"] * 2),
    ("lua", "function f()\n  for i = 1, 2 do\n    if x then y() end\n    repeat\n", ["end", "end", "until"]),
    (
        "shellscript",
        "f() {\n  if [[ -f $x ]]; then\n    case $x in\n      a) echo 'it (' ;;\n",
        ["}", "fi", "esac"],
    ),
    ("shellscript", 'for i in $(seq 3); do\n  y=$((1+2)); x="${a} (" # don\'t (\n', ["done"]),
    ("elixir", "def f(x) do\n  g(fn a -> a end)\n  if x do\n", ["end", "end"]),
]


@pytest.mark.parametrize(("language", "text", "closers"), UNFINISHED + KEYWORDS)
def test_what_an_unfinished_text_still_awaits(language, text, closers):
    found = outline(text, language)
    assert list(balance(found.delimiters)[0]) == list(closers)


@pytest.mark.parametrize(("language", "text", "closers"), UNFINISHED + KEYWORDS)
def test_it_is_the_same_from_the_middle_on(language, text, closers):
    for start in (len(text) // 2, len(text)):
        found = outline(text, language, start)
        assert list(balance(found.delimiters, found.open)[0]) == list(closers)


@pytest.mark.parametrize(("language", "text", "closers"), UNFINISHED + KEYWORDS)
def test_a_text_that_grows_is_read_as_if_it_had_come_at_once(language, text, closers):
    growing = Growing.of(text[:5], language)
    for size in range(5, len(text)):
        growing.outline(text[5:size])
    assert growing.outline(text[5:]) == outline(text, language, 5)


def test_without_a_grammar_there_is_no_answer():
    assert not knows("plaintext")
    assert outline("a (", "plaintext") is None
    assert Growing.of("a (", "plaintext") is None
    assert count_errors("a (", "plaintext") is None


def test_every_grammar_is_there():
    for language in syntax._GRAMMARS:
        assert outline("x", language) is not None


def test_offsets_are_code_points():
    found = outline('x = "é𝄞"; f(é, "ü"', "javascript")
    assert [(one.start, one.text) for one in found.delimiters] == [(11, "(")]
    assert [(start, end) for start, end, _ in found.opaque] == [(4, 8), (15, 18)]


def test_places_inside_strings_and_comments_are_known():
    text = "x = '''\nabc\n''' # why\ny = 1\n"
    found = outline(text, "python")
    assert found.within(text.index("abc"))
    assert found.within(text.index("why"))
    assert not found.within(text.index("y = 1"))
    assert found.is_comment(text.index("#"), text.index("\ny"))
    assert not found.is_comment(0, 3)


def test_errors_are_counted():
    assert count_errors("f(1)\n", "javascript") == 0
    assert count_errors("f(1))\n", "javascript") > 0
    assert count_errors("x = max(-i for i in y)  z = 2\n", "python") > 0
    assert count_errors("function f($x) { return 1; }", "php") == 0


@given(
    st.sampled_from(sorted(syntax._GRAMMARS)), st.text(alphabet="(){}[]'\"`#/*\\\n ax:é𝄞\ud800", max_size=60)
)
def test_any_text_has_an_outline(language, text):
    found = outline(text, language)
    for one in found.delimiters:
        assert text[one.start : one.end] == one.text


def test_a_text_on_which_the_scanner_of_a_grammar_never_ends_is_not_parsed():
    """That loop is in C: no budget ends it, and it holds the interpreter lock."""
    assert outline("\\é\n#(\\:𝄞", "perl") is None


def test_a_text_that_takes_too_long_is_given_up(monkeypatch):
    growing = Growing.of("", "python")
    assert growing.outline("x = (") is not None
    monkeypatch.setattr(syntax, "_BUDGET_S", 0.0)
    text = "x = (\n" * 5000
    assert growing.outline(text) is None
    assert growing.outline("x = (") is None
    assert outline(text, "python") is None
    assert count_errors(text, "python") is None


def test_reading_takes_time_in_proportion_to_the_length(monkeypatch):
    monkeypatch.setattr(syntax._parse, "__defaults__", (None, 100.0))

    def takes(num_methods):
        text = "".join(
            f"    def method_{i}(self, a, b):\n        return [a, (b, {i})]\n\n" for i in range(num_methods)
        )
        times = []
        for _ in range(15):
            begun = time.thread_time()
            assert outline(text + "        return 1\n", "python", len(text)) is not None
            times.append(time.thread_time() - begun)
        return min(times)

    # What the cursor's window has, and four times as much. Were it quadratic, it would take 16 times as long.
    assert takes(480) < 10 * takes(120)


def test_pythons_own_parser_says_where_it_gives_up():
    assert first_error("def f():\n    return 1\n", "python") is None
    assert first_error("while x:  y()\n    z()\n", "python") == 1
    # A window may begin within a block, and hold what only warns.
    assert first_error("    x = 1\n    y = '\\d'\n", "python") is None
    assert first_error("    x = 1\n      y = 2\n", "python") == 1
    assert first_error("f((\n", "javascript") is None


def test_what_is_too_deep_for_a_parser_is_an_error_and_nothing_worse():
    for text in ("-" * 100_000 + "1", "(" * 5_000, "not " * 5_900 + "1", "a\0b"):
        assert first_error(text, "python") == 0


MEMORY = """
import gc
import psutil
from midfill.text import syntax

TEXT = "def f(x):\\n    return x + 1  # text of its own\\n" * 50

def from_nothing(number):
    syntax.outline(f"{TEXT}x = {number}", "python")

def cut_off(number):
    # Without a budget the parser gives up at the first look at the clock.
    syntax.count_errors(f"{TEXT * 10}x = {number}", "python", budget_s=0)

def growing(number):
    if number % 50 == 0:
        growing.text, growing.typed = syntax.Growing.of(TEXT, "python"), ""
    growing.typed += f"x = {number}\\n"
    growing.text.outline(growing.typed)

def resident():
    gc.collect()
    return psutil.Process().memory_info().rss

for number in range(500):
    WHAT(number)
before = resident()
for number in range(3_000):
    WHAT(number)
print((resident() - before) / 1e6)
"""


@pytest.mark.programs
@pytest.mark.parametrize("what", ["from_nothing", "cut_off", "growing"])
def test_three_thousand_parses_leave_nothing(what):
    """In a process of its own, whose memory is this alone."""
    command = [sys.executable, "-c", MEMORY.replace("WHAT", what)]
    grown_mb = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_mb < 1


def test_threads_parse_beside_each_other():
    texts = [f"def f_{number}(\n    " + "x = [(\n" * number for number in range(40)]
    alone = [outline(text, "python") for text in texts]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            assert list(threads.map(lambda text: outline(text, "python"), texts)) == alone
