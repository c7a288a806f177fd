"""The engine contract: the interface of a model to the completion pipeline.

Three implementations: `local` (a model on this machine's CPU or GPU), `remote` (a model that a server runs)
and `scripted` (answers from a script, for tests and for measuring everything but the model). The contract
knows tokens, not editors. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

Progress = Callable[[str, float | None], None]
"""Called with a short message ("loading weights") and the share done, 0..1, or None where it is unknown.

It may be called from any thread.
"""


class TextStream(Protocol):
    """Converts ids to text one at a time."""

    def push(self, token: int) -> str:
        """Return the characters that this id completes; "" while a multi-byte character is unfinished."""
        ...


class Tokenizer(Protocol):
    """Converts text to token ids and back. Text can never become a sentinel: see `encode`."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text.

        Strings that look like control tokens are encoded as ordinary characters, so that a file can never
        place a sentinel in the prompt. No BOS or EOS is added. Lone surrogates become U+FFFD.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; control tokens are spelled out; incomplete UTF-8 becomes U+FFFD."""
        ...

    def token_id(self, name: str) -> int | None:
        """Return the id of the one token spelled exactly `name` (control tokens included), or None."""
        ...

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of every control token (sentinels, end of text, chat marks): never part of an answer."""
        ...

    def vocab_bytes(self) -> list[bytes]:
        """Return the bytes of each id in an answer, by id; b"" for an id that is not text."""
        ...

    def stream(self) -> TextStream:
        """Return a new detokenizer for one answer."""
        ...


class LocalModel(Protocol):
    """A model in a local folder (`config.json`, tokenizer, safetensors weights), or a GGUF file."""

    @property
    def name(self) -> str:
        """Catalogue name, hub id or path, as the user chose it."""
        ...

    @property
    def path(self) -> Path:
        """The folder; for the runner "llamacpp" the GGUF file."""
        ...

    @property
    def family(self) -> str | None:
        """The FIM family declared by the catalogue, or None."""
        ...


