"""No text takes longer than its length allows: a search for slow inputs, by growth and not by the clock.

Each thing that takes a text is given hostile ones of three sizes, each four times as long as the one before.
Four times the text may take eight times as long; a quadratic thing takes sixteen times. By default a few
texts are drawn for each; MIDFILL_SLOW_INPUTS=200 draws more.
"""

import contextlib
import gc
import itertools
import json
import math
import os
import random
import time
import tomllib
from dataclasses import dataclass

import pytest

from midfill.completion import closer_pairs
from midfill.completion.autoclose import matched_closer_offsets, reconcile_auto_closed
from midfill.completion.confidence import Eagerness, Evidence, length_to_show
from midfill.completion.context import chunks, files, index
from midfill.completion.context.ignore import IgnoreRules
from midfill.completion.postprocess import brackets, clean, indentation, midline, stop
from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.completion.postprocess.normalization import Normalizer
from midfill.completion.prompt import PromptBuilder
from midfill.engine.api import ModelInfo
from midfill.engine.scripted import CharTokenizer
from midfill.errors import SettingsError
from midfill.lsp import items, messages
from midfill.settings import Settings, parse
from midfill.text import languages, secret_filter, syntax
from midfill.text.documents import Change, Document, Encoding, Point, Snapshot, changed_lines

NUM_DRAWN = int(os.environ.get("MIDFILL_SLOW_INPUTS", "3"))
MAX_GROWTH = 8
# Less cannot be told from the noise of a busy machine, and nobody notices it.
MEASURABLE_S = 0.1
HOPELESS_S = 5

PIECES = [
    *("password", "token=", "secret_key='a1b2c3d4", "eyJ", "://a:", "-----BEGIN PRIVATE KEY", 'api_key": "'),
    *("(", "([{", ")", "()", "{}", '"', "'", '"""', "`", "${", "/*", "*/", "//", "#", "<<EOF\n", "<a>", "\\"),
    *(
        "a",
        "a ",
        " ",
        "\t",
        " \t",
        "\n",
        "\r",
        "\r\n",
        "    \n",
        "a\n",
        "x = 1\n",
        "if x:\n",
        "  - ",
        "```\n",
    ),
    *("\u0301", "e\u0301", "\u200b", "\U0001f600", "İ", "ß", "\ud800", "\x0b", "\x85", "\u2028", "\x00"),
    *(
        "aB1_",
        "_",
        "-",
        "=",
        "1",
        "0x",
        ".",
        ",",
        ";",
        ":",
        "|",
        "*",
        "?",
        "[a",
        "**/",
        "import a\n",
        "def f(\n",
    ),
    *("end\n", "else\n", "return ", "<|fim_prefix|>", "---\n", "> ", "| a ", "[a](b", "&amp;", "%20", "a/b/"),
]
ENDS = ["", "x", "\n", "'", '"', ")", "}", "\nend", "1a2B3c"]
MODEL = ModelInfo("m", "qwen2.5-coder", "qwen2", 4096, CharTokenizer(), "cpu", "float32")
LANGUAGES = ("python", "javascript", "go", "ruby", "shellscript", "html", "markdown", "c", "rust")


