"""On a CUDA device: captured passes give what they give when they are called, and how long they take.

Real shapes, random weights. Times are printed; they are held to the targets on an H200 only, for which these
were set. Without a device all of this is skipped; tests/engine/test_cuda_graphs.py runs the same code on the
CPU.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from statistics import median

import pytest
import tiny
import torch
from stepping import Recorder, Sequences, expected, prompts

from midfill.bench.shapes import SHAPES, write_shape
from midfill.engine.api import EngineSpec
from midfill.engine.local import LocalEngine
from midfill.engine.torch import cuda
from midfill.engine.torch.kv_cache import flash_kernel, packed_kernel
from midfill.engine.torch.loading import load_runner
from midfill.engine.torch.runner import TorchRunner

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]

# Milliseconds on an H200: per token, first token after a key at 2k tokens, cold 8k prompt.
TARGETS = {
    "tiny_starcoder_py": (0.5, 2.0, 9.0),
    "qwen2.5-coder-0.5b": (0.6, 2.5, 20.0),
    "qwen2.5-coder-1.5b": (1.2, 3.5, 55.0),
    "qwen2.5-coder-7b": (4.5, 7.0, 260.0),
    "starcoderbase-7b": (4.5, 7.0, 260.0),
}
CANCEL_TO_FREE_MS = 12.0


def place():
    return torch.device("cuda", 0)


def on_an_h200():
    return "H200" in torch.cuda.get_device_name(0)


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    needed = 18e9 if "7b" in request.param else 5e9
    if min(shutil.disk_usage(folder).free, torch.cuda.mem_get_info(0)[1]) < needed:
        pytest.skip(f"{request.param} needs {needed / 1e9:.0f} GB of disk and of device memory")
    yield write_shape(request.param, folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def runner(model):
    loaded, _ = load_runner(
        model.path,
        device="cuda:0",
        dtype="bfloat16",
        num_threads=0,
        report=lambda _share: None,
        meanwhile=lambda: None,
    )
    began = time.monotonic()
    loaded.capture(lambda _share: None, limit_s=60.0)
    captured = loaded._graphs.num_captured
    print(f"\n{model.name}: {captured} passes captured in {time.monotonic() - began:.1f} s")
    assert captured > 12
    yield loaded
    del loaded
    torch.cuda.empty_cache()


def milliseconds(run, rounds=5):
    """Median over some rounds; `run` returns when the host has the result."""
    run()
    durations = []
    for _ in range(rounds):
        began = time.monotonic()
        run()
        durations.append((time.monotonic() - began) * 1000)
    return median(durations)


def test_captured_passes_equal_called_ones(model, runner):
    """Same kernels, replayed or called one by one: the same tokens, alone and with others."""
    called = TorchRunner(runner._model, "bfloat16", place())
    called.use_graphs(Recorder(), lambda _like, _heads: runner._graphs._kernel, 4, cuda.free_bytes(place()))
    # As many, so that each step has the same shape in both: another one adds up in another order.
    for _ in range(runner._graphs.num_captured):
        called.idle()
    documents = prompts(1, 30, 700, 5, 64)
    outputs = []
    for each in (runner, called):
        running = Sequences(each, documents)
        for _ in range(24):
            running.step([0])
        for _ in range(12):
            running.step([1, 2, 3], most=64)
        outputs.append(running.tokens)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_in_fp32_the_tokens_equal_generate(tmp_path, kind):
    model = tiny.write_model(kind, tmp_path)
    loaded, _ = load_runner(
        model.path,
        device="cuda:0",
        dtype="float32",
        num_threads=0,
        report=lambda _share: None,
        meanwhile=lambda: None,
    )
    loaded.capture(lambda _share: None, limit_s=30.0)
    documents = prompts(2, 30, 120, 3, 77)
    running = Sequences(loaded, documents)
    for _ in range(20):
        running.step([3, 0, 1, 2], most=50)
    for slot, prompt in enumerate(documents):
        count = len(running.tokens[slot]) - len(prompt)
        assert running.tokens[slot] == expected(model.path, prompt, count)


@pytest.mark.parametrize(
    ("heads", "key_heads", "width"), [(12, 1, 64), (14, 2, 64), (28, 4, 128), (32, 1, 128)]
)
def test_flash_attention_agrees_with_plain_operations(heads, key_heads, width):
    like = torch.zeros(1, key_heads, width, dtype=torch.bfloat16, device=place())
    chosen = cuda.kernel(place(), (like, like), heads)
    if chosen is packed_kernel:
        pytest.skip("no flash attention on this device with this torch")
    assert chosen is flash_kernel
    assert cuda._difference(place(), (like, like), heads, 8) < 0.03


def test_latencies(model, runner):
    name = model.name.removeprefix("random:")
    [prompt] = prompts(3, 8000)

    def cold(length):
        running = Sequences(runner, [prompt[:length]])
        while running.computed[0] < length:
            running.step([0])
        return running

    cold_8k_ms = milliseconds(lambda: cold(8000))
    running = cold(2048)

    def key():
        # One more token than the slot has, as after a key.
        running.tokens[0] = [*prompt[:2048], 7]
        running.computed[0] = 2047
        running.step([0])

    first_token_ms = milliseconds(key, rounds=50)
    began = time.monotonic()
    for _ in range(200):
        running.step([0])
    token_ms = (time.monotonic() - began) * 1000 / 200
    found = (token_ms, first_token_ms, cold_8k_ms)
    print(f"\n{name} on {torch.cuda.get_device_name(0)}: ms (target)")
    for label, value, target in zip(
        ("a token at 2k", "first token after a key at 2k", "cold 8k"), found, TARGETS[name], strict=True
    ):
        print(f"  {label}: {value:.2f} ({target})")
    if on_an_h200():
        assert all(value <= target for value, target in zip(found, TARGETS[name], strict=True))


async def test_cancel_to_free(model):
    """From cancelling a request, in whatever pass, to the first token of a short other one."""
    engine = LocalEngine(EngineSpec(model, device="cuda:0"))
    await engine.start(lambda *_: None)
    waited_ms = []
    try:
        short = prompts(4, 4)[0]
        alone = []
        for _ in range(20):
            began = time.monotonic()
            await tiny.collect_ids(engine, short, 1)
            alone.append((time.monotonic() - began) * 1000)
        for turn in range(60):
            [prompt] = prompts(100 + turn, 4000)
            task = asyncio.create_task(tiny.collect_ids(engine, prompt, 60))
            await asyncio.wait([task], timeout=0.002 * (turn % 30))
            task.cancel()
            began = time.monotonic()
            await asyncio.gather(task, return_exceptions=True)
            await tiny.collect_ids(engine, short, 1)
            waited_ms.append((time.monotonic() - began) * 1000 - median(alone))
    finally:
        await engine.close()
    worst = max(waited_ms)
    print(f"\n{model.name}: cancel to free, worst of {len(waited_ms)}: {worst:.1f} ms ({CANCEL_TO_FREE_MS})")
    if on_an_h200():
        assert worst <= CANCEL_TO_FREE_MS