RUNNERS = ("auto", "openvino", "torch", "llamacpp")


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """The model to run in this process, and how to run it.

    Attributes:
        model: the model's folder or file.
        device: "auto" (an NVIDIA or AMD GPU that can run it, else the CPU), "cpu", "cuda", "cuda:1", "mps",
            "xpu", ...; see `torch.devices`.
        dtype: "auto" ("int8" on a CPU that can; on a GPU the best that fits), or one of `devices.DTYPES`.
        adapter: folder of a LoRA adapter in PEFT format, for requests that name none; or None.
        num_threads: CPU threads of the model; 0 for one per physical core, and with torch fewer while other
            programs keep cores busy.
        runner: one of `RUNNERS`; "auto" is OpenVINO for int8 on a CPU if it knows the architecture, else
            torch. "llamacpp" runs a GGUF file.
        drafts: use speculative decoding: propose draft tokens and verify several per pass. Off to measure
            without.
        prompt_tokens: the longest prompt with its output that the settings allow; 0 if not known. Where the
            memory of a GPU is small, the KV cache is sized by it.
    """

    model: LocalModel
    device: str = "auto"
    dtype: str = "auto"
    adapter: Path | None = None
    num_threads: int = 0
    runner: str = "auto"
    drafts: bool = True
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter that requests can name once it is in the model; see `Adaptable`.

    Attributes:
        key: its digest, by which requests name it, so that nothing computed with it is used for another
            adapter.
        name: for the user.
        path: its folder, in PEFT's format.
    """

    key: str
    name: str
    path: Path


MAX_ADAPTERS = 4
"""Maximum number of adapters in a model at the same time."""

BASE = "base"
"""As the adapter of a request: no adapter, even if the engine was started with one."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Description of the running model for the completion pipeline.

    Attributes:
        name: catalogue name, hub id or path, as the user chose it.
        family: the FIM family declared by the catalogue, or None if it must be detected.
        architecture: transformers' `model_type`, for example "qwen2" or "gpt_bigcode".
        context: maximum number of tokens of prompt and output together.
        tokenizer: the model's own.
        device: "cpu", "cuda:0", ...
        dtype: "int8", "int4", "float32", "bfloat16", "float16".
        adapter: name of the LoRA adapter in use, or None.
        served_by: kind of the server that runs it; "" if it is our own, whose files are known.
        proven: its vocabulary is known to be that of `tokenizer`; false if a server takes text only.
        attention: on a GPU with captured graphs the attention kernel, "flash" or "plain"; else "".
    """

    name: str
    family: str | None
    architecture: str
    context: int
    tokenizer: Tokenizer
    device: str
    dtype: str
    adapter: str | None = None
    served_by: str = ""
    proven: bool = True
    attention: str = ""


@dataclass(slots=True)
class Stats:
    """RequestStats of a request, filled in by the engine while the request runs. Times are `time.monotonic`.

    Attributes:
        num_prompt: tokens of the prompt.
        num_reused: prompt tokens that were found computed.
        num_computed: prompt tokens computed for this request so far; some count twice if its slot was taken
            away.
        num_generated: generated tokens, including those that were not read.
        ended_s: when the engine had finished with it: for a cancelled request, when the device was free.
    """

    num_prompt: int = 0
    num_reused: int = 0
    num_computed: int = 0
    num_generated: int = 0
    submitted_s: float = 0.0
    started_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0

    def computed(self, start: int, num_tokens: int) -> None:
        """Record a pass over `num_tokens` tokens from `start` on; those of the prompt count."""
        self.num_computed += max(0, min(num_tokens, self.num_prompt - start))


@dataclass(slots=True, eq=False)
class Request:
    """One completion to compute, greedily. Only `idle` may change after it was submitted.

    Attributes:
        tokens: the prompt, sentinels included; at least one token.
        max_new_tokens: at least 1.
        stop_ids: a token with one of these ids ends the output and is not part of it. The engine adds the
            tokenizer's `control_ids`.
        forced_prefix: the output must begin with this text; tokens that contradict it are not chosen (token
            healing: characters removed from the prompt's end are put here). "" for no constraint.
        idle: the result is not needed yet, so the request yields, after at most one forward pass, to any
            request that is not idle. The event loop may change this by `set_idle` while the request runs.
        adapter: the key of an adapter that is in the model (see `Adaptable`), or `BASE`; None for the adapter
            that the engine was started with.
        user: the user, if several share the engine: each gets an equal share of it.
        stats: see `Stats`.
        on_idle: called with the new value when `idle` changes; an engine in another process sets it.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    forced_prefix: str = ""
    idle: bool = False
    adapter: str | None = None
    user: str = ""
    stats: Stats = field(default_factory=Stats)
    on_idle: Callable[[bool], None] | None = None

    def set_idle(self, idle: bool) -> None:
        """Change `idle`: someone waits for the result now, or nobody does any more."""
        if idle != self.idle:
            self.idle = idle
            if self.on_idle is not None:
                self.on_idle(idle)


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Attributes:
        id: its id.
        text: the characters it completes; "" while a multi-byte character is unfinished.
        logprob: natural log-probability under the model, before any constraint; None if the engine does not
            know it.
    """

    id: int
    text: str
    logprob: float | None


class Engine(Protocol):
    """A running model. All methods are called on one asyncio event loop."""

    @property
    def model(self) -> ModelInfo:
        """The running model. Raises `EngineUnavailableError` until `start` has returned."""
        ...

    async def start(self, progress: Progress) -> None:
        """Load the model; return when requests can be served.

        Raises `ModelError`, `AdapterError` or `EngineError` with a sentence for the user.
        """
        ...

    def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        """Yield tokens as they are computed, up to a stop id or `max_new_tokens`.

        Closing the iterator (or cancelling the task that awaits it) cancels the request: the model is free
        after at most one more forward pass. Raises `EngineError` if a step fails; the engine then serves the
        next request.
        """
        ...

    def prewarm(self, tokens: Sequence[int], adapter: str | None = None, *, user: str = "") -> None:
        """Compute the KV of a prompt when there is no other work. Never waits, never fails.

        `adapter`, `user`: see `Request`.
        """
        ...

    async def close(self) -> None:
        """Stop and free the model. Active requests end with `EngineUnavailableError`. May be called twice."""
        ...


@runtime_checkable
class Adaptable(Protocol):
    """An engine whose adapters can be changed while it serves."""

    async def set_adapters(self, adapters: Sequence[AdapterSource]) -> None:
        """Have exactly these adapters in the model, and that of `EngineSpec.adapter`; `MAX_ADAPTERS` in all.

        Returns when requests may name them. Active requests are not disturbed: an adapter is removed after
        the requests that use it have ended. No adapters cost nothing.

        Raises `AdapterError`, and changes nothing, if one of them cannot be used.
        """
        ...
