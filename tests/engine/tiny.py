"""Tiny models with random weights, made in code, and plain transformers as the oracle."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import tiny_gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from midfill.engine.api import EngineSpec, Request, Token
from midfill.engine.loading import load
from midfill.engine.local import LocalEngine
from midfill.engine.scheduler import Choice
from midfill.engine.torch.weights import build_model
from midfill.models.safetensors_io import find_tensors

if TYPE_CHECKING:
    from pathlib import Path

    import gguf

CONTROL = ("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
MERGES = [("d", "e"), ("de", "f"), ("r", "e"), ("re", "t"), ("Ġ", "Ġ"), ("i", "n"), ("p", "r"), ("in", "t")]
VOCAB_SIZE = 269

_COMMON = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
_LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "gpt_bigcode": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "qwen2": {**_LLAMA, "tie_word_embeddings": True},
    "llama": _LLAMA,
    "starcoder2": {**_LLAMA, "sliding_window": 40, "use_bias": True},
    "gemma": {**_LLAMA, "head_dim": 12},
}


@dataclass(frozen=True)
class LocalModel:
    name: str
    path: Path
    family: str | None = None


class SteppedRunner:
    """A model without weights that counts its forward passes and waits for leave before each.

    `left` has for each pass whether it was left in the middle, if there is a middle (`has_middle`).
    """

    context = 512
    vocab_size = VOCAB_SIZE
    chunk_tokens = 64
    step_sequences = 1
    max_draft_tokens = 0

    def __init__(self):
        self.began: asyncio.Queue[int] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.leave = threading.Semaphore(0)
        self.steps = []
        self.error = None
        self.dropped = []
        self.put_off = 0
        self.has_middle = False
        self.left = []

    def forward(self, chunks, _allowed, interrupted):
        self.steps.append([(chunk.start, len(chunk.tokens)) for chunk in chunks])
        self.loop.call_soon_threadsafe(self.began.put_nowait, len(self.steps))
        assert self.leave.acquire(timeout=60)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if self.has_middle:
            self.left.append(interrupted())
            if self.left[-1]:
                return None
        return [chunk.verify(lambda _: Choice(65, -0.5)) if chunk.samples else [] for chunk in chunks]

    def drop(self, slots):
        self.dropped.append(slots)

    def idle(self):
        if not self.put_off:
            return False
        self.put_off -= 1
        self.loop.call_soon_threadsafe(self.began.put_nowait, -self.put_off)
        return True

    def open(self):
        self.leave.release(10_000)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE vocabulary: 256 bytes, a few merges, control tokens at the end."""
    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(CONTROL))
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(kind: str, folder: Path, *, seed: int = 0, **changes: object) -> LocalModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**_COMMON, **CONFIGS[kind], **changes})
    model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return LocalModel(f"tiny-{kind}", folder)


GGUF_NAMES = {"gpt_bigcode": "starcoder"}
"""llama.cpp's names of architectures, where they are others."""


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """The vocabulary of `write_tokenizer`."""
    texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*texts, *CONTROL])
    writer.add_token_types([1] * len(texts) + [3] * len(CONTROL))
    writer.add_token_merges([f"{left} {right}" for left, right in MERGES])
    writer.add_eos_token_id(len(texts))
    writer.add_bos_token_id(len(texts))


def as_gguf(model: LocalModel) -> LocalModel:
    """The same model as a GGUF file in float32, beside its folder."""
    kind = model.name.removeprefix("tiny-")
    path = model.path.with_name(f"{model.path.name}.gguf")
    if not path.exists():
        name = GGUF_NAMES.get(kind, kind)
        tiny_gguf.write_transformers(path, name, reference(model.path), _add_vocabulary)
    return LocalModel(model.name, path, model.family)


def reference(path: Path) -> torch.nn.Module:
    """The model of a folder; of the folder beside a file that `as_gguf` wrote."""
    path = path.with_suffix("") if path.suffix == ".gguf" else path
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def oracle(model: torch.nn.Module, ids: list[int], num_tokens: int, control_ids: frozenset[int]) -> list[int]:
    """What `generate` gives, up to the first control id."""
    prompt = torch.tensor([ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    generated = output[0, len(ids) :].tolist()
    end = next((i for i, token in enumerate(generated) if token in control_ids), len(generated))
    return generated[:end]


def logprobs(model: torch.nn.Module, ids: list[int], generated: list[int]) -> list[float]:
    with torch.inference_mode():
        logits = model(torch.tensor([[*ids, *generated]])).logits[0, len(ids) - 1 : -1]
    return [float(row.log_softmax(-1)[token]) for row, token in zip(logits, generated, strict=True)]


@asynccontextmanager
async def running(model: LocalModel, *, load_model=load, **options: object):
    spec = EngineSpec(model, **{"device": "cpu", "dtype": "float32", "num_threads": 1, **options})
    engine = LocalEngine(spec, load=load_model)
    try:
        await engine.start(lambda *_: None)
        yield engine
    finally:
        await engine.close()


async def collect(
    engine: LocalEngine, ids: list[int], num_tokens: int = 16, **options: object
) -> list[Token]:
    request = Request(tuple(ids), num_tokens, **options)
    async with aclosing(engine.generate(request)) as tokens:
        return [token async for token in tokens]


async def collect_ids(engine: LocalEngine, ids: list[int], num_tokens: int = 16) -> list[int]:
    return [token.id for token in await collect(engine, ids, num_tokens)]


async def start_and_reach_step(engine, runner, step, ids, num_tokens=8):
    task = asyncio.create_task(collect_ids(engine, ids, num_tokens))
    while await runner.began.get() < step:
        runner.leave.release()
    return task


def build(path: Path, dtype: str) -> torch.nn.Module:
    """The engine's own modules, without the engine."""
    return build_model(
        path,
        find_tensors(path),
        dtype,
        torch.device("cpu"),
        num_threads=2,
        ahead={},
        report=lambda _: None,
    )


def random_ids(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=generator).tolist()


def edited(ids: list[int], generator: torch.Generator, num_new: int | None = None) -> list[int]:
    """Return a text with some tokens near its end replaced by `num_new` others, of 150 tokens at most."""
    at = int(torch.randint(max(1, len(ids) - 20), len(ids) + 1, (1,), generator=generator))
    drop = int(torch.randint(0, 4, (1,), generator=generator))
    if num_new is None:
        num_new = int(torch.randint(0, 5, (1,), generator=generator))
    return (ids[:at] + random_ids(generator, num_new) + ids[at + drop :])[:150]


async def cancel(engine: LocalEngine, ids: list[int]) -> None:
    """Start a request, let it reach the engine, and cancel it."""
    task = asyncio.create_task(collect_ids(engine, ids, 30))
    await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def settle() -> None:
    """Let callbacks that are due on the event loop run."""
    for _ in range(3):
        await asyncio.sleep(0)


def plain_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
