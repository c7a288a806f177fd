"""Baselines: other engines on the same weights, each in its own process (`transformers.generate`, llama.cpp).

Run as a program (`python -m midfill.bench.baselines KIND PATH OPTIONS`), this module loads the model and
answers each line of JSON on stdin, `{"tokens", "num_new", "stop_ids"}`, with a line of JSON. `{"cancel": id}`
ends the request with this id after its current token. The program ends when its stdin is closed. llama.cpp
runs as its own server, which listens on the loopback only and may also be used directly. `BaselineProcess` is
the client of that program. Importing this module imports no model library.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil

from midfill.errors import MidfillError

GENERATE, LLAMA_CPP = "generate", "llama.cpp"
_ANSWER_S = 300.0
_END_S = 10.0


@dataclass(frozen=True, slots=True)
class Run:
    """One answer of an engine.

    Attributes:
        ids: the generated tokens, without the stop token.
        prefill_s: seconds from the start to the first token.
        num_prefilled: tokens of the prompt that were computed in that time.
        decode_s: seconds from the first token to the last.
    """

    ids: list[int]
    prefill_s: float
    num_prefilled: int
    decode_s: float

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens per second."""
        return self.num_prefilled / max(self.prefill_s, 1e-6)

    @property
    def decode_tok_s(self) -> float | None:
        """Generated tokens per second; None if there are too few to tell."""
        return (len(self.ids) - 1) / max(self.decode_s, 1e-6) if len(self.ids) > 1 else None


class BaselineError(MidfillError):
    """A baseline cannot be used; the message is the reason."""


