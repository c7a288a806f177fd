"""The device of the tests for GPUs: the real one, or an emulated one where torch sees none."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch
from emulated_cuda import emulated

_SMALL = {
    "qwen2": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    },
    "gpt_bigcode": {"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 1024},
}


@dataclass(frozen=True)
class Gpu:
    """Where the tests run. On the emulated device models and prompts are small, for the sake of time."""

    emulated: bool
    device = torch.device("cuda", 0)

    @property
    def name(self):
        return torch.cuda.get_device_name(0)

    def length(self, num_tokens):
        return max(1, num_tokens // 16) if self.emulated else num_tokens

    def rounds(self, count):
        return min(count, 3) if self.emulated else count

    def seconds(self, limit_s):
        return min(limit_s, 2.0) if self.emulated else limit_s

    def changes(self, kind):
        """What to change in the configuration of a known shape."""
        return self.small(kind) if self.emulated else {}

    def small(self, kind):
        return {**_SMALL[kind], "vocab_size": 600}


@pytest.fixture(scope="module")
def gpu():
    with ExitStack() as stack:
        missing = not torch.cuda.is_available()
        if missing:
            stack.enter_context(emulated())
        yield Gpu(missing)
