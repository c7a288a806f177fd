"""The model itself: keys and values in slots, the forward pass, the choice of a token.

Models are transformers' own modules with our cache, so that every architecture with plain attention works.
Chunks of a step are computed one after another. Knows tensors, slot numbers and token ids;
nothing of threads, requests or text. Runs on the engine thread only.
"""

from __future__ import annotations

import inspect
import time
from array import array
from typing import Any

import torch
from transformers.cache_utils import Cache

from midfill.engine.cores import FreeCores
from midfill.engine.loading import memory_errors
from midfill.engine.scheduler import Choice, Chunk, Sequence

_BLOCK_TOKENS = 256
"""The memory of a slot grows in blocks of this many tokens."""


class SlotCache(Cache):  # type: ignore[misc]  # transformers has no types that strict mode can use
    """Keys and values of one sequence, in the form that transformers' modules ask for.

    `length` is set by the runner: entries from there on are written by the next forward pass, wherever
    an earlier one had got to. So cutting the past is an assignment, and a failed pass leaves no trace.
    """

    def __init__(self, num_layers: int, context: int) -> None:
        super().__init__(layers=[])
        self.length = 0
        self._context = context
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers
        self._flags = [False] * num_layers

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ARG002 - some architectures pass more; plain attention needs none of it
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new entries (1 x heads x tokens x width) in place; returns views of all so far."""
        start = self.length
        end = start + key_states.shape[2]
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if keys is None or values is None or keys.shape[2] < end:
            keys = self._keys[layer_idx] = self._grown(keys, key_states, end)
            values = self._values[layer_idx] = self._grown(values, value_states, end)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def copy_from(self, other: SlotCache, length: int) -> None:
        """Take over the first `length` entries of another slot."""
        for ours, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for layer, source in enumerate(theirs):
                if source is None:
                    raise AssertionError("a slot with computed tokens has entries in every layer")
                target = ours[layer]
                if target is None or target.shape[2] < length:
                    target = ours[layer] = self._grown(None, source, length)
                target[:, :, :length] = source[:, :, :length]

    def _grown(self, old: torch.Tensor | None, like: torch.Tensor, length: int) -> torch.Tensor:
        capacity = min(-(-length // _BLOCK_TOKENS) * _BLOCK_TOKENS, max(self._context, length))
        batch, heads, _, width = like.shape
        grown = like.new_empty((batch, heads, capacity, width))
        if old is not None:
            grown[:, :, : self.length] = old[:, :, : self.length]
        return grown

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - the same for all layers
        """How many tokens precede the ones being computed."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        """Length and offset of the keys to mask. Sliding layers keep all; the mask hides the old ones."""
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """The most tokens it can hold."""
        return self._context

    def __len__(self) -> int:
        return len(self._flags)

    # The base class answers these from its list of layers; ours has none that differ.
    is_compileable = False
    is_croppable = False
    is_initialized = True

    @property
    def is_sliding(self) -> list[bool]:
        """No layer forgets old entries."""
        return self._flags

    @property
    def is_linear(self) -> list[bool]:
        """No layer keeps a recurrent state."""
        return self._flags

    @property
    def is_dummy(self) -> list[bool]:
        """Every layer has entries of its own."""
        return self._flags


class Runner:
    """One model on one device.

    Attributes:
        architecture: transformers' `model_type`.
        context: the most tokens of one sequence.
        vocab_size: the number of logits.
        device: for the user, for example "cpu".
        dtype: "int8", "float32" or "bfloat16".
    """

    def __init__(self, model: Any, dtype: str, device: torch.device, cores: FreeCores | None = None) -> None:
        """Take over a loaded model; `cores` chooses the threads of each pass, if they are to change."""
        config = model.config.get_text_config()
        self._model = model
        self._trunk = model.base_model
        # transformers renamed the argument in 5.24 and warns of the old name.
        parameters = inspect.signature(model.forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._device = device
        self._num_layers: int = config.num_hidden_layers
        self._caches: dict[int, SlotCache] = {}
        self.architecture: str = model.config.model_type
        self.context: int = config.max_position_embeddings
        self.vocab_size: int = config.vocab_size
        self.device = str(device)
        self.dtype = dtype
        self._cores = cores
        self._positions = torch.arange(self.context, device=device)[None]

    def forward(self, chunks: list[Chunk], allowed: list[array[int] | None]) -> list[Choice | None]:
        """Compute the chunks of one step.

        Args:
            chunks: what the scheduler planned; no two of the same sequence.
            allowed: for each chunk the ids to choose from, or None for all.

        Returns:
            For each chunk the most likely next token if it `samples`, else None.

        Raises:
            MemoryError: there is not enough memory, on whatever device.
        """
        self._choose_threads()
        with memory_errors(), torch.inference_mode():
            for chunk in chunks:
                if chunk.copy_from is not None:
                    self._cache(chunk.slot).copy_from(self._cache(chunk.copy_from), chunk.start)
            return [self._compute(chunk, ids) for chunk, ids in zip(chunks, allowed, strict=True)]

    def warm_up(self, num_tokens: int) -> None:
        """Run a chunk of this size and a single token: the first passes are slow, whoever waits for them."""
        prompt = Sequence(key=None, tokens=[0] * num_tokens)
        self.forward([Chunk(prompt, 0, 0, prompt.tokens, samples=True)], [None])
        self.forward([Chunk(prompt, 0, num_tokens, [0], samples=True)], [None])
        self.drop([0])

    def _choose_threads(self) -> None:
        if self._cores is None:
            return
        before = self._cores.count
        count = self._cores.update(time.monotonic())
        if count != before:
            torch.set_num_threads(count)

    def drop(self, slots: list[int]) -> None:
        """Free the memory of these slots."""
        for slot in slots:
            self._caches.pop(slot, None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _cache(self, slot: int) -> SlotCache:
        cache = self._caches.get(slot)
        if cache is None:
            cache = self._caches[slot] = SlotCache(self._num_layers, self.context)
        return cache

    def _compute(self, chunk: Chunk, allowed: array[int] | None) -> Choice | None:
        cache = self._cache(chunk.slot)
        cache.length = chunk.start
        # Without a choice to make, the head (a third of a small model) is left out.
        module = self._model if chunk.samples else self._trunk
        kwargs: dict[str, Any] = {"logits_to_keep": 1} if chunk.samples else {}
        kwargs[self._cache_argument] = cache
        output = module(
            input_ids=torch.tensor([chunk.tokens], device=self._device),
            position_ids=self._positions[:, chunk.start : chunk.start + len(chunk.tokens)],
            use_cache=True,
            **kwargs,
        )
        return _choose(output.logits[0, -1].float(), allowed) if chunk.samples else None


def _choose(logits: torch.Tensor, allowed: array[int] | None) -> Choice:
    """The greedy choice among the allowed ids; the log-probability is that among all."""
    if allowed is None:
        token = logits.argmax()
    else:
        ids = torch.frombuffer(allowed, dtype=torch.int64).to(logits.device)
        token = ids[logits[ids].argmax()]
    logprob = logits[token] - logits.logsumexp(dim=0)
    return Choice(int(token), float(logprob))
