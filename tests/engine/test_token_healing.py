from __future__ import annotations

import pytest
import tiny

from midfill.engine.token_healing import TokenIndex

VOCAB = [b"", b"a", b"ab", b"abc", b"b", b"\xff", b"\xff\xff", b"<eot>", b"ab"]


@pytest.mark.parametrize(
    ("demanded", "pieces"),
    [
        (b"a", {b"a", b"ab", b"abc"}),
        (b"ab", {b"a", b"ab", b"abc"}),
        (b"abcd", {b"a", b"ab", b"abc"}),
        (b"bx", {b"b"}),
        (b"\xff", {b"\xff", b"\xff\xff"}),
        (b"z", set()),
    ],
)
def test_tokens_that_agree(demanded, pieces):
    index = TokenIndex(VOCAB, frozenset({7}))
    allowed = index.allowed(demanded)
    assert sorted(allowed) == [i for i, piece in enumerate(VOCAB) if piece in pieces]


def test_control_tokens_never_agree():
    assert list(TokenIndex(VOCAB, frozenset({7})).allowed(b"<")) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model("qwen2", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("demanded", ["d", "def", "return x", "  in", "\n\n", "ä€", "deprecated"])
async def test_the_output_begins_with_what_is_demanded(model, demanded):
    async with tiny.running(model) as engine:
        tokens = await tiny.collect(engine, [3, 1, 4], 24, forced_prefix=demanded)
    text = "".join(token.text for token in tokens)
    assert text.startswith(demanded)
    assert len(tokens) > 1


async def test_the_choice_is_the_most_likely_token_that_agrees(model):
    reference = tiny.reference(model.path)
    ids = [3, 1, 4]
    async with tiny.running(model) as engine:
        tokenizer = engine.model.tokenizer
        pieces = tokenizer.vocab_bytes()
        [token] = await tiny.collect(engine, ids, 1, forced_prefix="def")
    with tiny.torch.inference_mode():
        logprobs = reference(tiny.torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    agreeing = [i for i, piece in enumerate(pieces) if piece in {b"d", b"de", b"def"}]
    best = max(agreeing, key=lambda i: logprobs[i])
    assert token.id == best
    assert token.logprob == pytest.approx(float(logprobs[best]), abs=1e-4)
    assert token.logprob < float(logprobs.max())


async def test_a_demand_that_the_model_meets_anyway_changes_nothing(model):
    async with tiny.running(model) as engine:
        pieces = engine.model.tokenizer.vocab_bytes()
        for start in range(50):  # some prompt is answered with a whole character
            free = await tiny.collect(engine, [start, 20, 30], 8)
            piece = pieces[free[0].id] if free else b""
            if piece and piece.isascii():
                break
        healed = await tiny.collect(engine, [start, 20, 30], 8, forced_prefix=piece.decode())
    assert [token.id for token in healed] == [token.id for token in free]
