"""The real classes for GPUs on an emulated device: load, capture, replay, run ahead; tokens equal `generate`.

`test_cuda_graphs.py` calls passes instead of replaying them, and sees into each part. Here the whole engine
runs as on a card, and what a graph must not do (`emulated_cuda.py`) gives wrong tokens or an error.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import adapters
import pytest
import tiny
import torch
from emulated_cuda import GIGABYTE, ILLEGAL_ACCESS, emulated, not_emulated
from stepping import Sequences, expected, prompts

from midfill.engine import factory, loading, step_loop
from midfill.engine.api import EngineSpec, Request
from midfill.engine.runner import FixedMemoryError
from midfill.engine.torch.cuda import CudaDevice
from midfill.engine.torch.cuda import kernel as kernel_for
from midfill.engine.torch.kv_cache import flash_kernel, packed_kernel
from midfill.errors import EngineUnavailableError

# What PEFT 0.21 itself uses.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

KINDS = list(tiny.CONFIGS)
PLACE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.write_model(kind, folder / kind) for kind in KINDS}


@pytest.fixture(params=[flash_kernel, packed_kernel], ids=lambda kernel: kernel.__name__)
def kernel(request):
    return request.param


@pytest.fixture
def cuda(request, kernel):
    with emulated(**({} if kernel is flash_kernel else {"flash": ()})) as device:
        yield device


@pytest.fixture
def device():
    with emulated() as cuda, torch.inference_mode():
        torch.cuda.set_device(PLACE)
        yield cuda


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    """Some graphs are captured while the model loads, some in pauses, some never."""
    monkeypatch.setattr(loading, "_CAPTURE_S", 0.5)
    monkeypatch.setattr(step_loop, "_PAUSE_S", 0.1)


def running(model, **options):
    return tiny.running(model, device="cuda:0", dtype="float32", **options)


# The emulation itself: what must not be in a graph is noticed.


def test_a_capture_executes_nothing_and_a_replay_reads_what_is_there_then(device):
    source, target = torch.zeros(3, device=PLACE), torch.zeros(3, device=PLACE)
    replay = CudaDevice(PLACE).capture(lambda: target.copy_(source + 1))
    target.fill_(7)  # what the warm-up wrote
    source.fill_(4)
    replay()
    assert device.queue  # it runs late
    torch.cuda.synchronize()
    assert target.tolist() == [5, 5, 5]


def test_a_value_of_the_host_stays_what_it_was_at_the_capture(device):
    target, number = torch.zeros(1, device=PLACE), [1.0]
    replay = CudaDevice(PLACE).capture(lambda: target.fill_(number[0]))
    number[0] = 2.0
    replay()
    assert float(target) == 1.0


def test_a_value_cannot_be_read_on_the_host_during_a_capture(device):
    target = torch.zeros(1, device=PLACE)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        CudaDevice(PLACE).capture(lambda: target.fill_(float(target) + 1))


def test_what_a_graph_allocated_is_not_kept_after_its_replay(device):
    held = []
    replay = CudaDevice(PLACE).capture(lambda: held.append(torch.ones(2, device=PLACE) * 3))
    replay()
    torch.cuda.synchronize()
    assert held[-1].isnan().all()


def test_a_copy_to_the_host_is_not_there_before_it_is_waited_for(device):
    source, later = torch.full((1, 1), 3.0, device=PLACE), torch.full((1, 1), 4.0)
    copy = CudaDevice(PLACE).fetch(source)
    with device.executing():
        copy._host.zero_()
    source.copy_(later, non_blocking=True)
    assert copy._host.tolist() == [[0.0]]
    assert copy.wait() == [[3.0]]


def test_an_upload_takes_its_turn(device):
    source, seen = torch.zeros(1, device=PLACE), torch.zeros(1, device=PLACE)
    first, second = torch.ones(1), torch.full((1,), 2.0)
    replay = CudaDevice(PLACE).capture(lambda: seen.copy_(source))
    source.copy_(first, non_blocking=True)
    replay()
    source.copy_(second, non_blocking=True)
    assert float(seen) == 1.0
    assert float(source) == 2.0


@pytest.mark.parametrize(
    ("fails", "caught", "reason"),
    [
        (lambda: torch.zeros(1000, device=PLACE), MemoryError, "CUDA out of memory"),
        (lambda: float(torch.zeros(1, device=PLACE)), RuntimeError, "not permitted when stream is capturing"),
    ],
    ids=["out of memory", "a host read"],
)
def test_a_capture_that_fails_gives_its_reason_and_leaves_the_stream(device, fails, caught, reason):
    target, here = CudaDevice(PLACE), torch.cuda.current_stream()

    def run():
        if device.local.recording is not None:
            device.free_bytes = 100
            fails()

    # The emulated end of a capture raises an error too, as CUDA's does: "due to a previous error".
    with pytest.raises(caught, match=reason):
        target.capture(run)
    assert torch.cuda.current_stream() is here
    target.capture(lambda: None)()
    assert (device.stats["captures"], device.stats["replays"]) == (1, 1)


# The choice of the attention kernel.


@pytest.mark.parametrize(
    ("dtype", "flash", "chosen", "warned"),
    [
        (torch.bfloat16, (torch.bfloat16,), flash_kernel, False),
        (torch.bfloat16, (), packed_kernel, True),
        # No card has it for float32, which only comparisons use.
        (torch.float32, (torch.bfloat16,), packed_kernel, False),
    ],
)
def test_flash_attention_that_is_missing_is_said(caplog, dtype, flash, chosen, warned):
    caplog.set_level("INFO")
    with emulated(flash=flash), torch.inference_mode():
        like = torch.zeros(1, 2, 64, dtype=dtype, device=PLACE)
        assert kernel_for(PLACE, (like, like), 14) is chosen
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == warned
    assert all("flash attention is not available on emulated" in message for message in warnings)


# The engine.


@pytest.mark.parametrize("kind", KINDS)
async def test_the_engine_equals_generate(models, kind, kernel, cuda):
    """Drafts, edits, cancellations, pairs of requests, and captures in the pauses between."""
    reference = tiny.reference(models[kind].path)
    generator = torch.Generator().manual_seed(14)
    ids = tiny.random_ids(generator, 90)
    async with running(models[kind], drafts=True) as engine:
        assert engine.model.attention == ("flash" if kernel is flash_kernel else "plain")
        control = engine.model.tokenizer.control_ids
        for turn in range(9):
            ids = tiny.edited(ids, generator, 1 + turn % 4)
            if turn % 3 == 0:
                await tiny.cancel(engine, ids)
            others = [tiny.random_ids(generator, 40) for _ in range(turn % 3)]
            found = await asyncio.gather(*(tiny.collect_ids(engine, each, 6) for each in (ids, *others)))
            with not_emulated():
                assert found == [tiny.oracle(reference, each, 6, control) for each in (ids, *others)]
    assert cuda.stats["replays"] > 10
    assert cuda.stats["longest queue"] > 1
    assert (cuda.stats["flash"] > 0) == (kernel is flash_kernel)


@pytest.mark.parametrize("kernel", [flash_kernel], indirect=True, ids=["flash"])
async def test_a_gpu_that_fails_for_good_is_left_for_the_cpu(models, kernel, cuda, caplog):
    """An illegal access cannot be repaired in the process; the engine says so once and goes on."""
    model = models["qwen2"]
    reference = tiny.reference(model.path)
    engine = factory.create(EngineSpec(model, device="cuda:0", dtype="float32"))
    await engine.start(lambda *_: None)
    try:
        ids = tiny.random_ids(torch.Generator().manual_seed(1), 40)
        first = await tiny.collect_ids(engine, ids, 6)
        assert engine.model.device == "cuda:0"
        cuda.broken = True
        with pytest.raises(EngineUnavailableError, match=f"The GPU has failed .{ILLEGAL_ACCESS}"):
            await tiny.collect_ids(engine, [*ids, 1], 6)
        with pytest.raises(EngineUnavailableError):
            await tiny.collect_ids(engine, ids, 6)
        await engine._restart
        assert engine.model.device == "cpu"
        second = await tiny.collect_ids(engine, ids, 6)
    finally:
        await engine.close()
    with not_emulated():
        assert first == second == tiny.oracle(reference, ids, 6, frozenset())
    assert caplog.text.count("the engine is restarted: The GPU has failed") == 1


@pytest.mark.parametrize("kernel", [packed_kernel], indirect=True, ids=["plain"])
def test_graphs_survive_that_another_program_takes_the_memory(models, kernel, cuda, monkeypatch):
    monkeypatch.setattr(loading, "_CAPTURE_S", 0)
    model = models["qwen2"]
    spec = EngineSpec(model, device="cuda:0", dtype="float32")
    runner = loading.load(spec, lambda *_: None).runner
    for _ in range(3):
        assert runner.idle()
    documents = prompts(2, 40, 60)
    running = Sequences(runner, documents)
    for _ in range(3):
        running.step([0])
    captured, replays = runner._graphs.num_captured, cuda.stats["replays"]
    # A prompt, for whose width nothing is captured, now fails; tokens do not.
    cuda.free_bytes = 20_000
    with pytest.raises(FixedMemoryError):
        running.step([1])
    assert runner._graphs.num_captured == captured
    assert not runner.idle()
    for _ in range(3):
        running.step([0])
    assert cuda.stats["replays"] >= replays + 3
    cuda.free_bytes = GIGABYTE * 8
    for _ in range(3):
        running.step([1])
    with not_emulated():
        for slot in range(2):
            count = len(running.tokens[slot]) - len(documents[slot])
            assert running.tokens[slot] == expected(model.path, documents[slot], count)


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [("qwen2", flash_kernel), ("gpt_bigcode", packed_kernel)],
    indirect=["kernel"],
    ids=["qwen2", "gpt_bigcode"],
)
async def test_adapters_come_and_go_while_answers_run(models, kind, kernel, cuda, tmp_path):
    model = models[kind]
    sources = [
        adapters.source(
            adapters.write_adapter(
                model.path, tmp_path / str(rank), adapters.TARGETS[kind], seed=rank, r=rank
            )
        )
        for rank in (4, 8, 24)
    ]
    oracles = {None: tiny.reference(model.path)}
    oracles |= {source.key: adapters.peft_model(model.path, source.path) for source in sources}
    generator = torch.Generator().manual_seed(3)

    async def ask(engine, ids, key):
        async with aclosing(engine.generate(Request(tuple(ids), 6, adapter=key))) as tokens:
            return [token.id async for token in tokens]

    async with running(model, drafts=False) as engine:
        control = engine.model.tokenizer.control_ids
        graphs = engine._loaded.runner._graphs
        for wanted in (sources[:1], sources[:2], sources[1:], [], sources):
            long = tiny.random_ids(generator, 50)
            beside = asyncio.create_task(tiny.collect_ids(engine, long, 24))
            await tiny.settle()
            base_graphs = len(graphs._base_graphs)
            await engine.set_adapters(wanted)
            # Whoever uses no adapter goes on with graphs; the others have those that every step needs soon.
            assert len(graphs._base_graphs) >= base_graphs > 0
            assert bool(graphs._lora_graphs) == bool(wanted)
            asked = [
                (tiny.random_ids(generator, 40 + 7 * number), key)
                for number, key in enumerate([None, *(source.key for source in wanted)])
            ]
            found = await asyncio.gather(*(ask(engine, ids, key) for ids, key in asked))
            beside_found = await beside
            with not_emulated():
                assert found == [tiny.oracle(oracles[key], ids, 6, control) for ids, key in asked]
                assert beside_found == tiny.oracle(oracles[None], long, 24, control)
