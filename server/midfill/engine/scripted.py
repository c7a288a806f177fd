"""An engine that answers from a script: for tests, and to measure everything but the model.

The script is a list of rules; the first rule that matches the prompt's text decides. Every character is a
token, so that counting steps and cutting a stream need no model. It keeps the engine contract, cancellation
included, and records each request in `log`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midfill.engine.api import BASE, AdapterSource, Engine, ModelInfo, Progress, Request, Token
from midfill.errors import EngineError, EngineUnavailableError, ModelError
from midfill.system.file_errors import why_unreadable
from midfill.system.json_files import read_json

_SENTINELS = {
    "<|fim_prefix|>": 0x110000,
    "<|fim_suffix|>": 0x110001,
    "<|fim_middle|>": 0x110002,
    "<|endoftext|>": 0x110003,
    "<|repo_name|>": 0x110004,
    "<|file_sep|>": 0x110005,
}
_NAMES = {id_: name for name, id_ in _SENTINELS.items()}


class CharTokenizer:
    """One token per character; the sentinels of the Qwen family lie beyond Unicode."""

    def encode(self, text: str) -> list[int]:
        """Return the code points of the text."""
        return [ord(char) for char in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids; sentinels are spelled out."""
        return "".join(_NAMES.get(id_) or chr(id_) for id_ in ids)

    def token_id(self, name: str) -> int | None:
        """Return the id of a sentinel or a character."""
        return _SENTINELS.get(name) if len(name) > 1 else ord(name)

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of the sentinels."""
        return frozenset(_NAMES)

    def vocab_bytes(self) -> list[bytes]:
        """Return the UTF-8 bytes of every id."""
        return [chr(id_).encode("utf-8", "surrogatepass") for id_ in range(0x110000)] + [b""] * len(_NAMES)

    def stream(self) -> CharTokenizer:
        """Return itself: every token is whole, so there is no state."""
        return self

    def push(self, token: int) -> str:
        """Return the character of an id; "" for a sentinel."""
        return "" if token in _NAMES else chr(token)


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition and an answer.

    Attributes:
        text: the text that the "model" writes from the cursor on.
        after: the prompt's text must end with this; "" always matches.
        contains: the prompt's text must contain this; "" always matches.
        adapter: the request must have the adapter of this name; "" always matches.
        error: fail with this message after `error_after` characters.
        lost: the failure is `EngineUnavailableError`, as of an engine that is lost.
        crash: raise what no engine should, a bare `RuntimeError` that quotes the prompt.
        token_delay_s: time per token.
        prefill_delay_s: time before the first token.
        hang: never end after `text`; without a text, never answer.
        logprob: log-probability of each token; None as from an engine that does not report it.
    """

    text: str = ""
    after: str = ""
    contains: str = ""
    adapter: str = ""
    error: str = ""
    error_after: int = 0
    lost: bool = False
    crash: bool = False
    token_delay_s: float = 0.0
    prefill_delay_s: float = 0.0
    hang: bool = False
    logprob: float | None = None


@dataclass(slots=True)
class Script:
    """The rules, and how the engine starts.

    Attributes:
        rules: the first that matches decides.
        load_delay_s: time that the start takes.
        load_error: the start fails with this message.
        load_crash: the start fails with an exception that no engine should raise.
        load_block_s: a thread of the start cannot be interrupted for this long.
        load_share: the share of the start that is reported as done; None as from an engine that cannot tell.
        log: a file that gets a JSON line for each request that has ended.
        log_begun: also log a line for each request that begins.
    """

    rules: list[Rule] = field(default_factory=list)
    load_delay_s: float = 0.0
    load_error: str = ""
    load_crash: bool = False
    load_block_s: float = 0.0
    load_share: float | None = None
    log: str = ""
    log_begun: bool = False

    @staticmethod
    def read(path: Path) -> Script:
        """Read a JSON file with the fields of `Script`. Raises `ModelError`."""
        try:
            values: dict[str, Any] = read_json(path)
            values["rules"] = [Rule(**rule) for rule in values.get("rules", [])]
            return Script(**values)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"Cannot read the engine script {path}: {why_unreadable(error)}.") from error


class _Turn:
    """A request's use of the device, a lock: held to the end or, if idle, released at each step."""

    def __init__(self, device: asyncio.Lock, request: Request) -> None:
        self._device = device
        self._request = request
        self._holds = False

    async def take(self) -> None:
        """Wait for the device."""
        while self._request.idle:
            self.end()
            if not self._device.locked():
                return
            async with self._device:
                pass
        if not self._holds:
            await self._device.acquire()
            self._holds = True

    def end(self) -> None:
        """Release the device."""
        if self._holds:
            self._device.release()
            self._holds = False


