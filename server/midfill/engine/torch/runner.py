"""The model itself: keys and values in slots, the forward pass, the choice of a token.

Models are transformers' own modules with our attention, so that every architecture with plain attention
works. The chunks of a step are computed in one pass: the projections see all their tokens as one row. Knows
tensors, slot numbers and token ids; nothing of threads, requests or text. Runs on the engine thread only.
"""

from __future__ import annotations

import inspect
import time
from array import array
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from midfill.adapters.format import Adapter
from midfill.engine.kv_slots import NUM_SLOTS
from midfill.engine.scheduler import Choice, Chunk, Sequence
from midfill.engine.torch import attention
from midfill.engine.torch import graph_shapes as graphs
from midfill.engine.torch.kv_cache import Entries, FixedMemory, GrowingMemory, Kernel, Memory, Span, Spans
from midfill.engine.torch.loading import memory_errors
from midfill.engine.torch.lora import Branches
from midfill.engine.torch.threads import FreeCores

if TYPE_CHECKING:
    from midfill.engine.torch.cuda_graphs import Device, Replays


_CHUNK_TOKENS = {"cpu": 64, "cuda": 512}
"""Tokens per forward pass, by kind of device."""


class Runner:
    """One model on one device.

    Attributes:
        architecture: transformers' `model_type`.
        context: the most tokens of one sequence.
        vocab_size: the number of logits.
        device: for the user, for example "cpu".
        dtype: "int8", "float32" or "bfloat16".
        chunk_tokens, step_sequences, max_guesses: see `loading.Runner`.
    """

    step_sequences = NUM_SLOTS

    def __init__(self, model: Any, dtype: str, device: torch.device, cores: FreeCores | None = None) -> None:
        """Take over a loaded model; `cores` chooses the threads of each pass, if they are to change.

        Raises `ModelError` if the model's attention is not one that can be replaced.
        """
        attention.use(model)
        config = model.config.get_text_config()
        self._model = model
        self._trunk = model.base_model
        # transformers renamed the argument in 5.24 and warns of the old name.
        parameters = inspect.signature(model.forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._device = device
        self.architecture: str = model.config.model_type
        self.context: int = config.max_position_embeddings
        self.vocab_size: int = config.vocab_size
        self.device = str(device)
        self.dtype = dtype
        self._cores = cores
        self.chunk_tokens = _CHUNK_TOKENS[device.type]
        self.max_guesses = graphs.MOST_GUESSES
        self._num_layers: int = config.num_hidden_layers
        self._num_heads: int = config.num_attention_heads
        self._memory: Memory = GrowingMemory(self._num_layers, self.context)
        self._branches = Branches(model, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        self._replays: Replays | None = None
        self._positions = torch.arange(self.context, device=device)

    def forward(
        self,
        chunks: list[Chunk],
        allowed: list[array[int] | None],
        interrupted: Callable[[], bool] | None = None,
    ) -> list[list[Choice]]:
        """Compute the chunks of one step; see `loading.Runner.forward`. A pass is run to its end."""
        del interrupted
        self._choose_threads()
        try:
            with memory_errors(), torch.inference_mode():
                self._copy(chunks)
                if self._replays is None:
                    return self._compute(chunks, allowed)
                return self._replay(self._replays, chunks, allowed)
        except MemoryError:
            if self._replays is not None:
                self._replays.drop()
            raise

    def _copy(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            if chunk.copy_from is not None:
                if self._replays is not None:
                    self._replays.forget()
                self._memory.copy(chunk.copy_from, chunk.slot, chunk.start)

    def _replay(
        self, replays: Replays, chunks: list[Chunk], allowed: list[array[int] | None]
    ) -> list[list[Choice]]:
        """Compute the chunks in captured passes where there are such."""
        choices: list[list[Choice]] = [[]] * len(chunks)
        groups = graphs.groups([len(chunk.tokens) for chunk in chunks])
        for group in groups:
            some = [chunks[i] for i in group]
            constraints = [allowed[i] for i in group]
            found = replays.compute(some, constraints, alone=len(groups) == 1)
            if found is None:
                found = self._compute(some, constraints)
            for i, chosen in zip(group, found, strict=True):
                choices[i] = chosen
        return choices

    def prepare(self, adapters: Mapping[str, Adapter]) -> Callable[[], None]:
        """See `loading.Runner.prepare`."""
        with memory_errors():
            put_in = self._branches.prepare(adapters)

        def install() -> None:
            if put_in() and self._replays is not None:
                self._replays.restart()

        return install

    def probe(self, tokens: list[int], key: str | None) -> npt.NDArray[np.float32]:
        """The logits that follow these tokens; see `loading.Runner.probe`."""
        memory = GrowingMemory(self._num_layers, self.context)
        with memory_errors(), torch.inference_mode():
            logits = self._logits([Chunk(Sequence(key, tokens), 0, 0, tokens, samples=True)], memory)
        if logits is None:
            raise AssertionError("logits were wanted")
        found: npt.NDArray[np.float32] = logits[0].cpu().numpy()
        return found

    def use_replays(
        self, device: Device, kernel: Callable[[Entries, int], Kernel], num_slots: int, free_bytes: int
    ) -> None:
        """Allocate the memory of all slots, and compute in captured passes from now on.

        Args:
            device: what captures and replays.
            kernel: chooses the attention of captured passes by a layer's entries and the query heads.
            num_slots: how many slots there will be.
            free_bytes: of the device; see `graphs.capacity`. If it is short, `context` becomes less.

        Raises:
            MemoryError: there is not enough memory.
        """
        from midfill.engine.torch.cuda_graphs import MARGIN, Replays  # noqa: PLC0415 - it imports this module

        prompt = Sequence(key=None, tokens=[0])
        with memory_errors(), torch.inference_mode():
            self._compute([Chunk(prompt, 0, 0, prompt.tokens, samples=False)], [None])
            like = [self._memory.entries(layer, 0, 1) for layer in range(self._num_layers)]
            token_bytes = sum(tensor[0].nbytes for entries in like for tensor in entries)
            self.context = graphs.capacity(self.context, token_bytes, num_slots, free_bytes)
            memory = FixedMemory(like, num_slots, self.context + MARGIN)
            self._memory = memory
            self._replays = Replays(
                self.run,
                memory,
                context=self.context,
                vocab_size=self.vocab_size,
                kernel=kernel(like[0], self._num_heads),
                branches=self._branches,
                device=device,
                place=self._device,
            )

    def capture(self, report: Callable[[float], None], limit_s: float) -> None:
        """Capture passes, the likeliest first, for about this long, on a device that has such.

        Nothing may be in slot 0 yet.
        """
        if self._replays is None:
            return
        began = time.monotonic()
        while self.idle() and (spent_s := time.monotonic() - began) < limit_s:
            report(spent_s / limit_s)
        self._replays.pace(self._time_step())

    def _time_step(self) -> float:
        """How long a decode step takes, in seconds: the shortest of a few that follow one another."""
        prompt = Sequence(key=None, tokens=[0])
        shortest = float("inf")
        for _ in range(6):
            began = time.monotonic()
            start = len(prompt.tokens) - 1
            [chosen] = self.forward([Chunk(prompt, 0, start, prompt.tokens[start:], samples=True)], [None])
            shortest = min(shortest, time.monotonic() - began)
            prompt.tokens.append(chosen[0].id)
        return shortest

    def idle(self) -> bool:
        """Nothing else is to be done: capture one pass more. Whether there was one."""
        if self._replays is None or not self._replays.num_waiting:
            return False
        with torch.inference_mode():
            return self._replays.capture_next()

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
        self._memory.drop(slots)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _compute(self, chunks: list[Chunk], allowed: list[array[int] | None]) -> list[list[Choice]]:
        logits = self._logits(chunks, self._memory)
        choices: list[list[Choice]] = []
        row = 0
        for chunk, constraint in zip(chunks, allowed, strict=True):
            wanted = chunk.num_guesses + 1 if chunk.samples else 0
            rows = None if logits is None else logits[row : row + wanted]
            choices.append(chunk.verify(_chooser(rows, constraint)) if wanted else [])
            row += wanted
        return choices

    def _logits(self, chunks: list[Chunk], memory: Memory) -> torch.Tensor | None:
        """One pass over the chunks; the logits of all tokens where they are wanted."""
        self._branches.choose([(chunk.sequence.key, len(chunk.tokens)) for chunk in chunks])
        spans = []
        ids: list[int] = []
        last: list[int] = []  # where in the row the logits are wanted
        for chunk in chunks:
            spans.append(Span(chunk.slot, chunk.start, len(ids), len(chunk.tokens)))
            ids += chunk.tokens
            if chunk.samples:
                last += range(len(ids) - 1 - chunk.num_guesses, len(ids))
        positions = [self._positions[span.start : span.start + span.length] for span in spans]
        logits: torch.Tensor | None = self.run(
            torch.tensor([ids], device=self._device),
            torch.cat(positions)[None],
            Spans(memory, spans),
            torch.tensor(last, device=self._device) if last else None,
        )
        return logits

    def run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        past: attention.Past,
        wanted: torch.Tensor | int | None,
    ) -> Any:
        """One forward pass over a row of tokens.

        Args:
            ids: 1 x tokens.
            positions: where each stands in its sequence.
            past: whose keys and values they see.
            wanted: indexes of the tokens whose logits are wanted, 0 for all, None for none.

        Returns:
            Logits (wanted x vocabulary) in fp32, or None.
        """
        # Without a choice to make, the head (a third of a small model) is left out.
        module = self._trunk if wanted is None else self._model
        kwargs: dict[str, Any] = {} if wanted is None else {"logits_to_keep": wanted}
        kwargs[self._cache_argument] = past
        with attention.attending(past):
            output = module(input_ids=ids, position_ids=positions, use_cache=True, **kwargs)
        return None if wanted is None else output.logits[0].float()


def _chooser(rows: Any, allowed: array[int] | None) -> Callable[[int], Choice]:
    return lambda number: choose(rows[number], allowed)


def choose(logits: torch.Tensor, allowed: array[int] | None) -> Choice:
    """The greedy choice among the allowed ids; the log-probability is that among all."""
    if allowed is None:
        token = logits.argmax()
    else:
        ids = torch.frombuffer(allowed, dtype=torch.int64).to(logits.device)
        token = ids[logits[ids].argmax()]
    logprob = logits[token] - logits.logsumexp(dim=0)
    return Choice(int(token), float(logprob))
