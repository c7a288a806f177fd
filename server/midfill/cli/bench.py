"""`midfill bench`: measure speed. `load` and `soak` are in `bench_load` and `bench_soak`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from midfill.cli.engine_choice import engine_factory, installed_model, read_settings
from midfill.cli.options import ENGINE, JSON, MODEL
from midfill.cli.terminal import say, show, with_progress
from midfill.errors import MidfillError

if TYPE_CHECKING:
    from midfill.bench.backends import Backend
    from midfill.bench.trace import TypingSession
    from midfill.engine.api import Progress
    from midfill.settings import Settings


GGUF = click.option(
    "--gguf",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="GGUF file of the same weights, for llama.cpp. [default: the one that `model pull --gguf` stored]",
)


_NUM_SIMULATED = 60
_FILES = click.option(
    "--files",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Simulate typing into this source tree.",
)
_SESSIONS = click.option(
    "--sessions",
    "num_sessions",
    type=click.IntRange(1),
    show_default=f"all of a recording, {_NUM_SIMULATED} simulated",
    help="Number of typing sessions to play: the first of a recording, or simulated.",
)
_SEED = click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Random seed of simulated typing: another one simulates another user.",
)


def typing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that `read_sessions` takes when there is no recording."""
    return _FILES(_SESSIONS(_SEED(command)))


@click.group()
def bench() -> None:
    """Measure the speed of midfill, and compare it with other engines."""


@bench.command("lsp")
@click.option(
    "--keys", type=click.IntRange(10), default=500, show_default=True, help="Number of keys to type."
)
@click.option("--busy", is_flag=True, help="Measure while a real model decodes in the same process.")
@MODEL
@JSON
def bench_lsp(keys: int, busy: bool, model: str | None, as_json: bool) -> None:
    """Measure the latency of the server without the model, per key.

    A scripted engine replaces the model. Each key is timed from its change and request to the answer.

    \b
    Examples:
      midfill bench lsp
      midfill bench lsp --keys 2000 --busy --json
    """
    from midfill.bench.lsp import bench_lsp as measure

    result = asyncio.run(measure(keys, busy_model=read_settings(model=model).model if busy else None))
    rows = (f"{key:12} {value}" for key, value in result.items())
    say(json.dumps(result) if as_json else "\n".join(rows))


@bench.command("index")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--lookups",
    type=click.IntRange(1),
    default=300,
    show_default=True,
    help="Number of context lookups to time.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Random seed: another one looks up other positions.",
)
@JSON
def bench_index(folder: Path, lookups: int, seed: int, as_json: bool) -> None:
    """Index FOLDER as the server does; print time, memory, and the latency of context lookups.

    \b
    Examples:
      midfill bench index .
      midfill bench index ~/src/app --json
    """
    from midfill.bench.index import bench_index as measure

    settings = read_settings()
    result = with_progress(
        "indexing",
        lambda report: measure(folder.resolve(), settings, report, lookups=lookups, seed=seed),
    )
    rows = (f"{key:12} {value}" for key, value in result.items())
    say(json.dumps(result) if as_json else "\n".join(rows))