class ScriptedEngine:
    """`Engine` that follows a `Script`."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._model: ModelInfo | None = None
        self._busy = asyncio.Lock()
        self._closed = False
        self._adapters: dict[str, str] = {}  # names, by key

    @property
    def model(self) -> ModelInfo:
        """A description like that of a small Qwen model; see `Engine.model`."""
        if self._model is None:
            raise EngineUnavailableError("The scripted engine has not been started.")
        return self._model

    async def start(self, progress: Progress) -> None:
        """Wait, fail or succeed, as the script says; see `Engine.start`."""
        progress("reading the script", self._script.load_share)
        await asyncio.sleep(self._script.load_delay_s)
        if self._script.load_block_s:
            await asyncio.to_thread(time.sleep, self._script.load_block_s)
        if self._script.load_crash:
            raise RuntimeError("not a sentence for users")
        if self._script.load_error:
            raise ModelError(self._script.load_error)
        self._model = ModelInfo(
            name="scripted",
            family="qwen2.5-coder",
            architecture="qwen2",
            context=100_000,
            tokenizer=CharTokenizer(),
            device="cpu",
            dtype="script",
        )

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        """Yield tokens of the matching rule, one request at a time: a lock stands for the device."""
        tokenizer = self.model.tokenizer
        request.stats.submitted_s = time.monotonic()
        request.stats.num_prompt = len(request.tokens)
        prefix = request.forced_prefix
        prompt = tokenizer.decode(request.tokens) + prefix
        if request.adapter not in {None, BASE, *self._adapters}:
            raise EngineError(f"The adapter {request.adapter} is not in the model.")
        adapter = self._adapters.get(request.adapter or "", "")
        fitting = (
            rule
            for rule in self._script.rules
            if prompt.endswith(rule.after) and rule.contains in prompt and rule.adapter in ("", adapter)
        )
        rule = next(fitting, Rule())
        turn = _Turn(self._busy, request)
        try:
            await turn.take()
            async with aclosing(self._play(rule, prefix, request, turn)) as tokens:
                request.stats.started_s = time.monotonic()
                async for token in tokens:
                    request.stats.num_computed = request.stats.num_prompt
                    request.stats.num_generated += 1
                    request.stats.first_token_s = request.stats.first_token_s or time.monotonic()
                    yield token
        finally:
            turn.end()
            request.stats.ended_s = time.monotonic()

    async def _play(
        self, rule: Rule, prefix: str, request: Request, turn: _Turn
    ) -> AsyncGenerator[Token, None]:
        steps = 0
        outcome = "cancelled"
        if self._script.log_begun:
            self._note("begun", 0, idle=request.idle)
        try:
            await asyncio.sleep(rule.prefill_delay_s)
            if self._closed:
                raise EngineUnavailableError("The engine was closed.")
            if rule.crash:
                raise RuntimeError(self.model.tokenizer.decode(request.tokens))
            written = "" if rule.hang and not rule.text else prefix + rule.text
            for char in written[: request.max_new_tokens]:
                if rule.error and steps >= rule.error_after:
                    break
                await turn.take()
                if rule.token_delay_s:
                    await asyncio.sleep(rule.token_delay_s)
                steps += 1
                yield Token(ord(char), char, rule.logprob)
            if rule.hang:
                await asyncio.get_running_loop().create_future()
            if rule.error:
                failure = EngineUnavailableError if rule.lost else EngineError
                raise failure(rule.error)
            outcome = "finished"
        except EngineError:
            outcome = "failed"
            raise
        finally:
            self._note(outcome, steps, idle=request.idle)

    def _note(self, outcome: str, steps: int, *, idle: bool) -> None:
        if self._script.log:
            row = {"outcome": outcome, "steps": steps, "idle": idle, "at": time.time()}
            with Path(self._script.log).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def prewarm(
        self,
        tokens: Sequence[int],
        adapter: str | None = None,
        *,
        user: str = "",
    ) -> None:
        """Log that a prewarm was requested; see `Engine.prewarm`."""
        self._note("prewarmed", len(tokens), idle=True)

    async def set_adapters(self, adapters: Sequence[AdapterSource]) -> None:
        """Record the adapters' names; their files are not read. See `Adaptable.set_adapters`."""
        self._adapters = {adapter.key: adapter.name for adapter in adapters}

    async def close(self) -> None:
        """Stop; see `Engine.close`."""
        self._closed = True
        self._model = None


class BusyEngine:
    """Answers from a script while a real engine decodes without end in the same process.

    For `midfill bench lsp --busy`: shows what a model that computes costs the rest of the server.
    """

    def __init__(self, script: Path, real: Engine) -> None:
        self._scripted = ScriptedEngine(Script.read(script))
        self._real = real
        self._work: asyncio.Task[None] | None = None

    @property
    def model(self) -> ModelInfo:
        """The script's model."""
        return self._scripted.model

    async def start(self, progress: Progress) -> None:
        """Start both engines; return when the real one has begun to decode."""
        await self._scripted.start(progress)
        await self._real.start(progress)
        first = asyncio.Event()
        self._work = asyncio.create_task(self._decode(first))
        await first.wait()

    async def _decode(self, first: asyncio.Event) -> None:
        """Generate long answers one after the other, the same each time."""
        model = self._real.model
        tokens = tuple(model.tokenizer.encode("def a_long_function(values):\n    "))
        room = model.context - len(tokens)
        while True:
            request = Request(tokens, max_new_tokens=min(512, room))
            async with aclosing(self._real.generate(request)) as stream:
                async for _ in stream:
                    first.set()
            # A model that ends at once must not keep the loop from everything else.
            await asyncio.sleep(0)

    def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        """Generate as the script says."""
        return self._scripted.generate(request)

    def prewarm(self, tokens: Sequence[int], adapter: str | None = None, *, user: str = "") -> None:
        """Do nothing: the script has no prompt cache."""

    async def close(self) -> None:
        """Stop decoding and close both engines."""
        if self._work is not None:
            self._work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._work
        await self._scripted.close()
        await self._real.close()
