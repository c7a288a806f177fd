import math

import pytest

from midfill.engine.api import ModelInfo, Token
from midfill.engine.scripted import CharTokenizer
from midfill.errors import ModelError
from midfill.fim.probing import HOLES, examine, identify, probe
from midfill.fim.templates import FAMILIES, Layout

ROW = FAMILIES["qwen2.5-coder"]
PRE, SUF, MID = ROW.prefix, ROW.suffix, ROW.middle


class Trained:
    """A model of arithmetic: it finds the middle likely after prompts of the orders that it was trained on.

    An engine of the contract, as far as a probe goes; likelihoods per character are fixed.
    """

    def __init__(self, *orders, name="unknown", family=None):
        self._orders = orders
        self.model = ModelInfo(name, family, "bloom", 4096, CharTokenizer(), "cpu", "float32")

    async def start(self, progress):
        pass

    async def close(self):
        pass

    async def generate(self, request):
        prompt = self.model.tokenizer.decode(request.tokens)
        logprob = -0.1 if any(self._fits(prompt, order) for order in self._orders) else -1.0
        for char in request.forced_prefix:
            yield Token(ord(char), char, logprob)

    def _fits(self, prompt, order):
        return any(
            prompt
            == {
                Layout.PSM: f"{PRE}{before}{SUF}{after}{MID}",
                Layout.SPM: f"{SUF}{after}{PRE}{before}{MID}",
                Layout.APPENDING: f"{PRE}{SUF}{after}{MID}{before}",
            }[order]
            for before, _, after in HOLES
        )


async def test_a_probe_finds_the_order_that_a_model_was_trained_on():
    found = await probe(Trained(Layout.SPM), ROW)
    assert found.scores == pytest.approx({Layout.PSM: -1.0, Layout.SPM: -0.1, Layout.APPENDING: -1.0})
    assert found.alone == pytest.approx(-1.0)
    assert (found.best, found.understood, found.agrees(ROW)) == (Layout.SPM, True, False)
    assert (await probe(Trained(Layout.PSM), ROW)).agrees(ROW)


async def test_the_appending_order_alone_proves_no_training():
    # Any model of text goes on from "suffix, prefix".
    found = await probe(Trained(Layout.APPENDING), ROW)
    assert not found.understood


@pytest.mark.parametrize(
    ("order", "layouts"),
    [(Layout.PSM, (Layout.ANCHORED, Layout.PSM)), (Layout.SPM, (Layout.SPM,))],
)
async def test_a_model_that_fits_no_family_is_used_in_the_order_that_it_knows(order, layouts):
    name, family = await identify(Trained(order))
    assert name == "qwen2.5-coder (probed)"
    assert (family.prefix, family.layouts, family.cross_file) == (PRE, layouts, None)


async def test_a_model_that_knows_no_order_is_refused_with_the_list():
    with pytest.raises(ModelError, match=r"not known: the model fits none.*starcoder"):
        await identify(Trained())


async def test_what_is_named_is_not_probed():
    assert await identify(Trained(), "qwen2.5-coder") == ("qwen2.5-coder", ROW)
    with pytest.raises(ModelError, match="does not fit"):
        await identify(Trained(Layout.PSM), "starcoder")
    with pytest.raises(ModelError, match="does not fit"):
        await identify(Trained(Layout.PSM, family="starcoder"))


async def test_a_middle_that_the_model_cannot_write_scores_nothing():
    class Silent(Trained):
        async def generate(self, request):
            assert request.forced_prefix
            return
            yield

    found = await probe(Silent(Layout.PSM), ROW)
    assert found.scores[Layout.PSM] == -math.inf
    assert not found.understood


async def test_the_table_is_held_against_vocabularies_and_models():
    reports = []
    result = await examine(
        {"chars": CharTokenizer()},
        {"good": lambda: Trained(Layout.PSM, family="qwen2.5-coder"), "bad": Trained},
        lambda _message, share: reports.append(share),
    )
    assert result["vocabularies"] == {"chars": ["qwen2.5-coder", "qwen3-coder"]}
    assert set(result["families"]) == set(FAMILIES)
    ids = result["families"]["qwen2.5-coder"]["vocabularies"]["chars"]["sentinels"]
    assert ids == {PRE: 0x110000, SUF: 0x110001, MID: 0x110002}
    assert result["models"]["good"]["agrees"]
    assert "not known" in result["models"]["bad"]["error"]
    assert reports == [0, 0.5]


def test_every_hole_needs_its_suffix():
    # What identifies the middle must stand in the suffix and nowhere in the prefix.
    for before, truth, after in HOLES:
        words = {word.strip("[];:()=.") for word in truth.split()} - {""}
        assert any(word in after and word not in before for word in words)
        assert before.endswith("\n")
        assert after.startswith("\n")
