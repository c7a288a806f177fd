"""Prompts made with the vocabularies of real models: exact text, exact budget, few new tokens per key."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midfill.bench.trace import read_trace
from midfill.completion.prompt import PromptBuilder
from midfill.engine.api import ModelInfo
from midfill.fim.templates import FAMILIES, Layout
from midfill.settings import Settings
from midfill.text.documents import Change, Document, Encoding, Point, Snapshot
from profiles import examples

# A vocabulary, the family whose sentinels it has, and a `model_type`.
MODELS = [
    ("starcoder", "starcoder2"),
    ("refact", "starcoder"),
    ("refact", "mellum"),
    ("deepseek-coder", "deepseek-coder"),
    ("qwen2.5-coder", "qwen2.5-coder"),
    ("codellama", "codellama"),
    ("codestral", "codestral"),
]
CASES = [(vocab, family, layout) for vocab, family in MODELS for layout in FAMILIES[family].layouts]
AUTO_CLOSED = re.compile(r"\s*[)\]}>\"'`]+[;,]?")

sentinels = st.sampled_from(
    sorted({name for family in FAMILIES.values() for name in (*family.sentinels, *family.stops)})
)
pieces = st.one_of(
    st.sampled_from(
        [
            "def f(x):",
            "    return x",
            "\tif (a) {",
            "}",
            "x = 1",
            "",
            "# naïve — 日本語 🙂🏽",
            "'",
            '"',
            "()",
            "e\u0301",
        ]
    ),
    sentinels,
    # StarCoder's vocabulary has no token for the byte F1, which characters from U+40000 on begin with.
    st.text(st.characters(max_codepoint=0x3FFFF), max_size=12),
    st.sampled_from(["x = [" + "1, " * 400 + "]", "🙂" * 300, "word " * 300, "\ud800", "\u2581\u2581"]),
)
lines = st.lists(st.lists(pieces, max_size=3).map("".join), max_size=40)
endings = st.sampled_from(["\n", "\r\n", "\r"])
keys = st.lists(
    st.sampled_from([*"abc (.=1", "\n", "\r\n", "back", "()", "🙂", "pasted\n    text", "<|fim_middle|>"]),
    max_size=12,
)


def model_of(tokenizer, family, context=2048):
    return ModelInfo("m", family, "any", context, tokenizer, "cpu", "float32")


def clean(text):
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def split(document, cursor):
    before = "".join(document.lines[: cursor.line]) + document.lines[cursor.line][: cursor.column]
    return before, document.lines[cursor.line][cursor.column :] + "".join(document.lines[cursor.line + 1 :])


def texts_of(prompt, tokenizer):
    """The text of each segment by its source."""
    texts = {}
    at = 0
    for source, size in prompt.segments:
        texts[source] = tokenizer.decode(prompt.tokens[at : at + size])
        at += size
    assert at == len(prompt.tokens)
    return texts


def check(prompt, builder, tokenizer, snapshot, max_new_tokens):
    family = builder.family
    texts = texts_of(prompt, tokenizer)
    before, after = map(clean, split(snapshot.document, snapshot.cursor))
    prefix = texts.get("prefix", "") + texts.get("typed", "")
    # Where the prefix is empty and what was typed is the beginning of the middle, nothing leads it.
    if prompt.layout is not Layout.ANCHORED or texts.get("prefix"):
        assert prefix.startswith(family.prefix_lead)
        prefix = prefix.removeprefix(family.prefix_lead)
    assert before.endswith(prefix + prompt.forced_prefix)
    suffix = texts.get("suffix", "")
    if not after.startswith(suffix):
        assert AUTO_CLOSED.fullmatch(after[: after.index(suffix)])
    controls = [token for token in prompt.tokens if token in tokenizer.control_ids]
    expected = family.sentinels if suffix or not family.needs_suffix else (family.bos,)
    assert sorted(controls) == sorted(tokenizer.token_id(name) for name in expected)
    assert not family.bos or prompt.tokens[0] == tokenizer.token_id(family.bos)
    assert len(prompt.tokens) + prompt.max_new_tokens <= builder._context
    assert 1 <= prompt.max_new_tokens <= max_new_tokens + len(tokenizer.encode(prompt.forced_prefix))
    return prefix + prompt.forced_prefix, suffix, before, after


def press(document, cursor, key):
    """The document and the cursor after a key; "()" is a bracket that the editor closes."""
    end = (cursor.line, cursor.column)
    start = end
    if key == "back":
        key = ""
        if cursor.column:
            start = (cursor.line, cursor.column - 1)
        elif cursor.line:
            start = (cursor.line - 1, 10**6)
    document = document.edit([Change(key, start, end)], document.version + 1, Encoding.UTF32)
    begin = document.point(start, Encoding.UTF32)
    text = "(" if key == "()" else key
    rows = re.split("\r\n|\r|\n", text)
    line, column = begin.line + len(rows) - 1, len(rows[-1]) + (begin.column if len(rows) == 1 else 0)
    return document, document.point((line, column), Encoding.UTF32)


@pytest.mark.parametrize(("vocab", "family", "layout"), CASES)
@given(rows=lines, ending=endings, at=st.tuples(st.integers(0, 40), st.integers(0, 600)), typed=keys)
@settings(max_examples=examples(7), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_prompt_is_exactly_the_text_around_the_cursor(
    vocabulary, vocab, family, layout, rows, ending, at, typed
):
    tokenizer = vocabulary(vocab)
    model = model_of(tokenizer, family, context=300)
    wanted = Settings(layout=layout, prefix_tokens=120, suffix_tokens=60, max_new_tokens=32)
    builder = PromptBuilder(model, wanted)
    document = Document.open("file:///a", "python", 1, ending.join(rows))
    cursor = document.point(at, Encoding.UTF32)
    for key in ["", *typed]:
        document, cursor = press(document, cursor, key)
        snapshot = Snapshot(document, cursor)
        prompt = builder.build(snapshot)
        prefix, suffix, before, after = check(prompt, builder, tokenizer, snapshot, 32)
        sizes = dict(prompt.segments)
        assert sizes.get("prefix", 0) + sizes.get("typed", 0) <= 120
        assert sizes.get("suffix", 0) <= 60
        # Nothing is left out that fits.
        if key == "" and len(before.encode()) <= 100:
            assert prefix == before
        if key == "" and len(after.encode()) <= 60:
            assert suffix == after


@pytest.mark.parametrize(("vocab", "family"), MODELS)
@given(
    rows=lines,
    at=st.tuples(st.integers(0, 40), st.integers(0, 600)),
    context=st.integers(16, 600),
    asked=st.integers(1, 1024),
)
@settings(max_examples=examples(7), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_prompt_and_output_fit_into_any_context(vocabulary, vocab, family, rows, at, context, asked):
    tokenizer = vocabulary(vocab)
    builder = PromptBuilder(model_of(tokenizer, family, context), Settings(max_new_tokens=4))
    document = Document.open("file:///a", "python", 1, "\n".join(rows))
    snapshot = Snapshot(document, document.point(at, Encoding.UTF32))
    for max_new_tokens in (asked, 4):
        prompt = builder.build(snapshot, max_new_tokens=max_new_tokens)
        check(prompt, builder, tokenizer, snapshot, max_new_tokens)
    assert prompt.max_new_tokens == 4 + len(tokenizer.encode(prompt.forced_prefix))


@pytest.mark.parametrize("layout", [Layout.ANCHORED, Layout.APPENDING])
def test_a_key_makes_few_prompt_tokens_new(vocabulary, shared_data, layout):
    """On recorded typing, from the first token that differs from those of the key before."""
    tokenizer = vocabulary("qwen2.5-coder")
    counts = []
    for session in read_trace(shared_data / "typing-trace-sample.jsonl.gz"):
        builder = PromptBuilder(model_of(tokenizer, "qwen2.5-coder", 32_768), Settings(layout=layout))
        before, place = None, None
        for key, document in zip(session.keys, session.documents(), strict=True):
            tokens = builder.build(Snapshot(document, document.point(key.cursor, Encoding.UTF16))).tokens
            jumped = key.changes[0].start != place
            if before is not None and not jumped:
                counts.append(num_new(before, tokens))
            before, place = tokens, key.cursor
    counts.sort()
    assert len(counts) > 1_000
    assert counts[len(counts) // 2] <= 8
    assert counts[len(counts) * 99 // 100] <= 96


def num_new(before, after):
    """How many tokens of a prompt have to be computed when those of the one before are; one at least."""
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
    return max(1, len(after) - (min(len(before), len(after)) if same is None else same))


@pytest.mark.parametrize("layout", [Layout.ANCHORED, Layout.APPENDING])
@pytest.mark.parametrize(
    ("start", "typed", "most"),
    [
        # Brackets and quotes that the editor closes, typed over afterwards; Enter between braces.
        ("def f(items):\n    ▮\n    return items\n", ["items", ".append", "()", "x", ")over", "\n    "], 8),
        ("x = ▮\ny = 2\n", ["[]", '""', "a", '"over', ",", " ", "b", "]over"], 8),
        ("int f() ▮\n\nint g();\n", ["{}", "enter", "return 1;"], 8),
        # Backspace.
        ("value = ▮\nprint(value)\n", ["comp", "back", "back", "unt", "()"], 8),
        # Several lines.
        ("import os\n▮\nprint(1)\n", ["def f():\n", "    return 1\n", "\n", "x = f()"], 16),
    ],
)
def test_what_editors_insert_does_not_move_the_anchor(vocabulary, layout, start, typed, most):
    tokenizer = vocabulary("qwen2.5-coder")
    builder = PromptBuilder(model_of(tokenizer, "qwen2.5-coder"), Settings(layout=layout))
    head, tail = start.split("▮")
    filler = "".join(f"line_{n} = {n}\n" for n in range(20))
    head, tail = filler + head, tail + filler
    text, at = head + tail, len(head)
    before = None
    for keys_typed in ["", *typed]:
        if keys_typed == "back":
            text, at = text[: at - 1] + text[at:], at - 1
        elif keys_typed == "enter":
            text, at = text[:at] + "\n    \n" + text[at:], at + 5
        elif keys_typed.endswith("over"):
            assert text[at] == keys_typed[0]
            at += 1
        elif keys_typed in ("()", "[]", "{}", '""'):
            text, at = text[:at] + keys_typed + text[at:], at + 1
        else:
            text, at = text[:at] + keys_typed + text[at:], at + len(keys_typed)
        document = Document.open("file:///a.c", "c", 1, text)
        cursor = Point(text[:at].count("\n"), at - text.rfind("\n", 0, at) - 1)
        prompt = builder.build(Snapshot(document, cursor))
        if before is not None:
            assert num_new(before, prompt.tokens) <= most
        before = prompt.tokens