@bench.command("engine")
@click.option(
    "--device",
    metavar="NAME",
    help="Device of the model: auto, cpu, cuda, cuda:N, mps, xpu. [default: the setting `device`]",
)
@GGUF
@click.option(
    "--shape", metavar="NAME", help="Use random weights of this known model shape. An unknown NAME lists all."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Number of runs of each engine."
)
@click.option(
    "--prefill-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Prompt tokens of the prefill measurement.",
)
@click.option(
    "--context-tokens",
    type=click.IntRange(1),
    default=384,
    show_default=True,
    help="Prompt tokens of the decode measurement.",
)
@click.option(
    "--cancellations",
    type=click.IntRange(0),
    default=50,
    show_default=True,
    help="Number of requests to cancel during the prefill of 4,000 tokens.",
)
@MODEL
@JSON
@ENGINE
def bench_engine(
    device: str | None,
    gguf: Path | None,
    shape: str | None,
    rounds: int,
    prefill_tokens: int,
    context_tokens: int,
    cancellations: int,
    model: str | None,
    as_json: bool,
    engine_override: str | None,
) -> None:
    """Measure prefill and decode speed, and compare with transformers' generate and llama.cpp.

    All engines run the same weights in turns, within the same minutes. llama.cpp needs the GGUF file
    (`midfill model pull NAME --gguf`) and the extra `bench`. Takes a minute or two, during which the machine
    should be idle. With --shape nothing is downloaded: random weights are written to a temporary folder (2
    bytes per weight).

    \b
    Examples:
      midfill bench engine
      midfill bench engine --gguf qwen2.5-coder-0.5b.gguf --json
      midfill bench engine --shape starcoderbase-7b --device cuda --context-tokens 2048
    """
    from midfill.bench.engine import EnginePlan, Weights, table
    from midfill.bench.engine import bench_engine as measure
    from midfill.bench.shapes import write_shape
    from midfill.models import store

    if shape is not None and (model is not None or gguf is not None):
        raise click.UsageError("--shape uses random weights: leave out --model and --gguf.")
    settings = read_settings(model=model, device=device)
    plan = EnginePlan(rounds, prefill_tokens, context_tokens, cancellations=cancellations)

    def work(report: Progress) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            used, weights = settings, Weights()
            if shape is not None:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="midfill-shape-")))
                write_shape(
                    shape, folder, report=lambda share: report(f"writing random weights of {shape}", share)
                )
                used, weights = settings.model_copy(update={"model": str(folder)}), Weights(folder)
            elif engine_override is None and settings.runner == "llamacpp":
                # In fewer bits than any folder has them.
                weights = Weights(None, gguf or store.find_gguf(settings.model))
            elif engine_override is None and (found := store.find(settings.model)) is not None:
                weights = Weights(found.path, gguf or store.find_gguf(settings.model))
            result = asyncio.run(
                measure(
                    used, engine_factory(engine_override, drafts=False), report, weights=weights, plan=plan
                )
            )
            return result if shape is None else result | {"model": f"random:{shape}"}

    show(with_progress("loading the model", work), table, as_json=as_json)


@bench.command("adapters")
@click.option("--rank", type=click.IntRange(1, 256), default=16, show_default=True, help="LoRA rank.")
@click.option(
    "--rounds", type=click.IntRange(1), default=8, show_default=True, help="Number of runs of each kind."
)
@click.option(
    "--device",
    metavar="NAME",
    help="Device of the model: auto, cpu, cuda, cuda:N, mps, xpu. [default: the setting `device`]",
)
@MODEL
@JSON
def bench_adapters(rank: int, rounds: int, device: str | None, model: str | None, as_json: bool) -> None:
    """Measure the cost of an adapter: time per token with and without it, and time of a swap.

    Random adapters are written to a temporary folder. The model is loaded twice; the machine should be idle.

    \b
    Examples:
      midfill bench adapters
      midfill bench adapters --rank 64 --json
    """
    from midfill.bench.adapters import AdapterPlan, table
    from midfill.bench.adapters import bench_adapters as measure

    settings = read_settings(model=model, device=device, engine="local")
    found = installed_model(settings.model)
    make = engine_factory(None, drafts=False)
    with TemporaryDirectory(prefix="midfill-adapters-") as folder:
        result = with_progress(
            "measuring",
            lambda report: asyncio.run(
                measure(
                    settings,
                    make,
                    found,
                    folder=Path(folder),
                    plan=AdapterPlan(rank=rank, rounds=rounds),
                    progress=report,
                )
            ),
        )
    show(result, table, as_json=as_json)


