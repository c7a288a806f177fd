"""Run a transformers model with torch: keys and values in slots, the forward pass, the choice of a token.

Models are transformers' own modules with our attention, so that every architecture with plain attention
works. The chunks of a step are computed in one pass: the projections see all their tokens as one row. Knows
tensors, slot numbers and token ids; nothing of threads, requests or text. Runs on the engine thread only.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from midfill.adapters.format import Adapter
from midfill.engine.kv_slots import NUM_SLOTS
from midfill.engine.runner import DeviceLostError, FixedMemoryError
from midfill.engine.scheduler import Choice, Chunk, SequenceState
from midfill.engine.torch import attention, devices, graph_shapes
from midfill.engine.torch.cuda_graphs import MARGIN, GraphDevice, GraphRunner
from midfill.engine.torch.errors import memory_errors
from midfill.engine.torch.kv_cache import (
    FixedKVCache,
    GrowingKVCache,
    Kernel,
    KVCache,
    LayerKV,
    PackedPast,
    SequenceSpan,
    flash_kernel,
)
from midfill.engine.torch.lora import LoraLayers
from midfill.engine.torch.sampling import choose
from midfill.engine.torch.threads import ThreadCount


class TorchRunner:
    """One model on one device.

    Attributes:
        architecture: transformers' `model_type`.
        context: maximum number of tokens of one sequence.
        vocab_size: number of logits.
        device: for the user, for example "cpu".
        dtype: a format of `devices.DTYPES`.
        attention: see `ModelInfo`.
        chunk_tokens, step_sequences, max_draft_tokens: see `engine.runner.Runner`.
    """

    step_sequences = NUM_SLOTS

    def __init__(
        self,
        model: Any,
        dtype: str,
        device: torch.device,
        thread_count: ThreadCount | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        """Take over a loaded model.

        `thread_count`, if given, sets the number of threads of each pass; `chunk_tokens` is by default what
        `devices.KINDS` has.

        Raises `ModelError` if the model's attention cannot be replaced.
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
        self.attention = ""
        self._thread_count = thread_count
        self.chunk_tokens = self.warm_up_tokens = chunk_tokens or devices.KINDS[device.type].chunk_tokens
        self.max_draft_tokens = graph_shapes.MAX_DRAFT_TOKENS
        self._num_layers: int = config.num_hidden_layers
        self._num_heads: int = config.num_attention_heads
        self._cache: KVCache = GrowingKVCache(self._num_layers, self.context)
        self._lora = LoraLayers(model, _compute_dtype(model))
        self._graphs: GraphRunner | None = None
        self._fused = device.type != "cuda" or torch.version.hip is not None
        self._positions = torch.arange(self.context, device=device)

    def forward(
        self,
        chunks: list[Chunk],
        allowed: list[array[int] | None],
        interrupted: Callable[[], bool] | None = None,
    ) -> list[list[Choice]]:
        """Compute the chunks of one step; see `Runner.forward`. A pass is never aborted."""
        del interrupted
        self._choose_threads()
        try:
            return self._forward(chunks, allowed)
        except MemoryError:
            if self._graphs is None:
                raise
        except RuntimeError as error:
            if self._is_lost():
                raise DeviceLostError(str(error).split("\n")[0]) from error
            raise
        # Another program may have taken the memory. What torch holds without using it may be enough.
        self._graphs.pause()
        self._release_memory()
        try:
            return self._forward(chunks, allowed)
        except MemoryError as error:
            raise FixedMemoryError(str(error)) from error

    def _forward(self, chunks: list[Chunk], allowed: list[array[int] | None]) -> list[list[Choice]]:
        with memory_errors(), torch.inference_mode():
            self._copy(chunks)
            if self._graphs is None:
                return self._compute(chunks, allowed)
            return self._compute_with_graphs(self._graphs, chunks, allowed)

    def _is_lost(self) -> bool:
        """Return whether the device fails even if nothing is asked of it."""
        if self._device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return True
        return False

    def _copy(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            if chunk.copy_from is not None:
                if self._graphs is not None:
                    self._graphs.discard_run_ahead()
                self._cache.copy(chunk.copy_from, chunk.slot, chunk.start)

    def _compute_with_graphs(
        self, graphs: GraphRunner, chunks: list[Chunk], allowed: list[array[int] | None]
    ) -> list[list[Choice]]:
        """Compute the chunks in captured passes where there are any, else in plain ones."""
        choices: list[list[Choice]] = [[]] * len(chunks)
        groups = graph_shapes.groups([len(chunk.tokens) for chunk in chunks])
        for group in groups:
            some = [chunks[i] for i in group]
            constraints = [allowed[i] for i in group]
            found = graphs.compute(some, constraints, alone=len(groups) == 1)
            if found is None:
                found = self._compute(some, constraints)
            for i, chosen in zip(group, found, strict=True):
                choices[i] = chosen
        return choices

    def prepare(self, adapters: Mapping[str, Adapter]) -> Callable[[], None]:
        """Prepare to have exactly these adapters in the model; see `Runner.prepare`."""
        with memory_errors():
            put_in = self._lora.prepare(adapters)

        def install() -> None:
            if put_in() and self._graphs is not None:
                with torch.inference_mode():
                    self._graphs.replace_adapters()

        return install

    def probe(self, tokens: list[int], key: str | None) -> npt.NDArray[np.float32]:
        """Return the logits after these tokens; see `Runner.probe`."""
        cache = GrowingKVCache(self._num_layers, self.context)
        with memory_errors(), torch.inference_mode():
            logits = self._logits([Chunk(SequenceState(key, tokens), 0, 0, tokens, samples=True)], cache)
        if logits is None:
            raise AssertionError("logits were wanted")
        found: npt.NDArray[np.float32] = logits[0].cpu().numpy()
        return found

    def use_graphs(
        self,
        device: GraphDevice,
        kernel: Callable[[LayerKV, int], Kernel],
        num_slots: int,
        free_bytes: int,
        prompt_tokens: int = 0,
    ) -> None:
        """Allocate the memory of all slots, and run captured graphs from now on.

        Args:
            device: captures and replays.
            kernel: chooses the attention of captured passes, by a layer's keys and values and the query
                heads.
            num_slots: number of slots.
            free_bytes: free memory of the device; see `graph_shapes.capacity`. If it is short, `context`
                becomes less.
            prompt_tokens: see `EngineSpec`.

        Raises:
            MemoryError: there is not enough memory.
        """
        with memory_errors(), torch.inference_mode():
            like = self._entries_of_one_token()
            self._fit_context(like, num_slots, free_bytes, prompt_tokens)
            cache = FixedKVCache(like, num_slots, self.context + MARGIN)
            self._cache = cache
            chosen = kernel(like[0], self._num_heads)
            self.attention = "flash" if chosen is flash_kernel else "plain"
            self._graphs = GraphRunner(
                self.run,
                cache,
                context=self.context,
                vocab_size=self.vocab_size,
                kernel=chosen,
                lora=self._lora,
                device=device,
                tensor_device=self._device,
            )

    def limit_context(self, num_slots: int, free_bytes: int, prompt_tokens: int = 0) -> None:
        """Make `context` less if the memory of all slots would not fit; see `graph_shapes.capacity`.

        Raises:
            MemoryError: there is not enough memory.
        """
        with memory_errors(), torch.inference_mode():
            like = self._entries_of_one_token()
            self._fit_context(like, num_slots, free_bytes, prompt_tokens)
        self.drop([0])
        self._cache = GrowingKVCache(self._num_layers, self.context)

    def _entries_of_one_token(self) -> list[LayerKV]:
        """Return the keys and values of each layer in slot 0, after a pass over one token."""
        prompt = SequenceState(key=None, tokens=[0])
        self._compute([Chunk(prompt, 0, 0, prompt.tokens, samples=False)], [None])
        return [self._cache.entries(layer, 0, 1) for layer in range(self._num_layers)]

    def _fit_context(self, like: list[LayerKV], num_slots: int, free_bytes: int, prompt_tokens: int) -> None:
        token_bytes = sum(tensor[0].nbytes for entries in like for tensor in entries)
        self.context = graph_shapes.capacity(self.context, token_bytes, num_slots, free_bytes, prompt_tokens)

    def capture(self, report: Callable[[float], None], limit_s: float) -> None:
        """Capture graphs for about `limit_s` seconds, the likeliest first, on a device that has them.

        Slot 0 must be empty.
        """
        if self._graphs is None:
            return
        began = time.monotonic()
        while self.idle() and (spent_s := time.monotonic() - began) < limit_s:
            report(spent_s / limit_s)
        self._graphs.set_step_duration(self._time_step())

    def _time_step(self) -> float:
        """Return the duration of a decode step in seconds: the shortest of six in a row."""
        prompt = SequenceState(key=None, tokens=[0])
        shortest = float("inf")
        for _ in range(6):
            began = time.monotonic()
            start = len(prompt.tokens) - 1
            [chosen] = self.forward([Chunk(prompt, 0, start, prompt.tokens[start:], samples=True)], [None])
            shortest = min(shortest, time.monotonic() - began)
            prompt.tokens.append(chosen[0].id)
        return shortest

    def idle(self) -> bool:
        """Capture one more graph. Return whether there was one to capture."""
        if self._graphs is None:
            return False
        with torch.inference_mode():
            return self._graphs.capture_next()

    @property
    def num_graphs(self) -> int:
        """Number of captured graphs."""
        return 0 if self._graphs is None else self._graphs.num_captured

    @contextlib.contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Run plain passes instead of captured ones, to compare them."""
        graphs, self._graphs = self._graphs, None
        if graphs is not None:
            graphs.discard_run_ahead()
        try:
            yield
        finally:
            self._graphs = graphs

    def warm_up(self, num_tokens: int) -> None:
        """Run a chunk of this size and a single token: the first passes are slow."""
        prompt = SequenceState(key=None, tokens=[0] * num_tokens)
        self.forward([Chunk(prompt, 0, 0, prompt.tokens, samples=True)], [None])
        self.forward([Chunk(prompt, 0, num_tokens, [0], samples=True)], [None])
        self.drop([0])

    def _choose_threads(self) -> None:
        if self._thread_count is None:
            return
        before = self._thread_count.count
        count = self._thread_count.update(time.monotonic())
        if count != before:
            torch.set_num_threads(count)

    def drop(self, slots: list[int]) -> None:
        """Free the memory of these slots."""
        self._cache.drop(slots)
        self._release_memory()

    def _release_memory(self) -> None:
        """Return the memory that torch holds without using it."""
        if self._device.type != "cpu":
            # It raises on a device that is lost, which the next pass finds out too.
            with contextlib.suppress(RuntimeError):
                devices.empty_cache(self._device.type)

    def _compute(self, chunks: list[Chunk], allowed: list[array[int] | None]) -> list[list[Choice]]:
        logits = self._logits(chunks, self._cache)
        choices: list[list[Choice]] = []
        row = 0
        for chunk, constraint in zip(chunks, allowed, strict=True):
            wanted = chunk.num_draft_tokens + 1 if chunk.samples else 0
            rows = None if logits is None else logits[row : row + wanted]
            choices.append(chunk.verify(_chooser(rows, constraint)) if wanted else [])
            row += wanted
        return choices

    def _logits(self, chunks: list[Chunk], cache: KVCache) -> torch.Tensor | None:
        """Run one pass over the chunks. Return the requested logits of all of them, or None."""
        self._lora.choose([(chunk.sequence.key, len(chunk.tokens)) for chunk in chunks])
        spans = []
        ids: list[int] = []
        last: list[int] = []  # indexes of the tokens whose logits are wanted
        for chunk in chunks:
            spans.append(SequenceSpan(chunk.slot, chunk.start, len(ids), len(chunk.tokens)))
            ids += chunk.tokens
            if chunk.samples:
                last += range(len(ids) - 1 - chunk.num_draft_tokens, len(ids))
        positions = [self._positions[span.start : span.start + span.length] for span in spans]
        logits: torch.Tensor | None = self.run(
            torch.tensor([ids], device=self._device),
            torch.cat(positions)[None],
            PackedPast(cache, spans, fused=self._fused),
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
        """Run one forward pass over a row of tokens.

        Args:
            ids: 1 x tokens.
            positions: position of each token in its sequence.
            past: the keys and values that the tokens see.
            wanted: indexes of the tokens whose logits are returned; 0 for all, None for none.

        Returns:
            Logits (wanted x vocabulary) in fp32, or None.
        """
        # Skip the head (a third of a small model) if no token is chosen.
        module = self._trunk if wanted is None else self._model
        kwargs: dict[str, Any] = {} if wanted is None else {"logits_to_keep": wanted}
        kwargs[self._cache_argument] = past
        with attention.attending(past):
            output = module(input_ids=ids, position_ids=positions, use_cache=True, **kwargs)
        return None if wanted is None else output.logits[0].float()


def _compute_dtype(model: Any) -> torch.dtype:
    """Return the type of a model's activations: that of its norms, which are never quantized."""
    norm: torch.Tensor = next(
        one for one in model.parameters() if one.ndim == 1 and len(one) and one.is_floating_point()
    )
    return norm.dtype


def _chooser(rows: Any, allowed: array[int] | None) -> Callable[[int], Choice]:
    return lambda number: choose(rows[number], allowed)
