"""On a CUDA device: captured passes give what they give when they are called, and how long they take.

Real shapes, random weights. Times are printed; they are held to the targets on an H200 only, for which these
were set. Without a device the same tests run on an emulated one (`conftest.py`), with small models: their
times mean nothing, but no line of them runs for the first time on a card.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from statistics import median

import pytest
import tiny
import torch
from emulated_cuda import not_emulated
from stepping import Recorder, Sequences, expected, prompts

from midfill.bench.shapes import SHAPES, write_shape
from midfill.engine import loading
from midfill.engine.api import EngineSpec
from midfill.engine.local import LocalEngine
from midfill.engine.torch import cuda
from midfill.engine.torch.kv_cache import flash_kernel, packed_kernel
from midfill.engine.torch.runner import TorchRunner

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Milliseconds on an H200: per token, first token after a key at 2k tokens, cold 8k prompt.
TARGETS = {
    "tiny_starcoder_py": (0.5, 2.0, 9.0),
    "qwen2.5-coder-0.5b": (0.6, 2.5, 20.0),
    "qwen2.5-coder-1.5b": (1.2, 3.5, 55.0),
    "qwen2.5-coder-7b": (4.5, 7.0, 260.0),
    "starcoderbase-7b": (4.5, 7.0, 260.0),
}
CANCEL_TO_FREE_MS = 12.0


def load(model, dtype):
    spec = EngineSpec(model, device="cuda:0", dtype=dtype)
    return loading.load(spec, lambda _message, _share: None).runner


# Small models of one architecture are all alike.
EMULATED = ("tiny_starcoder_py", "qwen2.5-coder-0.5b")


@pytest.fixture(scope="module", params=list(SHAPES) if torch.cuda.is_available() else EMULATED)
def model(request, gpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    needed = 18e9 if "7b" in request.param else 5e9
    available = min(shutil.disk_usage(folder).free, torch.cuda.mem_get_info(0)[1])
    if available < needed and not gpu.emulated:
        pytest.skip(f"{request.param} needs {needed / 1e9:.0f} GB of disk and of device memory")
    with not_emulated():
        changes = gpu.changes(SHAPES[request.param]["model_type"])
        model = write_shape(request.param, folder, changes=changes)
    yield model
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def runner(model, gpu):
    loaded = load(model, "bfloat16")
    began = time.monotonic()
    loaded.capture(lambda _share: None, limit_s=gpu.seconds(60.0))
    while loaded._graphs.num_captured <= 12:
        assert loaded.idle()  # on a slow machine
    captured = loaded._graphs.num_captured
    print(f"\n{model.name}: {captured} passes captured in {time.monotonic() - began:.1f} s")
    yield loaded
    del loaded
    torch.cuda.empty_cache()


def milliseconds(run, rounds):
    """Median over some rounds; `run` returns when the host has the result."""
    run()
    durations = []
    for _ in range(rounds):
        began = time.monotonic()
        run()
        durations.append((time.monotonic() - began) * 1000)
    return median(durations)


def test_captured_passes_equal_called_ones(model, gpu, runner):
    """Same kernels, replayed or called one by one: the same tokens, alone and with others."""
    called = TorchRunner(runner._model, "bfloat16", gpu.device)
    called.use_graphs(
        Recorder(), lambda _like, _heads: runner._graphs._kernel, 4, cuda.free_bytes(gpu.device)
    )
    # The same shapes, so that each step has the same in both: another one adds up in another order.
    shapes = list(runner._graphs._base_graphs._captured)
    called._graphs._base_graphs._waiting[:] = shapes
    for _ in shapes:
        assert called.idle()
    documents = prompts(1, 30, gpu.length(700), 5, 64)
    outputs = []
    for each in (runner, called):
        running = Sequences(each, documents)
        for _ in range(gpu.rounds(24)):
            running.step([0])
        for _ in range(gpu.rounds(12)):
            running.step([1, 2, 3], most=64)
        outputs.append(running.tokens)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("kind", list(tiny.CONFIGS))
def test_in_fp32_the_tokens_equal_generate(tmp_path, gpu, kind):
    with not_emulated():
        model = tiny.write_model(kind, tmp_path)
    loaded = load(model, "float32")
    loaded.capture(lambda _share: None, limit_s=gpu.seconds(30.0))
    documents = prompts(2, 30, 120, 3, 77)
    running = Sequences(loaded, documents)
    for _ in range(20):
        running.step([3, 0, 1, 2], most=50)
    for slot, prompt in enumerate(documents):
        count = len(running.tokens[slot]) - len(prompt)
        with not_emulated():
            assert running.tokens[slot] == expected(model.path, prompt, count)


@pytest.mark.parametrize(
    ("heads", "key_heads", "width"), [(12, 1, 64), (14, 2, 64), (28, 4, 128), (32, 1, 128)]
)
def test_flash_attention_agrees_with_plain_operations(gpu, heads, key_heads, width):
    like = torch.zeros(1, key_heads, width, dtype=torch.bfloat16, device=gpu.device)
    chosen = cuda.kernel(gpu.device, (like, like), heads)
    if chosen is packed_kernel:
        assert torch.cuda.get_device_capability(0) < (8, 0), "this card should have flash attention"
        pytest.skip("cards of this generation have no flash attention")
    assert chosen is flash_kernel
    for queries in (1, 8, 32):
        assert cuda._difference(gpu.device, (like, like), heads, queries) < 0.03


def test_latencies(model, gpu, runner):
    name = model.name.removeprefix("random:")
    long, usual = gpu.length(8000), gpu.length(2048)
    [prompt] = prompts(3, long)

    def cold(length):
        running = Sequences(runner, [prompt[:length]])
        while running.computed[0] < length:
            running.step([0])
        return running

    cold_8k_ms = milliseconds(lambda: cold(long), gpu.rounds(5))
    running = cold(usual)

    def key():
        # One more token than the slot has, as after a key.
        running.tokens[0] = [*prompt[:usual], 7]
        running.computed[0] = usual
        running.step([0])

    first_token_ms = milliseconds(key, gpu.rounds(50))
    began = time.monotonic()
    count = gpu.rounds(200)
    for _ in range(count):
        running.step([0])
    token_ms = (time.monotonic() - began) * 1000 / count
    found = (token_ms, first_token_ms, cold_8k_ms)
    print(f"\n{name} on {gpu.name}: ms (target)")
    for label, value, target in zip(
        ("a token at 2k", "first token after a key at 2k", "cold 8k"), found, TARGETS[name], strict=True
    ):
        print(f"  {label}: {value:.2f} ({target})")
    if "H200" in gpu.name:
        assert all(value <= target for value, target in zip(found, TARGETS[name], strict=True))


def test_cancel_to_free(model, gpu):
    """From cancelling a request, in whatever pass, to the first token of a short other one."""
    waited_ms = asyncio.run(_cancellations(model, gpu))
    worst = max(waited_ms)
    print(f"\n{model.name}: cancel to free, worst of {len(waited_ms)}: {worst:.1f} ms ({CANCEL_TO_FREE_MS})")
    if "H200" in gpu.name:
        assert worst <= CANCEL_TO_FREE_MS


async def _cancellations(model, gpu):
    engine = LocalEngine(EngineSpec(model, device="cuda:0"))
    await engine.start(lambda *_: None)
    waited_ms = []
    try:
        short = prompts(4, 4)[0]
        alone = []
        for _ in range(gpu.rounds(20)):
            began = time.monotonic()
            await tiny.collect_ids(engine, short, 1)
            alone.append((time.monotonic() - began) * 1000)
        for turn in range(gpu.rounds(60)):
            [prompt] = prompts(100 + turn, gpu.length(4000))
            task = asyncio.create_task(tiny.collect_ids(engine, prompt, 60))
            await asyncio.wait([task], timeout=0.002 * (turn % 30))
            task.cancel()
            began = time.monotonic()
            await asyncio.gather(task, return_exceptions=True)
            await tiny.collect_ids(engine, short, 1)
            waited_ms.append((time.monotonic() - began) * 1000 - median(alone))
    finally:
        await engine.close()
    return waited_ms
