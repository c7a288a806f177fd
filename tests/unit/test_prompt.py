import dataclasses

import pytest

from midfill.completion.prompt import PromptBuilder
from midfill.engine.api import ModelInfo
from midfill.engine.scripted import CharTokenizer
from midfill.errors import ModelError
from midfill.settings import Settings
from midfill.text.documents import Change, Document, Encoding, Point, Snapshot

MODEL = ModelInfo("m", "qwen2.5-coder", "qwen2", 4096, CharTokenizer(), "cpu", "float32")
PRE, SUF, MID = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"


def snapshot(marked, uri="file:///a.py"):
    before, after = marked.split("▮")
    document = Document.open(uri, "python", 1, before + after)
    return Snapshot(document, Point(before.count("\n"), len(before) - before.rfind("\n") - 1))


def builder(model=MODEL, layout="anchored", **settings):
    return PromptBuilder(model, Settings(layout=layout, **settings))


def text(prompt):
    return CharTokenizer().decode(prompt.tokens)


def typed(start, keys):
    """Snapshots while `keys` are typed at the cursor of `start`, one after each key."""
    document, cursor = start.document, start.cursor
    for key in keys:
        place = (cursor.line, cursor.column)
        document = document.edit([Change(key, place, place)], document.version + 1, Encoding.UTF32)
        cursor = Point(cursor.line + 1, 0) if key == "\n" else Point(cursor.line, cursor.column + 1)
        yield Snapshot(document, cursor)


def shared_prefix(one, two):
    return next(
        (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )


def test_what_is_typed_on_the_line_follows_the_middle_sentinel():
    prompt = builder().build(snapshot("a = 1\nb = (▮)\nc = 3\n"))
    assert text(prompt) == f"{PRE}a = 1\n{SUF})\nc = 3\n{MID}b ="
    assert prompt.forced_prefix == " ("


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        ("psm", f"{PRE}a = 1\nb ={SUF})\nc = 3\n{MID}"),
        ("anchored", f"{PRE}a = 1\n{SUF})\nc = 3\n{MID}b ="),
        ("appending", f"{PRE}{SUF})\nc = 3\n{MID}a = 1\nb ="),
        ("auto", f"{PRE}{SUF})\nc = 3\n{MID}a = 1\nb ="),
    ],
)
def test_layouts(layout, form):
    prompt = builder(layout=layout).build(snapshot("a = 1\nb = (▮)\nc = 3\n"))
    assert text(prompt) == form
    assert prompt.forced_prefix == " ("


def test_segments_count_every_token():
    prompt = builder().build(snapshot("a = 1\nb = (▮)\nc = 3\n"))
    assert sum(size for _, size in prompt.segments) == len(prompt.tokens)


@pytest.mark.parametrize("keys", ["value = compute(1, 2)", "x = 1\ny = 2\nif x:\n"])
def test_typing_appends_to_the_prompt(keys):
    build = builder().build
    start = snapshot("import os\n\n\ndef f():\n    ▮\n    return 1\n")
    before = build(start)
    for step in typed(start, keys):
        after = build(step)
        # What was held back before comes back, so nothing before it is computed again.
        assert shared_prefix(before.tokens, after.tokens) >= len(before.tokens) - len(before.forced_prefix)
        before = after


def test_an_edit_above_moves_the_anchor():
    build = builder().build
    start = snapshot("a = 1\nb = ▮\n")
    build(start)
    document = start.document.edit([Change("9", (0, 4), (0, 5))], 2, Encoding.UTF32)
    assert "a = 9" in text(build(Snapshot(document, start.cursor)))


def test_an_edit_below_moves_the_anchor():
    build = builder().build
    start = snapshot("a = ▮\nb = 2\n")
    build(start)
    document = start.document.edit([Change("9", (1, 4), (1, 5))], 2, Encoding.UTF32)
    assert "b = 9" in text(build(Snapshot(document, start.cursor)))


def test_documents_have_anchors_of_their_own():
    build = builder().build
    build(snapshot("a\nb▮\n", "file:///1.py"))
    assert text(build(snapshot("c\n7▮\n", "file:///2.py"))) == f"{PRE}c\n{SUF}\n{MID}7"


@pytest.mark.parametrize(
    ("line", "kept", "held"),
    [
        ("x = ", "x =", " "),
        ("f(", "f", "("),
        ("x = (se", "x =", " (se"),
        ("found.", "found", "."),
        ("x =", "x", " ="),
        ("self._calc", "self", "._calc"),
        ("json.lo", "json", ".lo"),
        ("x = json.lo", "x = json", ".lo"),
        ("    retu", "   ", " retu"),
        ("count_al", "count", "_al"),
        ("x = 12", "x = 12", ""),
        ("", "", ""),
    ],
)
def test_half_a_token_is_held_back(line, kept, held):
    prompt = builder().build(snapshot(f"import json\n{line}▮\n"))
    assert text(prompt).endswith(MID + kept)
    assert prompt.forced_prefix == held