@bench.command("replay")
@click.argument("trace", metavar="[TRACE]", required=False, type=click.Path(path_type=Path))
@typing_options
@click.option(
    "--limit-s", type=click.FloatRange(0, min_open=True), help="Stop typing after this many seconds."
)
@click.option(
    "--speed",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Speed-up factor.",
)
@click.option(
    "--accept/--no-accept",
    "accepts",
    default=True,
    help="Accept correct suggestions, or type through them.",
    show_default=True,
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw latencies and outcomes to this file (PNG, SVG or PDF).",
)
@click.option(
    "--against",
    type=click.Choice(["llama.cpp", "generate"]),
    multiple=True,
    help="Also play each session with this engine, in turns, and print the ratios. May be repeated.",
)
@GGUF
@click.option(
    "--lines",
    type=(click.IntRange(1), click.IntRange(0)),
    default=(256, 64),
    show_default=True,
    help="Number of lines before and after the cursor that llama.cpp is sent.",
)
@click.option(
    "--patient",
    is_flag=True,
    help="Let llama.cpp finish and cache outdated requests, as its editor plugin does.",
)
@MODEL
@JSON
@ENGINE
def bench_replay(
    trace: Path | None,
    files: Path | None,
    seed: int,
    num_sessions: int | None,
    limit_s: float | None,
    speed: float,
    accepts: bool,
    plot: Path | None,
    against: tuple[str, ...],
    gguf: Path | None,
    lines: tuple[int, int],
    patient: bool,
    model: str | None,
    as_json: bool,
    engine_override: str | None,
) -> None:
    """Play recorded or simulated typing to the real server, in real time, and measure what the user gets.

    TRACE is a file of recorded typing (.jsonl or .jsonl.gz). With --files, typing is simulated from
    statistics of real users; the same seed gives the same typing. Each key cancels the request before it. A
    suggestion that agrees with the text to be typed is accepted.

    \b
    Examples:
      midfill bench replay typing.jsonl.gz --limit-s 120
      midfill bench replay --files src --seed 1 --plot replay.png --json
      midfill bench replay typing.jsonl.gz --limit-s 90 --against llama.cpp
    """
    from midfill.bench import replay
    from midfill.bench import replay_report as report
    from midfill.bench.backends import ServerBackend
    from midfill.bench.plot import need_matplotlib
    from midfill.bench.plot import plot as draw

    if plot is not None:
        need_matplotlib()
    sessions = read_sessions(trace, files, seed, num_sessions)
    settings = read_settings(model=model)
    baselines = [_baseline(name, settings, gguf, lines, patient=patient) for name in dict.fromkeys(against)]
    backends = [ServerBackend(engine_override, {"model": model} if model else None), *baselines]
    runs = with_progress(
        "loading the model",
        lambda tell: asyncio.run(
            replay.replay(sessions, backends, tell, replay.Pace(speed, limit_s, accepts))
        ),
    )
    what: dict[str, Any] = {"trace": str(trace or files), "seed": seed if files else None, "speed": speed}
    what["accepts"] = accepts
    what["model"] = settings.model if engine_override is None else "scripted"
    summary = what | report.summarise(runs[0])
    if baselines:
        summary["others"] = {run.name: report.summarise(run) for run in runs[1:]}
        summary["ratios"] = report.compare(runs[0], runs[1:])
        summary["llama.cpp"] = {"lines": lines, "patient": patient} if "llama.cpp" in against else None
    if plot is not None:
        draw(runs, "midfill bench replay: {model}, {trace}".format(**summary), plot)
    show(summary, report.table, as_json=as_json)


def read_sessions(
    trace: Path | None, files: Path | None, seed: int, num_sessions: int | None
) -> list[TypingSession]:
    """Read a recording, or simulate typing by `typing_options`. Raises `MidfillError`."""
    from midfill.bench import trace as traces
    from midfill.bench import virtual_user

    if trace is not None and files is None:
        return traces.read_trace(trace)[:num_sessions]
    if files is not None and trace is None:
        return virtual_user.generate(files, seed, num_sessions or _NUM_SIMULATED)
    raise click.UsageError("Give either a TRACE (a file of recorded typing) or --files DIR (a source tree).")


def _baseline(
    name: str, settings: Settings, gguf: Path | None, lines: tuple[int, int], *, patient: bool
) -> Backend:
    """Return another engine on the same weights. Raises `MidfillError` if it is not installed."""
    from midfill.bench.backends import GenerateBackend
    from midfill.bench.baselines import can_run_llama_cpp
    from midfill.bench.llama_vim import LlamaVim, Options
    from midfill.engine.llamacpp.bindings import INSTALL, PACKAGE
    from midfill.models import store

    if name == "generate":
        return GenerateBackend(installed_model(settings.model), settings)
    if not can_run_llama_cpp():
        raise MidfillError(f"--against llama.cpp needs {PACKAGE}. Run: {INSTALL}")
    if (file := gguf or store.find_gguf(settings.model)) is None:
        raise MidfillError(
            "--against llama.cpp needs the weights as a GGUF file. "
            f"Run: midfill model pull {settings.model} --gguf"
        )
    return LlamaVim(file, Options(*lines, patient=patient))


@bench.command("shared")
@click.option(
    "--rounds",
    type=click.IntRange(4, 1000),
    default=60,
    show_default=True,
    help="Number of requests to each.",
)
@MODEL
@JSON
def bench_shared(rounds: int, model: str | None, as_json: bool) -> None:
    """Measure the cost of `engine = "shared"`: a model in another process instead of the server's.

    Needs memory for two copies of the model.

    \b
    Example:
      midfill bench shared --rounds 100 --json
    """
    from midfill.bench import shared_engine

    settings = read_settings(model=model)
    here, shared = engine_factory("local"), engine_factory("shared")
    result = with_progress(
        "measuring",
        lambda report: asyncio.run(
            shared_engine.measure(lambda: here(settings), lambda: shared(settings), rounds, report)
        ),
    )
    show(result, shared_engine.table, as_json=as_json)
