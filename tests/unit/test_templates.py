import dataclasses

import pytest

from midfill.completion.prompt import PromptBuilder
from midfill.engine.api import ModelInfo
from midfill.engine.scripted import CharTokenizer
from midfill.errors import ModelError
from midfill.fim.templates import FAMILIES, Layout, check_family, problems, recognise_family
from midfill.models import catalogue
from midfill.settings import Settings

MODEL = ModelInfo("m", "qwen2.5-coder", "qwen2", 4096, CharTokenizer(), "cpu", "float32")

# Which real vocabulary has the sentinels of which families.
VOCABULARIES = {
    # The file of this name is StarCoder2's; StarCoder's own is that of Refact.
    "starcoder": {"starcoder2", "refact", "granite-code", "stable-code"},
    "refact": {"starcoder", "refact", "granite-code", "stable-code", "mellum"},
    "deepseek-coder": {"deepseek-coder"},
    "qwen2.5-coder": {"qwen2.5-coder", "qwen3-coder"},
    "qwen2": set(),
    "llama-spm": set(),
    "gpt-2": set(),
}


class Names(CharTokenizer):
    """A vocabulary with nothing but control tokens of these names."""

    def __init__(self, *names, ordinary=(), same=()):
        self._names = dict.fromkeys(same, 1) | {
            name: 2 + at for at, name in enumerate(dict.fromkeys((*names, *ordinary))) if name not in same
        }
        self._ordinary = ordinary

    def token_id(self, name):
        return self._names.get(name)

    @property
    def control_ids(self):
        return frozenset(token for name, token in self._names.items() if name not in self._ordinary)


def names_of(family):
    return (*family.sentinels, *family.file_marks, family.stops[0])


def test_an_unknown_family_is_refused_with_the_list():
    with pytest.raises(ModelError, match=r"Unknown FIM family 'gpt-9'.*qwen2\.5-coder"):
        recognise_family(MODEL, "gpt-9")


def test_a_family_whose_sentinels_the_vocabulary_lacks_is_refused():
    with pytest.raises(ModelError, match="<fim_prefix>"):
        recognise_family(MODEL, "starcoder")


def test_a_model_is_recognised_by_sentinels_and_architecture():
    assert recognise_family(dataclasses.replace(MODEL, family=None))[0] == "qwen2.5-coder"


def test_a_model_that_fits_no_family_is_refused():
    with pytest.raises(ModelError, match=r"not known: the model fits none.*set `family"):
        recognise_family(dataclasses.replace(MODEL, family=None, architecture="bloom"))


def test_families_that_share_sentinels_are_told_apart_by_name():
    shared = Names("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<filename>", "<|endoftext|>")
    model = dataclasses.replace(MODEL, family=None, architecture="llama", tokenizer=shared)
    for name in ("refact", "mellum"):
        assert recognise_family(dataclasses.replace(model, name=f"me/{name}-1b"))[0] == name
    with pytest.raises(ModelError, match="not known"):
        recognise_family(dataclasses.replace(model, name="me/other-1b"))
    big = dataclasses.replace(model, architecture="gpt_bigcode", name="ibm-granite/granite-20b-code-base")
    assert recognise_family(big)[0] == "granite-code"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_fits_a_vocabulary_that_has_its_names(name):
    family = FAMILIES[name]
    assert problems(family, Names(*names_of(family))) == []
    for missing in names_of(family):
        others = [other for other in names_of(family) if other != missing]
        assert missing in " ".join(problems(family, Names(*others)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sentinel_that_is_the_end_of_text_is_refused(name):
    # As in vocabularies whose unknown token is the end of text: a missing sentinel would end the prompt.
    family = FAMILIES[name]
    names = names_of(family)
    same = Names(*names, same=(family.suffix, family.stops[0]))
    with pytest.raises(ModelError, match=r"same token|end-of-text"):
        check_family(name, family, same)


def test_a_sentinel_that_text_can_become_is_refused():
    family = FAMILIES["starcoder"]
    with pytest.raises(ModelError, match="ordinary text"):
        check_family("starcoder", family, Names(*names_of(family), ordinary=("<fim_middle>",)))


@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_vocabularies_fit_their_families_and_no_others(vocabulary, name):
    tokenizer = vocabulary(name)
    assert {family for family, row in FAMILIES.items() if not problems(row, tokenizer)} == VOCABULARIES[name]


def test_every_family_of_the_catalogue_is_in_the_table():
    assert {entry.family for entry in catalogue.entries().values()} <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_row_makes_sense(family):
    assert len(set(family.sentinels)) == len(family.sentinels) == 2 + bool(family.middle) + bool(family.bos)
    assert family.layouts
    if not family.middle:
        assert family.layouts == (Layout.SPM,)
    for layout in family.layouts:
        parts = [name for _, name in family.parts(layout)]
        assert sorted(parts) == sorted((*family.sentinels, "head", "typed", "tail"))
        assert parts.index("head") < parts.index("typed")


def test_a_layout_that_the_family_does_not_know_is_refused():
    with pytest.raises(
        ModelError, match=r"'qwen2\.5-coder' does not support the prompt layout 'spm'.*anchored"
    ):
        PromptBuilder(MODEL, Settings(layout="spm"))


def test_marks_that_text_may_hold_are_not_cut_from_answers():
    assert "<s>" not in FAMILIES["codellama"].never_text
    assert "</s>" not in FAMILIES["codestral"].never_text
    assert {"<|fim_prefix|>", "<|fim_middle|>", "<|endoftext|>"} <= set(FAMILIES["qwen2.5-coder"].never_text)