@pytest.mark.parametrize(
    ("code", "kept", "held"),
    [
        # As wide as a line above, or wider below an opener: all but the last blank is a token of its own.
        ("def f():\n    x = 1\n    ▮\n", "   ", " "),
        ("def f():\n    ▮\n", "   ", " "),
        ("\tif a {\n\t\t▮\n", "\t", "\t"),
        # Half of an indentation.
        ("def f():\n    if x:\n    ▮\n", "", "    "),
        ("def f():\n    x = 1\n  ▮\n", "", "  "),
        ("\tif a {\n\t▮\n", "", "\t"),
        # Columns.
        ("x = 1\nname   ▮\n", "name", "   "),
    ],
)
def test_half_an_indentation_is_held_back(code, kept, held):
    prompt = builder().build(snapshot(code))
    assert text(prompt).endswith(MID + kept)
    assert prompt.forced_prefix == held


def test_the_budget_is_kept():
    lines = "".join(f"value_{n} = {n} * {n}\n" for n in range(200))
    for line in (0, 3, 57, 100, 199):
        document = Document.open("file:///a.py", "python", 1, lines)
        prompt = builder(prefix_tokens=120, suffix_tokens=60).build(Snapshot(document, Point(line, 4)))
        sizes = dict(prompt.segments)
        assert sizes.get("prefix", 0) + sizes.get("typed", 0) <= 120
        assert sizes["suffix"] <= 60
        if line >= 57:
            assert sizes["prefix"] > 40


def test_the_window_slides_in_jumps():
    lines = "".join(f"v{n} = {n}\n" for n in range(300))
    document = Document.open("file:///a.py", "python", 1, lines)
    starts = set()
    build = builder(prefix_tokens=256).build
    for line in range(100, 132):
        prompt = build(Snapshot(document, Point(line, 0)))
        starts.add(text(prompt).removeprefix(PRE).split("\n")[0])
    assert len(starts) <= 6


def test_a_very_long_line_is_cut_before_the_cursor():
    prompt = builder(prefix_tokens=50, suffix_tokens=20).build(snapshot("x" * 100_000 + "7▮" + "y" * 100_000))
    assert text(prompt) == f"{PRE}{SUF}{'y' * 20}{MID}{'x' * 24}7"


def test_the_model_sees_plain_line_ends():
    prompt = builder().build(snapshot("a = 1\r\nb = 7▮\r\nc = 3\r\n"))
    assert text(prompt) == f"{PRE}a = 1\n{SUF}\nc = 3\n{MID}b = 7"


def test_a_sentinel_in_the_file_is_plain_text():
    prompt = builder().build(snapshot(f"s = '{MID}'\nt = (▮\n"))
    ids = [CharTokenizer().token_id(name) for name in (PRE, SUF, MID)]
    assert [prompt.tokens.count(id_) for id_ in ids] == [1, 1, 1]


def test_suffix_first_families_end_with_the_prefix():
    class Names(CharTokenizer):
        control_ids = frozenset({1, 2, 3, 4, 5})

        def token_id(self, name):
            names = {
                "<fim_prefix>": 1,
                "<fim_suffix>": 2,
                "<fim_middle>": 3,
                "<|endoftext|>": 4,
                "<filename>": 5,
            }
            return names.get(name)

    model = dataclasses.replace(MODEL, family="mellum", architecture="llama", tokenizer=Names())
    prompt = builder(model, "spm").build(snapshot("a\n7▮)\n"))
    body = CharTokenizer()
    assert prompt.tokens == (2, *body.encode(")\n"), 1, *body.encode("a\n7"), 3)


def test_what_was_held_back_does_not_shorten_the_suggestion():
    prompt = builder().build(snapshot("x = compute▮"), max_new_tokens=10)
    assert prompt.forced_prefix == " compute"
    assert prompt.max_new_tokens == 10 + len(" compute")
    tight = builder(dataclasses.replace(MODEL, context=48), max_new_tokens=32).build(snapshot("x = compute▮"))
    assert len(tight.tokens) + tight.max_new_tokens <= 48


@pytest.mark.parametrize("blanks_or_word", [" " * 65, "ab" * 33])
def test_what_is_too_long_for_half_a_token_is_not_held_back(blanks_or_word):
    prompt = builder().build(snapshot(f"a ={blanks_or_word}▮\n"), max_new_tokens=10)
    assert prompt.forced_prefix == ""
    assert prompt.max_new_tokens == 10


def test_a_context_without_room_is_refused():
    with pytest.raises(ModelError, match="max_new_tokens"):
        builder(dataclasses.replace(MODEL, context=33))


def test_where_the_user_rests_an_anchor_that_is_nearly_used_up_moves_before_it_has_to():
    def grown(layout, num_lines):
        prompts = builder(layout=layout, prefix_tokens=256)
        start = snapshot("x = 1\n" * 25 + "▮\n")
        *_, last = typed(start, "abc = 2345\n" * num_lines)
        prompts.build(start)
        return prompts, last

    for layout in ("anchored", "appending"):
        # Room is left: nothing changes.
        prompts, last = grown(layout, 2)
        assert prompts.build_moving_anchor(last).tokens == prompts.build(last).tokens
        # Hardly any is left: the window moves now, and leaves room for what comes.
        prompts, last = grown(layout, 8)
        before = prompts.build(last)
        settled = prompts.build_moving_anchor(last)
        size = sum(count for name, count in settled.segments if name in {"prefix", "typed"})
        assert settled.tokens != before.tokens
        assert size <= 256 * 3 // 4 + len("abc = 2345\n")
        # And the next keys append to what has been read.
        *_, later = typed(last, "def f")
        assert shared_prefix(prompts.build(later).tokens, settled.tokens) >= len(settled.tokens) - 1
