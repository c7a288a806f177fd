"""Other engines on the same weights, each in a process of its own: `transformers.generate` and llama.cpp.

As a program (`python -m midfill.bench.rivals KIND PATH DEVICE CONTEXT`) it loads the model and then answers
each line of JSON on stdin, `{"tokens", "num_new", "stop_ids"}`, with one of its own. It ends when its stdin
does.
llama.cpp runs as its own server, which listens on the loopback only.
`Rival` is the other side of that conversation. Importing this module imports no model library.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
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
        ids: the tokens, without the one that ended them.
        prefill_s: from the start to the first token.
        num_prefilled: tokens of the prompt that were computed in that time.
        decode_s: from the first token to the last.
    """

    ids: list[int]
    prefill_s: float
    num_prefilled: int
    decode_s: float

    @property
    def prefill_tok_s(self) -> float:
        """Tokens read in a second."""
        return self.num_prefilled / max(self.prefill_s, 1e-6)

    @property
    def decode_tok_s(self) -> float | None:
        """Tokens written in a second; None if there are too few to tell."""
        return (len(self.ids) - 1) / max(self.decode_s, 1e-6) if len(self.ids) > 1 else None


class RivalError(MidfillError):
    """A comparison that could not be made; the message is the reason."""


def can_run_llama_cpp() -> bool:
    """Whether its package is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


class Rival:
    """One such process. Make it with `start`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process

    @classmethod
    async def start(cls, name: str, path: Path, device: str, context: int = 2048) -> Rival:
        """Start the process and wait until it has loaded the model. Raises `RivalError`.

        `context` is the most tokens that prompt and output will have together.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "midfill.bench.rivals", name, str(path), device, str(context)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            limit=1 << 24,
        )
        rival = cls(name, process)
        try:
            await rival._read()
        except BaseException:
            await rival.close()
            raise
        return rival

    async def run(self, tokens: Sequence[int], num_new: int, stop_ids: Sequence[int] = ()) -> Run:
        """Read the prompt and write `num_new` tokens, or up to a stop id where there are any.

        Greedy; without stop ids nothing ends it early. Raises `RivalError`.
        """
        if self._process.stdin is None:
            raise RivalError(f"{self.name} has no input")
        asked = {"tokens": list(tokens), "num_new": num_new, "stop_ids": list(stop_ids)}
        with suppress(ConnectionError):  # then there is no answer either
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            await self._process.stdin.drain()
        return Run(**await self._read())

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
            raise RivalError(f"{self.name} has no output")
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), _ANSWER_S)
        except TimeoutError:
            raise RivalError(f"{self.name} did not answer within {_ANSWER_S:.0f} s") from None
        if not line:
            raise RivalError(f"{self.name} ended with status {await self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RivalError(str(answer["error"]))
        return answer


# From here on: the other process.

_Answer = Callable[[list[int], int, list[int]], Run]


def _load_generate(path: str, device: str, _context: int) -> _Answer:
    """Plain transformers: fp32 on a CPU, bfloat16 on a GPU."""
    import torch  # noqa: PLC0415 - only in this process
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model = model.to(device).eval()

    class Clock:
        """A streamer: it is given the prompt, then each token when it has been chosen."""

        def __init__(self) -> None:
            self.at_s: list[float] = []

        def put(self, value: Any) -> None:
            value.cpu()
            self.at_s.append(time.perf_counter())

        def end(self) -> None:
            pass

    def answer(tokens: list[int], num_new: int, stop_ids: list[int]) -> Run:
        clock = Clock()
        prompt = torch.tensor([tokens], device=device)
        ends = {"eos_token_id": stop_ids} if stop_ids else {"min_new_tokens": num_new}
        with torch.inference_mode():
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=num_new,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=0,
                streamer=clock,
                **ends,
            )
        ids = out[0, len(tokens) :].tolist()
        begun, first, *_ = clock.at_s
        decode_s = clock.at_s[-1] - first
        if ids and ids[-1] in stop_ids:
            ids.pop()
        return Run(ids, first - begun, len(tokens), decode_s)

    return answer


def _load_llama_cpp(path: str, _device: str, context: int) -> _Answer:
    """Its server, as xllamacpp packs it, on as many threads as there are cores."""
    import xllamacpp  # noqa: PLC0415 - only in this process

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = context
    params.n_parallel = 1
    params.cpuparams.n_threads = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    server = xllamacpp.Server(params)
    if not server.listening_address.startswith("http://127.0.0.1:"):
        raise RivalError(f"llama.cpp's server listens on {server.listening_address}, not on the loopback")

    def answer(tokens: list[int], num_new: int, _stop_ids: list[int]) -> Run:
        asked = {
            "prompt": tokens,
            "n_predict": num_new,
            "temperature": 0.0,
            "top_k": 1,
            "cache_prompt": False,
            "ignore_eos": True,
            "return_tokens": True,
        }
        request = urllib.request.Request(  # noqa: S310 - the address is checked above
            f"{server.listening_address}/completion",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        # Not through a proxy that the environment names.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_ANSWER_S) as reply:
            found = json.load(reply)
        timings = found["timings"]
        # Its own clock: without the way over HTTP.
        return Run(
            found["tokens"], timings["prompt_ms"] / 1000, timings["prompt_n"], timings["predicted_ms"] / 1000
        )

    return answer


def main(kind: str, path: str, device: str, context: str) -> None:
    """Load, then answer lines until stdin ends."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        # What libraries print goes nowhere.
        os.dup2(2, 1)

        def reply(message: dict[str, Any]) -> None:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

        try:
            answer = (_load_generate if kind == GENERATE else _load_llama_cpp)(path, device, int(context))
            reply({})
            for line in sys.stdin:
                asked = json.loads(line)
                run = answer(asked["tokens"], asked["num_new"], asked["stop_ids"])
                reply({name: getattr(run, name) for name in Run.__dataclass_fields__})
        except Exception as error:  # noqa: BLE001 - the reason is all that the other side can use
            reply({"error": f"{kind}: {type(error).__name__}: {error}".splitlines()[0]})
    # Threads of a server or of a model must not hold the process.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
