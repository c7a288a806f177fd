"""An engine whose steps take what they are said to: the real thread, scheduler and slots, no model.

It runs in a time of its own (`clock`). Tokens are bytes. What it writes goes round in a text of its own, from
a place that the prompt's length tells, so that lines end after different numbers of tokens.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from midfill.engine.adapters.loaded import LoadedAdapters
from midfill.engine.api import EngineSpec, ModelInfo
from midfill.engine.kv_slots import NUM_SLOTS
from midfill.engine.loading import LoadedModel
from midfill.engine.local import LocalEngine
from midfill.engine.scheduler import Choice
from midfill.engine.token_healing import TokenIndex

SENTINELS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>")
SENTINELS += ("<|repo_name|>", "<|file_sep|>", "<|fim_pad|>", "<|cursor|>")
TEXT = b"w * h\nreturn\nwidth = 1\n"


class Bytes:
    """A tokenizer: one token for each byte."""

    control_ids = frozenset(range(256, 256 + len(SENTINELS)))

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(id_ for id_ in ids if id_ < 256).decode(errors="replace")

    def token_id(self, name):
        if name in SENTINELS:
            return 256 + SENTINELS.index(name)
        return name.encode()[0] if len(name.encode()) == 1 else None

    def vocab_bytes(self):
        return [bytes([id_]) for id_ in range(256)] + [b""] * len(SENTINELS)

    def stream(self):
        return self

    def push(self, token):
        return chr(token) if token < 128 else ""


class PacedRunner:
    """A `runner.Runner`.

    A step takes `step_s`, `sequence_s` for each further request, `token_s` for each further token of one. It
    is computed in six parts, and may be left between two of them.
    """

    context, max_draft_tokens, step_sequences, num_parts = 4096, 0, NUM_SLOTS, 6
    vocab_size = 256 + len(SENTINELS)

    def __init__(self, clock, step_s, sequence_s, token_s, chunk_tokens):
        self.clock = clock
        self.step_s, self.sequence_s, self.token_s, self.chunk_tokens = (
            step_s,
            sequence_s,
            token_s,
            chunk_tokens,
        )
        self._left = None

    def forward(self, chunks, allowed, interrupted):
        tokens = sum(len(chunk.tokens) for chunk in chunks) - len(chunks)
        choices = []
        for chunk, ids in zip(chunks, allowed, strict=True):
            end = chunk.start + len(chunk.tokens)
            token = TEXT[end % len(TEXT)] if ids is None else ids[0]
            choices.append([Choice(token, -0.01)] if chunk.samples else [])
        seconds = self.step_s + self.sequence_s * (len(chunks) - 1) + self.token_s * tokens
        this = [(chunk.slot, chunk.start, list(chunk.tokens)) for chunk in chunks]
        left, self._left = self._left, None
        first = left[1] if left is not None and left[0] == this else 0
        for part in range(first, self.num_parts):
            if part > first and interrupted():
                self._left = this, part
                return None
            self.clock.spend(seconds / self.num_parts)
        return choices

    def drop(self, _slots):
        self._left = None

    def prepare(self, _):
        return lambda: None

    def idle(self):
        return False


def engine(step_s=0.003, sequence_s=0.0006, token_s=0.0001, chunk_tokens=64):
    """A `LocalEngine` around it, as `midfill serve` would have one; for a test in `clock.in_its_own_time`."""
    clock = asyncio.get_running_loop().clock
    found = paced_engine(PacedRunner(clock, step_s, sequence_s, token_s, chunk_tokens))
    found._shared.mailbox = clock.mailbox
    return found


def paced_engine(runner):
    """A `LocalEngine` around a runner."""
    tokenizer = Bytes()

    def load(spec, progress):
        runner.clock.takes_part()
        info = ModelInfo("paced", "qwen2.5-coder", "qwen2", runner.context, tokenizer, "cpu", "paced")
        index = TokenIndex(tokenizer.vocab_bytes(), tokenizer.control_ids)
        return LoadedModel(info, runner, index, LoadedAdapters(runner, lambda: None, None), warm_up_s=1.0)

    class Model:
        name, path, family = "paced", Path("/nowhere"), "qwen2.5-coder"

    return LocalEngine(EngineSpec(Model()), load=load)
