"""Examples are what the server would send, and what was written there."""

import random
import re

import pytest
import tiny
from planted_history import Planted, grow, stage

from midfill.completion.context.files import SourceFile
from midfill.completion.prompt import PromptBuilder
from midfill.errors import ModelError
from midfill.models.store import LocalModel
from midfill.settings import Settings
from midfill.text.documents import Document, Point, Snapshot
from midfill.text.syntax import new_parser
from midfill.training import data, memory
from midfill.training.fim_spans import MAX_CHARS, SHARES, Source, Span
from midfill.training.history import Repository
from midfill.training.plan import describe, estimate_speed, summarise
from midfill.training.selection import select

SETTINGS = Settings(family="stable-code", prefix_tokens=96, suffix_tokens=48, max_new_tokens=16)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    planted = Planted.new(tmp_path_factory.mktemp("history") / "project")
    grow(planted, 30)
    return Repository(planted.root)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model("gpt_bigcode", folder)
    return LocalModel("tiny", folder, None, "made here")


def made(repository, model, settings=SETTINGS, **options):
    options = {"num_train": 120, **options}
    return data.build_examples(repository, select(repository, settings), model, settings, **options)


def everything(examples):
    return [*examples.train, *examples.dev, *examples.test, *examples.general]


def test_a_prompt_is_the_servers_own_and_the_target_is_what_was_written(repository, model):
    info = data.info_of(model)
    end = info.tokenizer.token_id("<|endoftext|>")
    examples = everything(made(repository, model))
    assert len(examples) > 200
    for example in examples:
        document = Document.open("file:///x.py", example.language, 0, example.before + example.after)
        lines = example.before.split("\n")
        snapshot = Snapshot(document, Point(len(lines) - 1, len(lines[-1])))
        prompt = PromptBuilder(info, SETTINGS).build(snapshot)
        assert example.prompt == prompt.tokens
        assert example.target[-1] == end
        assert end not in example.target[:-1]
        assert info.tokenizer.decode(example.target[:-1]) == prompt.forced_prefix + example.truth


def test_nothing_of_the_held_out_commits_is_learnt(repository, model):
    examples = made(repository, model, num_train=300)
    held_out = {example.commit for example in examples.test} | {example.commit for example in examples.dev}
    assert not held_out & {example.commit for example in examples.train}
    assert not {example.commit for example in examples.test} & {example.commit for example in examples.dev}
    selection = select(repository, SETTINGS)
    later = 2 * len(selection.split.train)
    for example in examples.train:
        text = example.before + example.truth + example.after
        assert all(f"stage {number} " not in text for number in range(later, 60))
    assert all(f"stage {later} " in one.before + one.truth + one.after for one in examples.test)


def test_middles_of_later_commits_are_in_what_they_added(repository, model):
    selection = select(repository, SETTINGS)
    rows = {}
    for found in (*selection.split.dev, *selection.split.test):
        for one in found:
            rows.setdefault((one.commit, one.file.path), set()).update(one.rows)
    examples = made(repository, model)
    for example in (*examples.dev, *examples.test):
        assert example.before.count("\n") in rows[example.commit, example.path]


def test_the_same_seed_gives_the_same_examples_and_another_other_ones(repository, model):
    one, two, other = (made(repository, model, seed=seed) for seed in (0, 0, 1))
    assert one == two
    assert one.digest != other.digest
    assert made(repository, model, SETTINGS.model_copy(update={"healing": False})).digest != one.digest


def test_context_is_the_servers_and_from_before_the_held_out_commits(repository, tmp_path):
    tiny.write_model("gpt_bigcode", tmp_path, n_positions=2048)
    model = LocalModel("tiny", tmp_path, None, "made here")
    settings = SETTINGS.model_copy(update={"context": ("repository",), "context_tokens": 800})
    tokenizer = data.info_of(model).tokenizer
    examples = made(repository, model, settings, num_train=20)
    prompts = [tokenizer.decode(example.prompt) for example in examples.test]
    assert any("# stages.py:\n" in prompt for prompt in prompts)
    shown = {
        int(number)
        for prompt in prompts
        for number in re.findall(r"^# def run_stage_(\d+)", prompt, re.MULTILINE)
    }
    assert shown
    assert max(shown) < 2 * len(select(repository, settings).split.train)


def test_kinds_come_in_their_shares(repository, model):
    kinds = data.count_kinds(made(repository, model, num_train=400).train)
    assert set(kinds) == set(SHARES)
    assert kinds["line"] > kinds["inline"]
    assert kinds["node"] > kinds["empty"]


def test_a_node_is_tree_sitters_and_a_block_ends_where_it_ends():
    text = "é = 1\n" + stage(1) + stage(2)
    source = Source(text, "python")
    chooser = random.Random(0)
    nodes = set()
    pending = [new_parser("python").parse(text.encode()).root_node]
    while pending:
        node = pending.pop()
        pending += node.children
        nodes.add(node.text.decode())
    rows = range(text.count("\n"))
    for _ in range(200):
        span = source.draw("node", rows, chooser)
        assert text[span.start : span.end] in nodes
    for _ in range(50):
        span = source.draw("block", range(3, 7), chooser)
        assert text[span.end :].startswith(("\n\n\ndef run_stage_2", "\n    if", "\n    return"))
        assert span.end - span.start <= MAX_CHARS


def test_a_line_that_may_hold_a_secret_is_in_no_middle():
    text = stage(1) + "token = 'a'\n" + stage(2)
    row = stage(1).count("\n")
    source = Source(text, "python", frozenset({row}))
    chooser = random.Random(0)
    for kind in SHARES:
        for _ in range(100):
            if (span := source.draw(kind, range(text.count("\n")), chooser)) is not None:
                first = text.count("\n", 0, span.start)
                assert row not in range(first, text.count("\n", 0, span.end) + 1)


def test_a_middle_that_is_too_long_is_not_taken(model):
    example_builder = data._new_builder(model, SETTINGS, data.Path("/x"), None)
    file = SourceFile("a.py", "python", "x" * 5000, frozenset())
    assert example_builder.cut(file, Span("random", 0, 699), "") is None
    assert example_builder.dropped == {"too long": 1}


def test_a_model_without_the_familys_tokens_is_refused(repository, tmp_path):
    tiny.write_model("gpt_bigcode", tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<fim_middle>", "<nothing>"))
    with pytest.raises(ModelError, match="fim_middle"):
        made(repository, LocalModel("tiny", tmp_path, None, "made here"))


def test_a_plan_counts_what_there_is(repository, model):
    selection = select(repository, SETTINGS)
    examples = made(repository, model)
    room = memory.estimate(model.path, "auto", SETTINGS, 24e9)
    plan = summarise(selection, examples, estimate_speed(model.path), 600.0, {}, room)
    assert plan["commits"]["test"] == len({example.commit for example in examples.test})
    assert plan["examples"] == {"train": 120, "dev": len(examples.dev), "test": len(examples.test)}
    assert not plan["evaluation"]["enough"]
    text = describe(plan)
    assert "Too little data for the verdict" in text
    assert "1 no code" in text
    assert "GB in int8 on a CPU; 24.0 GB are free: the base model would be held in float32" in text
