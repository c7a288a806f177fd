"""`midfill bench gpu`: everything that a GPU has to be measured for, in one run of a few minutes.

Each figure is a line of JSON in a file as soon as it is there. The smallest shape comes first, a part that
fails does not end the others, and a part for which no time is left says so: a run that is cut short is worth
what it has measured. Weights are made on the device (`gpu_model`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from midfill.bench import gpu_model
from midfill.bench.gpu_model import SlotDriver
from midfill.bench.shapes import SHAPES
from midfill.engine.api import Request
from midfill.engine.local import LocalEngine
from midfill.engine.torch.runner import TorchRunner
from midfill.errors import MidfillError
from midfill.system.measure import percentile

FILE = "gpu.jsonl"

_TINY: tuple[dict[str, Any], ...] = (
    {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    {"model_type": "gpt_bigcode", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
)
_TINY_COMMON = {"vocab_size": 300, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
_KEY = "made-up"


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """What to measure.

    Attributes:
        shapes: names of model shapes, the smallest first.
        budget_s: seconds for all of it.
        prompt_tokens, long_tokens: lengths of the usual and of the long prompt.
        rounds: repetitions of quick measurements; slow ones are repeated less.
        capture_s: seconds for graphs of each shape.
        copy_bytes: size of the block whose copying is timed.
        changes: changes of the shapes' configurations by kind of model, for a test.
    """

    shapes: tuple[str, ...] = tuple(SHAPES)
    budget_s: float = 440.0
    prompt_tokens: int = 2048
    long_tokens: int = 8000
    rounds: int = 40
    capture_s: float = 8.0
    copy_bytes: int = 1 << 31
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def check_device() -> torch.device:
    """Return the GPU to measure. Raises `MidfillError` if torch can use none."""
    if not torch.cuda.is_available():
        raise MidfillError(
            f"torch {torch.__version__} sees no CUDA GPU on this machine, and this benchmark measures "
            "nothing else. See `midfill doctor`; `midfill bench engine` measures the CPU."
        )
    return torch.device("cuda", 0)


def bench_gpu(plan: GpuPlan, out: Path, tell: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """Measure; return all lines, each of which was written and told when it was there.

    Raises:
        MidfillError: there is no GPU, or no such shape.
    """
    for name in plan.shapes:
        if name not in SHAPES:
            raise MidfillError(f"There is no shape {name!r}. Use one of: {', '.join(SHAPES)}.")
    device = check_device()
    out.mkdir(parents=True, exist_ok=True)
    with (out / FILE).open("a", encoding="utf-8", buffering=1) as file:
        run = _Run(plan, device, file.write, tell)
        run.attempt("machine", lambda: _machine(run), 5)
        run.attempt("float32", lambda: _exact(run), 15)
        for name in plan.shapes:
            run.attempt(name, lambda name=name: _Shape(run, name).measure(), 30)  # type: ignore[misc]
            gpu_model.release(device)
        run.say("end", left_s=round(run.left_s, 1), failed=run.failed, skipped=run.skipped)
    return run.lines


class _Run:
    """The lines so far, and the time that is left."""

    def __init__(
        self,
        plan: GpuPlan,
        device: torch.device,
        write: Callable[[str], object],
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self.plan = plan
        self.device = device
        self.lines: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []
        self._write = write
        self._tell = tell
        self._began_s = time.monotonic()

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.plan.budget_s - (time.monotonic() - self._began_s)

    def say(self, what: str, **figures: Any) -> None:
        """Write a line and tell it."""
        line = {"at_s": round(time.monotonic() - self._began_s, 1), "what": what, **figures}
        self.lines.append(line)
        self._write(json.dumps(line) + "\n")
        self._tell(line)

    def attempt(self, what: str, measure: Callable[[], None], need_s: float) -> None:
        """Measure a part, if there is time for it. If it fails, say so."""
        if self.left_s < need_s:
            self.skipped.append(what)
            self.say(what, skipped=f"{self.left_s:.0f} s are left; it needs {need_s:.0f} s")
            return
        try:
            measure()
        except Exception as error:  # whatever a driver or a library raises
            self.failed.append(what)
            self.say(what, error=f"{type(error).__name__}: {error}"[:300])

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)

    def ms(self, work: Callable[[], object], rounds: int) -> float:
        """Return the median milliseconds of some work, without its first run."""
        work()
        found = []
        for _ in range(max(1, rounds)):
            began = time.perf_counter()
            work()
            found.append((time.perf_counter() - began) * 1000)
        return round(median(found), 4)


def _machine(run: _Run) -> None:
    import transformers

    device = run.device
    free, total = torch.cuda.mem_get_info(device)
    run.say(
        "machine",
        gpu=torch.cuda.get_device_name(device),
        capability=list(torch.cuda.get_device_capability(device)),
        free_gb=_gb(free),
        total_gb=_gb(total),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    source = torch.empty(run.plan.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(4):
            target.copy_(source)
        run.synchronize()

    copy_ms = run.ms(copy, 3)
    run.say("copy", tb_per_s=round(8 * source.nbytes / copy_ms / 1e9, 3))
    count = 10 * run.plan.rounds
    value = torch.ones(896, device=device, dtype=torch.bfloat16)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(count):
            value = value * 1.0

    def replay() -> None:
        graph.replay()
        run.synchronize()

    run.say("small kernel in a graph", us=round(run.ms(replay, 5) * 1000 / count, 3))


def _exact(run: _Run) -> None:
    """Compare with `generate` on the device, token for token, in float32."""
    for config in _TINY:
        kind = config["model_type"]
        model = gpu_model.build({**config, **_TINY_COMMON}, torch.float32, run.device)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.3).to(run.device))
        prompts = [torch.randint(0, 300, (n,), generator=generator).tolist() for n in (1, 30, 290)]
        wanted = [_generated(model, run.device, prompt, 20) for prompt in prompts]
        runner = gpu_model.serving(model, "float32", run.device)
        runner.capture(lambda _share: None, min(3.0, run.plan.capture_s))
        equal = []
        for prompt, tokens in zip(prompts, wanted, strict=True):
            driver = SlotDriver(runner, list(prompt))
            while len(driver.tokens) < len(tokens):
                driver.step()
            equal.append(driver.tokens == tokens)
        run.say(f"float32 {kind}", graphs=runner.num_graphs, tokens_equal_generate=equal)


def _generated(model: Any, device: torch.device, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([list(prompt)], device=device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = output[0].tolist()
    return tokens


class _Shape:
    """The measurements of one model shape."""

    def __init__(self, run: _Run, name: str) -> None:
        self._run = run
        self._name = name
        config = gpu_model.shape_config(name, run.plan.changes)
        torch.cuda.reset_peak_memory_stats(run.device)
        began = time.monotonic()
        self._model = gpu_model.build(config, torch.bfloat16, run.device)
        run.synchronize()
        self._say("made", s=round(time.monotonic() - began, 1), weights_gb=_gb(self._weights))
        generator = torch.Generator().manual_seed(1)
        vocab = config["vocab_size"]
        self._prompt: list[int] = torch.randint(
            0, vocab, (run.plan.long_tokens,), generator=generator
        ).tolist()

    @property
    def _weights(self) -> int:
        return gpu_model.num_bytes(self._model)

    def _say(self, what: str, **figures: Any) -> None:
        self._run.say(f"{self._name}: {what}", **figures)

    def _attempt(self, what: str, measure: Callable[[TorchRunner], None], runner: TorchRunner) -> None:
        self._run.attempt(f"{self._name}: {what}", lambda: measure(runner), 5)

    def measure(self) -> None:
        """Run all measurements; each may fail for itself."""
        run = self._run
        run.attempt(f"{self._name}: generate", self._generate, 20)
        runner = self._serve()
        for what, part in (
            ("decode", self._decode),
            ("cold", self._cold),
            ("several sequences", self._several),
            ("captured and called", self._captured_and_called),
            ("kernels", self._kernels),
            ("engine", self._engine),
            ("adapters", self._adapters),
        ):
            self._attempt(what, part, runner)
        self._say(
            "memory",
            peak_gb=_gb(torch.cuda.max_memory_allocated(run.device)),
            reserved_gb=_gb(torch.cuda.memory_reserved(run.device)),
        )

    def _generate(self) -> None:
        """Time transformers' own `generate`, called eagerly, before its modules are replaced."""
        run, prompt = self._run, self._prompt[: self._run.plan.prompt_tokens]
        few, many = 2, 2 + min(32, run.plan.rounds)
        short = run.ms(lambda: _generated(self._model, run.device, prompt, few), 2)
        long = run.ms(lambda: _generated(self._model, run.device, prompt, many), 2)
        self._say("generate", ms_per_token=round((long - short) / (many - few), 3))

    def _serve(self) -> TorchRunner:
        run = self._run
        began = time.monotonic()
        runner = gpu_model.serving(self._model, "bfloat16", run.device)
        peak_gb = _gb(torch.cuda.max_memory_allocated(run.device))
        self._say("loaded", s=round(time.monotonic() - began, 1), peak_gb=peak_gb, context=runner.context)
        runner.warm_up(min(runner.chunk_tokens, runner.context - 1))
        began = time.monotonic()
        runner.capture(lambda _share: None, run.plan.capture_s)
        took_s = time.monotonic() - began
        self._say(
            "captured",
            attention=runner.attention,
            graphs=runner.num_graphs,
            s=round(took_s, 2),
            s_per_graph=round(took_s / max(1, runner.num_graphs), 3),
        )
        return runner

    def _decode(self, runner: TorchRunner) -> None:
        run, length = self._run, self._run.plan.prompt_tokens
        driver = SlotDriver(runner, self._prompt[:length])
        driver.prefill()
        token_ms = run.ms(driver.step, run.plan.rounds)

        def type_tokens(count: int) -> None:
            driver.tokens[:] = self._prompt[: length + count]
            driver.num_computed = length
            driver.step()

        self._say(
            f"decode after {length} tokens",
            ms_per_token=token_ms,
            ms_first_token_after_a_key=run.ms(lambda: type_tokens(1), run.plan.rounds),
            ms_after_64_tokens=run.ms(lambda: type_tokens(min(64, length // 2)), run.plan.rounds // 4),
        )

    def _cold(self, runner: TorchRunner) -> None:
        length = min(self._run.plan.long_tokens, runner.context - 1)

        def read() -> None:
            SlotDriver(runner, self._prompt[:length], slot=1).prefill()
            self._run.synchronize()

        self._say(f"cold prompt of {length} tokens", ms=self._run.ms(read, self._run.plan.rounds // 10))

    def _several(self, runner: TorchRunner) -> None:
        """Time a step of several sequences, as many as the engine has slots."""
        for count in (2, runner.step_sequences):
            length = self._run.plan.prompt_tokens
            drivers = [
                SlotDriver(runner, [number, *self._prompt[: length - 1]], slot=number)
                for number in range(count)
            ]
            for driver in drivers:
                driver.prefill()

            def step(drivers: list[SlotDriver] = drivers) -> None:
                chunks = [driver.chunk() for driver in drivers]
                found = runner.forward(chunks, [None] * len(chunks))
                for driver, chunk, chosen in zip(drivers, chunks, found, strict=True):
                    driver.take(chunk, chosen)

            self._say(f"{count} sequences", ms_per_step=self._run.ms(step, self._run.plan.rounds))

    def _captured_and_called(self, runner: TorchRunner) -> None:
        """Compare tokens of captured passes with those of plain ones. They may differ at a tie."""
        texts = []
        for slot, captured in enumerate((True, False)):
            driver = SlotDriver(runner, self._prompt[: self._run.plan.prompt_tokens // 4], slot=slot)
            with nullcontext() if captured else runner.without_graphs():
                driver.prefill()
                for _ in range(min(12, self._run.plan.rounds)):
                    driver.step()
            texts.append(driver.tokens)
        same = sum(one == other for one, other in zip(*texts, strict=True))
        self._say("captured and called", same_tokens=same, of=len(texts[0]))

    def _kernels(self, runner: TorchRunner) -> None:
        """Count the kernels of one decode step, and name those that take longest."""
        from torch.profiler import ProfilerActivity, profile, supported_activities

        if ProfilerActivity.CUDA not in supported_activities():  # type: ignore[no-untyped-call]
            self._say("kernels of a step", not_measured="this build of torch cannot trace the device")
            return
        driver = SlotDriver(runner, self._prompt[: self._run.plan.prompt_tokens])
        driver.prefill()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            driver.step()
            self._run.synchronize()
        totals: dict[str, list[float]] = {}
        for event in found.events() or ():
            total = totals.setdefault(event.name[:60], [0, 0.0])
            total[0] += 1
            total[1] += event.device_time
        longest = sorted(totals.items(), key=lambda item: -item[1][1])[:12]
        # The steps that ran ahead are among them.
        self._say("kernels of a step", count=sum(int(n) for n, _ in totals.values()), longest=longest)

    def _engine(self, runner: TorchRunner) -> None:
        asyncio.run(self._through_the_engine(runner))

    async def _through_the_engine(self, runner: TorchRunner) -> None:
        """Time a token and a cancellation as a user gets them."""
        plan, device = self._run.plan, self._run.device

        def load(_spec: object, _progress: object) -> Any:
            torch.cuda.set_device(device)
            return gpu_model.loaded(runner, self._name)

        engine = LocalEngine(gpu_model.engine_spec(self._name, device), load=load)
        await engine.start(gpu_model.quiet)
        try:
            usual = self._prompt[: plan.prompt_tokens // 4]
            stats = await _ask(engine, usual, 2 + plan.rounds)
            token_ms = (stats.ended_s - stats.first_token_s) * 1000 / max(1, stats.num_generated - 1)
            short = self._prompt[:4]
            alone = [await _wait_ms(engine, short) for _ in range(max(3, plan.rounds // 4))]
            freed = []
            for turn in range(plan.rounds):
                prompt = self._prompt[turn : turn + min(plan.long_tokens // 2, runner.context - 80)]
                task = asyncio.create_task(_ask(engine, prompt, 60))
                # Through all of the prompt and the answer, from one turn to the next.
                await asyncio.wait([task], timeout=0.001 * turn)
                task.cancel()
                began = time.monotonic()
                await asyncio.gather(task, return_exceptions=True)
                await _ask(engine, short, 1)
                freed.append(max(0.0, (time.monotonic() - began) * 1000 - median(alone)))
        finally:
            await engine.close()
        self._say(
            "engine",
            ms_per_token=round(token_ms, 3),
            ms_short_request=round(median(alone), 2),
            cancel_to_free_ms={f"p{p}": round(percentile(freed, p) or 0.0, 2) for p in (50, 99)},
        )

    def _adapters(self, runner: TorchRunner) -> None:
        """Time tokens with an adapter and beside one, and the pause when it is put in."""
        run = self._run
        install = runner.prepare({_KEY: gpu_model.made_up_adapter(self._model, 16, _KEY)})
        began = time.monotonic()
        install()
        run.synchronize()
        pause_ms = (time.monotonic() - began) * 1000
        found = {}
        for slot, key in enumerate((_KEY, None)):
            driver = SlotDriver(runner, self._prompt[: run.plan.prompt_tokens], slot, key)
            driver.prefill()
            found[key] = run.ms(driver.step, run.plan.rounds)
        runner.prepare({})()
        self._say(
            "adapter of rank 16",
            ms_pause=round(pause_ms, 1),
            ms_per_token=found[_KEY],
            ms_per_token_of_the_base_beside_it=found[None],
        )


async def _ask(engine: LocalEngine, tokens: Sequence[int], count: int) -> Any:
    request = Request(tuple(tokens), count)
    async with aclosing(engine.generate(request)) as output:
        async for _ in output:
            pass
    return request.stats


async def _wait_ms(engine: LocalEngine, tokens: Sequence[int]) -> float:
    began = time.monotonic()
    await _ask(engine, tokens, 1)
    return (time.monotonic() - began) * 1000


def _gb(num_bytes: int) -> float:
    return round(num_bytes / 1e9, 3)
