"""The runner contract: what the step loop needs of a model.

Implemented by `torch.runner.TorchRunner`, `openvino.runner.OpenVinoRunner` and
`llamacpp.runner.LlamaCppRunner`. Importing this module imports none of the libraries.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from midfill.adapters.format import Adapter
from midfill.engine.scheduler import Choice, Chunk


class FixedMemoryError(MemoryError):
    """A pass did not fit into memory, and fewer slots would not help: theirs is allocated once."""


class DeviceLostError(Exception):
    """Every operation on the device fails from now on. Only another device or process can go on."""


class Runner(Protocol):
    """A model on a device. Runs on the engine thread, except for `prepare`.

    Attributes:
        context: maximum number of tokens of one sequence.
        vocab_size: number of logits.
        chunk_tokens: tokens of one sequence per forward pass. A new request waits for the current pass to
            end.
        step_sequences: sequences per forward pass.
        max_draft_tokens: maximum number of draft tokens of one sequence that a pass verifies; 0 if it cannot.
    """

    context: int
    vocab_size: int
    chunk_tokens: int
    step_sequences: int
    max_draft_tokens: int

    def forward(
        self, chunks: list[Chunk], allowed: list[array[int] | None], interrupted: Callable[[], bool]
    ) -> list[list[Choice]] | None:
        """Compute the chunks of one step.

        Args:
            chunks: the scheduler's plan; no two chunks of the same sequence.
            allowed: for each chunk the ids to choose from, or None for all.
            interrupted: polled during the pass, if the runner can abort one; true means abort.

        Returns:
            For each chunk that `samples` the most likely next token, and one more for each accepted draft
                token (see `Chunk.verify`); an empty list for the other chunks. None if the pass was aborted:
                the state is unchanged, and the same pass, if it comes next, resumes from the parts that are
                finished.

        Raises:
            MemoryError: there is not enough memory, on whatever device.
            DeviceLostError: the device cannot be used any more.
        """
        ...

    def drop(self, slots: list[int]) -> None:
        """Free the memory of these slots."""
        ...

    def prepare(self, adapters: Mapping[str, Adapter]) -> Callable[[], None]:
        """Prepare to have exactly these adapters in the model, while passes continue.

        May take seconds. Runs in any thread, but not twice at a time. The adapters fit the model; their keys
        are those of `SequenceState.key`. Returns a quick function that installs them, to be called on the
        engine thread between two passes.

        Raises `AdapterError` if one cannot be served, and `MemoryError`.
        """
        ...

    def probe(self, tokens: list[int], key: str | None) -> npt.NDArray[np.float32]:
        """Return the logits after these tokens with an adapter (None for the base). Changes no slot."""
        ...

    def idle(self) -> bool:
        """Do one piece of deferred work; called when there are no requests. Return whether there was any."""
        ...


class LoadedRunner(Runner, Protocol):
    """A runner as `loading` sees it, once, right after it was built.

    Attributes:
        architecture: transformers' `model_type`; llama.cpp's name if a GGUF file has another.
        device: for the user, for example "cpu".
        dtype: "int8", "int4", "float32", "bfloat16" or "float16", or a GGUF file's type.
        attention: see `ModelInfo`.
        warm_up_tokens: tokens of the warm-up's pass; less than a chunk if nothing is compiled or packed.
    """

    architecture: str
    device: str
    dtype: str
    attention: str
    warm_up_tokens: int

    def warm_up(self, num_tokens: int) -> None:
        """Run a chunk of this size and then a single token."""
        ...

    def capture(self, report: Callable[[float], None], limit_s: float) -> None:
        """Capture graphs for about `limit_s` seconds, on a device that has them."""
        ...