@dataclass(frozen=True)
class Hostile:
    """A text of any length: a piece again and again, maybe cut into lines, and an end."""

    piece: str
    end: str
    line_chars: int

    def of(self, num_chars):
        body = (self.piece * (num_chars // len(self.piece) + 1))[:num_chars]
        if self.line_chars:
            body = "\n".join(body[at : at + self.line_chars] for at in range(0, len(body), self.line_chars))
        return body + self.end


HOSTILE = [
    Hostile(piece, end, line_chars)
    for piece, end, line_chars in itertools.product(PIECES, ENDS, (0, 80, 1_900))
]


def snapshot(text, language="python"):
    document = Document.open("file:///a.py", language, 1, text)
    line = len(document.lines) // 2
    return Snapshot(document, Point(line, len(document.lines[line].rstrip("\r\n")) // 2))


def cursor(text, language="python"):
    return CursorContext.of(snapshot(text, language), invoked=True)


PLACE = CursorContext(
    "    x = (", ")", ("    y = 2", "", "def g():"), above="def f():\n", language_id="python", invoked=True
)


def hostile_place(text):
    """A place amid a hostile text: the longest lines that are looked at, and many around."""
    lines = tuple(text[:20_000].split("\n"))
    above = text[:20_000].rpartition("\n")[0] + "\n"
    before = text[:1_000].replace("\n", "")
    after = text[:2_000].replace("\n", "").strip() or ")"
    return CursorContext(before, after, lines[:40], 24, above, "python", invoked=True)


def stopped(text):
    stopper = stop.Stopper(PLACE)
    for end in range(0, len(text), 8):
        if stopper.end(text[:end]) is not None:
            break


def received_in_pieces(text):
    whole = Normalizer(PLACE)
    for at in range(0, len(text), 8):
        whole.push(text[at : at + 8])
    whole.finish()


def searched(text):
    found = index.RepositoryIndex()
    found.add("a.py", chunks.parse(files.SourceFile("a.py", "python", text, frozenset())))
    found.commit()
    found.search(text.split("\n")[:40], 10)
    found.define(set(text.split()[:1_000]))


def edited(text):
    document = Document.open("file:///a.py", "python", 1, text)
    for line in range(0, len(document.lines), max(1, len(document.lines) // 10)):
        new = document.edit([Change(text[:1_000], (line, 0), (line, 3))], 2, Encoding.UTF16)
        changed_lines(document.lines, new.lines)
        document = new


def read_message(text):
    params = {"textDocument": {"uri": text[:1_000], "version": 1}, "contentChanges": [{"text": text}]}
    messages.read_edited(json.loads(json.dumps(params)))


def parsed_json(text):
    with contextlib.suppress(ValueError, RecursionError):
        json.loads("[" * min(len(text), 500) + text)


def read_settings(text):
    with contextlib.suppress(ValueError, SettingsError, RecursionError):
        parse(tomllib.loads(text))
    with contextlib.suppress(SettingsError):
        parse({"disabled_languages": text.split("\n"), "engine": text, "model": text})


def shown(text):
    tokens = tuple((end, -0.1) for end in range(1, len(text), 4))
    length_to_show(Evidence(text, tokens, finished=True, line_before="    x = "), Eagerness.NORMAL)


def popup(text):
    style = items.PopupStyle(takes_edits=True, markdown=True, insert_text_mode=True)
    answer = _Answer(text)
    items.popup_item(snapshot("x = \n"), answer, Encoding.UTF16, None, style)


@dataclass
class _Answer:
    text: str
    num_replaced: int = 0


# What takes a document, of any length.
OF_DOCUMENTS = {
    "secret_filter.find_secrets": secret_filter.find_secrets,
    "secret_filter.grade": secret_filter.severity,
    "secret_filter.is_excluded": lambda text: secret_filter.is_excluded(text, Settings().excluded_files),
    "files.classify": lambda text: files.classify("a.py", text),
    "languages.language_id": languages.language_id,
    "ignore": lambda text: IgnoreRules([text.encode("utf-8", "replace")]).verdict(
        "a/b" * 60, is_folder=False
    ),
    "documents": edited,
    "place": cursor,
    "chunks.terms": chunks.terms,
    "chunks.imported_names": lambda text: chunks.imported_names(
        text.splitlines(keepends=True)[:200], "python"
    ),
    "index": searched,
    "indentation.unit": lambda text: indentation.unit(text.split("\n")),
    "prompt": lambda text: PromptBuilder(MODEL, Settings()).build(snapshot(text)),
    "messages": read_message,
    "json": parsed_json,
    "settings": read_settings,
    **{
        f"chunks.parse {one}": lambda text, one=one: chunks.parse(
            files.SourceFile("a", one, text, frozenset())
        )
        for one in LANGUAGES
    },
    **{f"syntax.outline {one}": lambda text, one=one: syntax.outline(text, one) for one in LANGUAGES},
}
# What takes a suggestion, which is as long as its tokens allow.
OF_SUGGESTIONS = {
    "stop.stop": lambda text: stop.stop(text, PLACE),
    "clean.clean": lambda text: clean.clean(text, PLACE, complete=False, forbidden=("<|x|>",)),
    "stop.Stopper": stopped,
    "brackets.scan": lambda text: list(brackets.scan(text)),
    "brackets.imbalance": brackets.imbalance,
    "received": received_in_pieces,
    "indentation.moved": lambda text: indentation.moved(text, "    ", 8, "    "),
    "midline": lambda text: midline.bridged(text, None, PLACE, complete=True),
    "midline.without_overlap": lambda text: midline.without_overlap(text, PLACE),
    "midline among the same": lambda text: midline.bridged(text, None, hostile_place(text), complete=True),
    "midline.end_of_line among the same": lambda text: midline.end_of_line(text, hostile_place(text)),
    "midline.without_overlap among the same": lambda text: midline.without_overlap(text, hostile_place(text)),
    "stop.stop among the same": lambda text: stop.stop(text, hostile_place(text)),
    "clean.clean among the same": lambda text: clean.clean(
        text, hostile_place(text), complete=False, forbidden=()
    ),
    "confidence": shown,
    "popup": popup,
    "autoclose.reconcile_auto_closed": lambda text: reconcile_auto_closed(text, ')"}'),
    "autoclose.matched_closer_offsets": lambda text: matched_closer_offsets(text, ')"}'),
    "closer_pairs": closer_pairs.closer_pairs,
}
SIZES = {**dict.fromkeys(OF_DOCUMENTS, 100_000), **dict.fromkeys(OF_SUGGESTIONS, 8_000)}


def seconds(function, text):
    gc.disable()
    try:
        begun = time.process_time()
        function(text)
        return time.process_time() - begun
    finally:
        gc.enable()


def too_slow(function, hostile, largest):
    """What grows too fast, in words; None if nothing does."""
    times = []
    for size in (largest // 16, largest // 4, largest):
        text = hostile.of(size)
        took = seconds(function, text)
        # A step up from nothing, to a limit or to another way, is no growth; the next size would show it.
        if times and times[-1] > MEASURABLE_S / 20 and took > max(MEASURABLE_S, MAX_GROWTH * times[-1]):
            # Something else may have happened meanwhile.
            took = min(took, *(seconds(function, text) for _ in range(2)))
            before = max(seconds(function, hostile.of(size // 4)) for _ in range(3))
            grows = took > max(MEASURABLE_S, MAX_GROWTH * before)
            # To a limit it is a step as well: then four times as much again takes little more.
            if grows and seconds(function, hostile.of(4 * size)) > MAX_GROWTH * took:
                return f"{size // 4} characters: {before:.3f} s, {size}: {took:.3f} s"
        if took > HOPELESS_S:
            return f"{size} characters: {took:.1f} s"
        times.append(took)
    return None


def drawn(name):
    return random.Random(name).sample(HOSTILE, min(NUM_DRAWN, len(HOSTILE)))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.timeout(0)
def test_four_times_the_text_takes_no_more_than_eight_times_as_long(name):
    function = (OF_DOCUMENTS | OF_SUGGESTIONS)[name]
    # The first call may import or compile something.
    function("a = 1\n")
    slow = {one: why for one in drawn(name) if (why := too_slow(function, one, SIZES[name]))}
    assert not slow


def test_the_search_finds_what_is_quadratic():
    def quadratic(text):
        return sum(text.count("a", at) for at in range(len(text)))

    def linear(text):
        return [math.sqrt(ord(char)) for char in text]

    assert too_slow(quadratic, Hostile("a", "", 0), 40_000)
    assert not too_slow(linear, Hostile("a", "", 0), 400_000)
