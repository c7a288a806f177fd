"""Guesses: where they come from, when they are worth it, and that they change no token."""

from __future__ import annotations

import pytest
import tiny
import torch

from midfill.engine.loading import load
from midfill.engine.speculation import NgramProposer

TEXT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def cheap() -> NgramProposer:
    """Wider passes cost nothing more, so as much as possible is guessed."""
    proposer = NgramProposer()
    for num_tokens in range(1, 9):
        proposer.record_duration(num_tokens, 0.01)
    return proposer


def test_what_followed_the_same_tokens_is_guessed():
    proposer = cheap()
    proposer.learn(TEXT)
    assert proposer.propose([50, 2, 3, 4]) == ([5, 6, 7, 8, 9, 10, 11], 3)
    assert proposer.propose([50, 51, 9, 10]) == ([11, 12], 2)
    assert proposer.propose([50, 51, 52]) == ([], 0)
    assert proposer.propose([]) == ([], 0)


def test_the_newest_continuation_counts():
    proposer = cheap()
    proposer.learn(TEXT)
    proposer.learn([20, 2, 3, 4, 30, 31])
    assert proposer.propose([2, 3, 4])[0] == [30, 31]


def test_what_is_learned_later_continues_what_came_before():
    proposer = cheap()
    proposer.learn(TEXT[:6])
    proposer.learn(TEXT, 6)
    assert proposer.propose([4, 5, 6])[0] == [7, 8, 9, 10, 11, 12]


def test_texts_that_were_learned_apart_do_not_follow_each_other():
    proposer = cheap()
    proposer.learn([1, 2, 3])
    proposer.learn([4, 5, 6])
    assert proposer.propose([1, 2, 3]) == ([], 0)
    assert proposer.propose([40, 1, 2])[0] == [3]


def test_the_end_of_a_text_does_not_hide_an_older_continuation():
    proposer = cheap()
    proposer.learn(TEXT)
    proposer.learn([60, 3, 4, 5])
    assert proposer.propose([3, 4, 5])[0] == [6, 7, 8, 9, 10, 11, 12]


def test_wrong_guesses_end_the_guessing_and_a_while_later_it_is_tried_again():
    proposer = NgramProposer()
    for num_tokens in range(1, 9):
        proposer.record_duration(num_tokens, 0.01 * (1 + 0.3 * (num_tokens - 1)))
    proposer.learn(TEXT)
    tail = [3, 4, 5]
    assert proposer.propose(tail)[0]
    for _ in range(20):
        proposer.record_acceptance(3, 4, 0)
        proposer.record_acceptance(2, 4, 0)
    assert proposer.propose(tail) == ([], 0)
    attempts = 0
    while not proposer.propose(tail)[0]:
        attempts += 1
        assert attempts < 200
    assert attempts > 5


def test_where_wider_passes_cost_too_much_nothing_is_guessed():
    proposer = NgramProposer()
    for num_tokens in range(1, 9):
        proposer.record_duration(num_tokens, 0.01 * num_tokens)
    proposer.learn(TEXT)
    assert proposer.propose([3, 4, 5]) == ([], 0)


def test_memory_is_bounded():
    proposer = cheap()
    for start in range(0, 400_000, 4000):
        proposer.learn(list(range(start, start + 4000)))
    assert len(proposer._log) < 75_000
    assert len(proposer._followers) < 150_000


@pytest.mark.parametrize("runner", ["torch", pytest.param("openvino", marks=pytest.mark.slow), "llamacpp"])
async def test_guesses_change_no_token_and_save_passes(tmp_path, runner):
    model = tiny.write_model("llama", tmp_path / "model")
    reference = tiny.reference(model.path)
    model = tiny.as_gguf(model) if runner == "llamacpp" else model
    sizes: list[tuple[int, int]] = []  # tokens and right guesses of each pass

    def load_counting(spec, progress):
        loaded = load(spec, progress)
        forward = loaded.runner.forward

        def counting(chunks, allowed, interrupted):
            choices = forward(chunks, allowed, interrupted)
            sizes.extend(
                (chunk.num_draft_tokens, len(chosen) - 1)
                for chunk, chosen in zip(chunks, choices, strict=True)
                if chunk.samples
            )
            return choices

        loaded.runner.forward = counting
        return loaded

    generator = torch.Generator().manual_seed(11)
    async with tiny.running(model, runner=runner, load_model=load_counting) as engine:
        # A pass over eight tokens of a tiny model takes as long as one over one.
        control = engine.model.tokenizer.control_ids
        for _ in range(4):
            ids = tiny.random_ids(generator, 60)
            expected = tiny.oracle(reference, ids, 40, control)
            # The same again, and with a few tokens of the output typed: all of it was seen before.
            assert await tiny.collect_ids(engine, ids, 40) == expected
            assert await tiny.collect_ids(engine, ids, 40) == expected
            typed = [*ids, *expected[:5]]
            assert await tiny.collect_ids(engine, typed, 35) == tiny.oracle(reference, typed, 35, control)
            # Something else that looks alike, so that guesses are wrong.
            ids = ids[:-1] + tiny.random_ids(generator, 1)
            assert await tiny.collect_ids(engine, ids, 40) == tiny.oracle(reference, ids, 40, control)
    assert sum(right for _, right in sizes) > 40
    assert any(right < guesses for guesses, right in sizes)
