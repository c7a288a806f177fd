"""Passes of a runner, and what transformers chooses after the same tokens."""

from __future__ import annotations

import tiny
import torch

from midfill.engine.scheduler import Chunk, SequenceState


def prompts(seed, *lengths):
    generator = torch.Generator().manual_seed(seed)
    return [tiny.random_ids(generator, length) for length in lengths]


def expected(model, ids):
    [token] = tiny.oracle(tiny.reference(model.path), ids, 1, frozenset())
    return token


def chunk(ids, slot, start=0, **options):
    return Chunk(SequenceState(None, ids), slot, start, ids[start:], samples=True, **options)


def chosen(choices):
    return [choice.id for [choice] in choices]


def check_that_sequences_of_one_pass_do_not_see_each_other(model, runner, lengths, rewound):
    """Compute three prompts of these lengths; then one goes on, the last is rewound, the other stays out."""
    one, two, three = prompts(1, *lengths)
    pass_ = [chunk(one, 0), chunk(two, 1), chunk(three, 2)]
    assert chosen(runner.forward(pass_, [None] * 3)) == [expected(model, ids) for ids in (one, two, three)]
    longer, shorter = [*one, 7], [*three[:rewound], 9]
    found = runner.forward([chunk(shorter, 2, rewound), chunk(longer, 0, len(one))], [None] * 2)
    assert chosen(found) == [expected(model, shorter), expected(model, longer)]


def check_that_a_part_of_a_prompt_chooses_nothing(model, runner):
    """Compute the first tokens of a prompt without a choice, then the others."""
    [ids] = prompts(2, 50)
    part = Chunk(SequenceState(None, ids), 0, 0, ids[:30], samples=False)
    assert runner.forward([part], [None]) == [[]]
    assert chosen(runner.forward([chunk(ids, 0, 30)], [None])) == [expected(model, ids)]
