"""Expressions of adapters mean what `re` says, and none of them takes long."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from planted_adapters import write_adapter

from midfill.adapters import format as peft_format
from midfill.adapters.patterns import PatternError, ends, fullmatch
from midfill.errors import AdapterError

NAME = "model.layers.10.self_attn.q_proj"

# From PEFT's documentation, its tests, and what people share.
IN_USE = [
    r".*\.(q_proj|v_proj)",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"model\.layers\.\d+\.self_attn\.(q_proj|k_proj)$",
    r"^model\.layers\.(1[0-9]|2[0-7])\.(?:self_attn|mlp)\.\w+_proj",
    r"(?!.*lm_head).*proj",
    r".*\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:k|v|q|o)_proj)",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}"
    r"\.(?:self_attn|mlp)\.(?:(?:k_proj|v_proj|q_proj)))",
]

# Each doubles its time in `re` with every character or two.
ENDLESS = [
    "(.|.)?" * 18 + "!",
    "(.|.)" * 25 + "!",
    ".?" * 60 + "." * 60 + "!",
    ".*" * 100 + "!",
    "(?:a|b|ab|.)" * 30 + "!",
    "(.|..|...){30}!",
    "(?:|a|.){1000}!",
    ".{0,1000}" * 40 + "!",
    "(?=.*.*.*.*.*!)" * 10,
    "[^!]*" * 100 + "!",
]

PARTS = st.sampled_from(
    [
        *"ab.x",
        r"\.",
        r"\d",
        r"\w",
        "[ab]",
        "[^a.]",
        "[a-c]",
        r"\b",
        "^",
        "$",
        "(?:a|b)",
        "(a|ab)",
        "(?!a)",
        "(?=.b)",
    ]
)
REPEATED = st.builds(
    "".join, st.tuples(PARTS, st.sampled_from(["", "", "", "*", "+", "?", "*?", "{2}", "{1,3}", "{2,}"]))
)
PATTERNS = st.recursive(
    st.lists(REPEATED, min_size=1, max_size=5).map("".join),
    lambda inner: st.lists(inner, min_size=2, max_size=3).map(lambda found: f"({'|'.join(found)})"),
    max_leaves=4,
)


@given(pattern=PATTERNS, name=st.text("abx.1", max_size=9))
def test_an_expression_means_what_re_says(pattern, name):
    try:
        ours = fullmatch(pattern, name)
    except PatternError:
        assume(False)
    try:
        theirs = re.fullmatch(pattern, name) is not None
    except re.error:
        assume(False)
    assert ours == theirs


@pytest.mark.fuzz
@given(pattern=st.one_of(st.text(max_size=40), st.text("ab.*+?()[]{}|^$\\,1d", max_size=40)))
def test_what_is_no_expression_is_refused(pattern):
    try:
        ours = fullmatch(pattern, NAME)
        theirs = re.fullmatch(pattern, NAME) is not None
    except (PatternError, re.error, FutureWarning):
        # What `re` refuses, or warns of, may mean anything.
        return
    assert ours == theirs


@pytest.mark.parametrize("pattern", IN_USE)
def test_expressions_that_people_use_are_understood(pattern):
    names = [
        NAME,
        "lm_head",
        "model.layers.2.mlp.up_proj",
        "decoder.block.0.SelfAttention.q",
        "text.self_attn.q_proj",
    ]
    for name in names:
        assert fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None)
    assert any(fullmatch(pattern, name) for name in names)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_no_expression_takes_long(pattern):
    name = "model.layers." + "a" * 450
    try:
        ends(pattern, name, [0, 1, 2])
    except PatternError as error:
        assert "list the modules instead" in str(error)


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"])
def test_an_adapter_with_an_endless_expression_is_refused(tmp_path, pattern, option):
    layers = {f"model.layers.{number}.self_attn.q_proj": (8, 8) for number in range(4)}
    choice = {option: {pattern: 4} if option == "rank_pattern" else pattern}
    if option == "layers_pattern":
        choice |= {"layers_to_transform": [1]}
    folder = write_adapter(tmp_path / "a", **choice)
    try:
        peft_format.read(folder, layers)
    except AdapterError as error:
        assert str(folder) in str(error)


def test_many_patterns_and_targets_are_refused_or_quick(tmp_path):
    layers = {f"model.layers.{number}.self_attn.q_proj": (8, 8) for number in range(400)}
    many = [f"no_{number}" for number in range(60_000)]
    for choice in (
        {"target_modules": many},
        {"exclude_modules": many},
        {"layers_to_transform": list(range(10**5))},
        {"rank_pattern": dict.fromkeys(many[:40_000], 4)},
        {"rank_pattern": {f"{name}.*": 4 for name in many[:200]}},
        {"layers_pattern": many, "layers_to_transform": [1]},
    ):
        with pytest.raises(AdapterError):
            peft_format.read(write_adapter(tmp_path / str(len(list(tmp_path.iterdir()))), **choice), layers)