def can_run_llama_cpp() -> bool:
    """Return whether the package xllamacpp is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


class BaselineProcess:
    """A process that runs a baseline. Make it with `start`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.ready: dict[str, Any] = {}
        self._process = process

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @classmethod
    async def start(
        cls, name: str, path: Path, device: str, context: int = 2048, *, batch_tokens: int | None = None
    ) -> BaselineProcess:
        """Start the process and wait until it has loaded the model. Raises `BaselineError`.

        `context` is the maximum number of tokens of prompt and output together. `batch_tokens` is llama.cpp's
        batch size, after which it checks whether its client is still there; None is its default.
        """
        options = json.dumps({"device": device, "context": context, "batch_tokens": batch_tokens})
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "midfill.bench.baselines", name, str(path), options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            limit=1 << 24,
        )
        baseline = cls(name, process)
        try:
            baseline.ready = await baseline._read()
        except BaseException:
            await baseline.close()
            raise
        return baseline

    async def run(self, tokens: Sequence[int], num_new: int, stop_ids: Sequence[int] = ()) -> Run:
        """Generate `num_new` tokens greedily, or fewer up to one of the stop ids. Raises `BaselineError`."""
        self._write({"tokens": list(tokens), "num_new": num_new, "stop_ids": list(stop_ids)})
        return Run(**await self._read())

    async def fill(self, id_: int, tokens: Sequence[int], num_new: int, place: list[Any]) -> dict[str, Any]:
        """Generate a suggestion, which ends where ours would, or by `cancel`. For `generate` only.

        Args:
            id_: for `cancel`.
            tokens: the prompt.
            num_new: maximum number of tokens.
            place: the line before and after the cursor, and the lines below.

        Returns:
            "text", "num_generated", "prefill_s", "decode_s".

        Raises:
            BaselineError: the process failed.
        """
        self._write({"id": id_, "tokens": list(tokens), "num_new": num_new, "place": place})
        return await self._read()

    def cancel(self, id_: int) -> None:
        """End this request after its current token; it is still answered."""
        self._write({"cancel": id_})

    def _write(self, message: dict[str, Any]) -> None:
        if self._process.stdin is None:
            raise BaselineError(f"{self.name} has no input")
        with suppress(ConnectionError):  # then there is no answer either
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _END_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _read(self) -> dict[str, Any]:
        if self._process.stdout is None:
            raise BaselineError(f"{self.name} has no output")
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), _ANSWER_S)
        except TimeoutError:
            raise BaselineError(f"{self.name} did not answer within {_ANSWER_S:.0f} s") from None
        if not line:
            raise BaselineError(f"{self.name} ended with status {await self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BaselineError(str(answer["error"]))
        return answer


# The code below runs in the baseline's process.

_Answer = Callable[[dict[str, Any]], dict[str, Any]]


class _Inbox:
    """Reads lines of stdin in a thread, so that a request can be cancelled while it runs."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._cancelled: set[int] = set()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if "cancel" in message:
                self._cancelled.add(message["cancel"])
            else:
                self._messages.put(message)
        self._messages.put(None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._messages.get, None)

    def cancelled(self, message: dict[str, Any]) -> bool:
        """Return whether a request was cancelled."""
        return message.get("id") in self._cancelled


class _TokenClock:
    """A streamer that records when the prompt, and then each token, was passed to it."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def put(self, value: Any) -> None:
        value.cpu()
        self.at_s.append(time.perf_counter())

    def end(self) -> None:
        pass


class _Generate:
    """Plain transformers: fp32 on a CPU, bfloat16 on a GPU."""

    def __init__(self, path: str, inbox: _Inbox, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from midfill.models.tokenizer import load_tokenizer

        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32 if device == "cpu" else torch.bfloat16,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        self._model: Any = model.to(device).eval()
        self._tokenizer = load_tokenizer(Path(path))
        self._inbox = inbox
        self._device = device

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Answer one message."""
        if "place" in message:
            return self.fill(message)
        return asdict(self.run(message, lambda _ids: False))

    def run(self, message: dict[str, Any], stopped: Callable[[list[int]], bool]) -> Run:
        """Generate as the message says; `stopped` gets the tokens so far and ends the output."""
        import torch

        tokens, num_new, stop_ids = message["tokens"], message["num_new"], message.get("stop_ids") or []
        clock = _TokenClock()
        prompt = torch.tensor([tokens], device=self._device)
        ends = {"eos_token_id": stop_ids} if stop_ids else {"min_new_tokens": num_new}

        def criterion(ids: Any, _scores: Any, **_: Any) -> Any:
            done = stopped(ids[0, len(tokens) :].tolist())
            return torch.full((1,), done, dtype=torch.bool, device=ids.device)

        with torch.inference_mode():
            out = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=num_new,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=0,
                streamer=clock,
                stopping_criteria=[criterion],
                **ends,
            )
        ids = out[0, len(tokens) :].tolist()
        begun, first, *_ = clock.at_s
        decode_s = clock.at_s[-1] - first
        if ids and ids[-1] in stop_ids:
            ids.pop()
        return Run(ids, first - begun, len(tokens), decode_s)

    def fill(self, message: dict[str, Any]) -> dict[str, Any]:
        """Generate a suggestion with the stop rules and the cleaning of midfill's pipeline."""
        from midfill.completion.postprocess.clean import clean
        from midfill.completion.postprocess.cursor_context import CursorContext
        from midfill.completion.postprocess.normalization import normalized
        from midfill.completion.postprocess.stop import stop

        before, after, following = message["place"]
        cursor = CursorContext(before, after, tuple(following))

        def stopped(ids: list[int]) -> bool:
            return (
                self._inbox.cancelled(message)
                or stop(normalized(self._tokenizer.decode(ids), cursor), cursor) is not None
            )

        done = self.run(message | {"stop_ids": sorted(self._tokenizer.control_ids)}, stopped)
        raw = normalized(self._tokenizer.decode(done.ids), cursor)
        end = stop(raw, cursor)
        text, _ = clean(
            raw[:end], cursor, complete=end is not None or len(done.ids) < message["num_new"], forbidden=()
        )
        return {
            "text": text,
            "num_generated": len(done.ids),
            "prefill_s": done.prefill_s,
            "decode_s": done.decode_s,
        }


def _load_llama_cpp(path: str, context: int, batch_tokens: int | None) -> tuple[_Answer, str]:
    """Start llama.cpp's server (from xllamacpp) on all physical cores; return it with its address."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.n_parallel = 1
    params.n_cache_reuse = 256
    if batch_tokens is not None:
        params.n_batch = params.n_ubatch = batch_tokens
    params.cpuparams.n_threads = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    server = xllamacpp.Server(params)
    address = server.listening_address
    if not address.startswith("http://127.0.0.1:"):
        raise BaselineError(f"llama.cpp's server listens on {address}, not on the loopback")

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        body = {
            "prompt": message["tokens"],
            "n_predict": message["num_new"],
            "temperature": 0.0,
            "top_k": 1,
            "cache_prompt": False,
            "ignore_eos": True,
            "return_tokens": True,
        }
        request = urllib.request.Request(  # noqa: S310 - the address is checked above
            f"{server.listening_address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        # Not through a proxy that the environment names.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_ANSWER_S) as reply:
            found = json.load(reply)
        timings = found["timings"]
        # Its own times, without HTTP.
        run = Run(
            found["tokens"], timings["prompt_ms"] / 1000, timings["prompt_n"], timings["predicted_ms"] / 1000
        )
        return asdict(run)

    return answer, address


def main(kind: str, path: str, options: str) -> None:
    """Load the model, then answer lines until stdin is closed."""
    given = json.loads(options)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        # Libraries may print to stdout; keep that away from the answers.
        os.dup2(2, 1)

        def reply(message: dict[str, Any]) -> None:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

        try:
            inbox = _Inbox()
            if kind == GENERATE:
                answer: _Answer = _Generate(path, inbox, given["device"]).answer
                reply({})
            else:
                answer, address = _load_llama_cpp(path, given["context"], given["batch_tokens"])
                reply({"address": address})
            for message in inbox:
                reply(answer(message))
        except Exception as error:
            reply({"error": f"{kind}: {type(error).__name__}: {error}".splitlines()[0]})
    # Exit even if threads of a server or a model still run.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
