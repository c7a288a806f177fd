"""A runner step by step, without the engine around it, and a device that calls instead of replaying."""

from __future__ import annotations

import tiny
import torch

from midfill.engine.scheduler import Chunk, SequenceState


class Recorder:
    """A device that calls instead of replaying. Copies are made at once, as a stream would in its order."""

    def __init__(self):
        self.num_replays = 0
        self.waits = []
        self.error = None
        self.num_errors = 0  # replays that fail
        self.room = 1000

    def capture(self, run):
        run()
        self.room -= 1

        def replay():
            if self.num_errors:
                self.num_errors -= 1
                raise self.error
            self.num_replays += 1
            with torch.inference_mode():
                run()

        return replay

    def fetch(self, tensor, *, sleeps):
        self.sleeps = sleeps
        return Fetched(self, tensor.tolist(), self.num_replays)

    def has_room(self):
        return self.room > 0


class Fetched:
    def __init__(self, recorder, values, number):
        self.recorder, self.values, self.number = recorder, values, number

    def wait(self):
        # How many passes were launched after this one before anybody looked at it.
        self.recorder.waits.append(self.recorder.num_replays - self.number)
        return self.values


class Sequences:
    """Sequences in slots of a runner, as the scheduler would run them."""

    def __init__(self, runner, prompts):
        self.runner = runner
        self.tokens = dict(enumerate(map(list, prompts)))
        self.computed = dict.fromkeys(self.tokens, 0)
        self.logprobs = {slot: [] for slot in self.tokens}

    def step(self, slots, most=512, allowed=None):
        chunks = []
        for slot in slots:
            start, tokens = self.computed[slot], self.tokens[slot]
            end = min(len(tokens), start + most)
            chunks.append(
                Chunk(SequenceState(None, tokens), slot, start, tokens[start:end], end == len(tokens))
            )
        found = self.runner.forward(chunks, allowed or [None] * len(chunks))
        choices = [chosen[0] if chosen else None for chosen in found]
        for chunk, choice in zip(chunks, choices, strict=True):
            self.computed[chunk.slot] += len(chunk.tokens)
            if choice is not None:
                self.tokens[chunk.slot].append(choice.id)
                self.logprobs[chunk.slot].append(choice.logprob)
        return choices


def prompts(seed, *lengths):
    generator = torch.Generator().manual_seed(seed)
    return [tiny.random_ids(generator, length) for length in lengths]


def expected(path, prompt, num_tokens):
    return [*prompt, *tiny.oracle(tiny.reference(path), prompt, num_tokens, frozenset())]
