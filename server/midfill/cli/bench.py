"""`midfill bench`: how fast the suggestions come."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from midfill.cli.shared import JSON, MODEL, SCRIPT, engine_maker, read_settings, show, with_progress
from midfill.cli.terminal import say
from midfill.errors import MidfillError

if TYPE_CHECKING:
    from midfill.bench.backends import Backend
    from midfill.bench.trace import TypingSession
    from midfill.engine.api import Progress
    from midfill.settings import Settings


GGUF = click.option(
    "--gguf",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The same weights, for the comparison with llama.cpp; else the one that was pulled.",
)


_MADE_UP = 60
_FILES = click.option(
    "--files", type=click.Path(path_type=Path), help="Make up typing into this source tree."
)
_EPISODES = click.option(
    "--episodes",
    type=click.IntRange(1),
    show_default=f"all of a recording, {_MADE_UP} made up",
    help="How many to play: the first of a recording, or made up.",
)
_SEED = click.option(
    "--seed", type=int, default=0, show_default=True, help="Another seed is another typist with other typing."
)


def typing_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of what is typed, where that is no recording; see `read_sessions`."""
    return _FILES(_EPISODES(_SEED(command)))


@click.group()
def bench() -> None:
    """Measure midfill's own speed."""


@bench.command("lsp")
@click.option("--keys", type=click.IntRange(10), default=500, show_default=True, help="Keys to type.")
@click.option("--busy", is_flag=True, help="While a real model decodes in the same process.")
@MODEL
@JSON
def bench_lsp(keys: int, busy: bool, model: str | None, as_json: bool) -> None:
    """Type into the real server and measure what all but the model takes.

    A script takes the model's place; each key is timed from its change and request to the answer.

    """
    from midfill.bench.lsp import bench_lsp as measure

    result = asyncio.run(measure(keys, busy_model=read_settings(model=model).model if busy else None))
    rows = (f"{key:12} {value}" for key, value in result.items())
    say(json.dumps(result) if as_json else "\n".join(rows))


@bench.command("index")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--lookups", type=click.IntRange(1), default=300, show_default=True, help="Places to try.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which places.")
@JSON
def bench_index(folder: Path, lookups: int, seed: int, as_json: bool) -> None:
    """Index FOLDER as the server does: time, memory, and what a request waits for its context.

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
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")
@GGUF
@click.option("--shape", metavar="NAME", help="Random weights of a known shape; a wrong NAME lists them.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--prefill-tokens", type=click.IntRange(1), default=512, show_default=True, help="To read.")
@click.option(
    "--context-tokens", type=click.IntRange(1), default=384, show_default=True, help="Before what is written."
)
@click.option(
    "--cancellations",
    type=click.IntRange(0),
    default=50,
    show_default=True,
    help="Requests to take back while a prompt of 4,000 tokens is read.",
)
@MODEL
@JSON
@SCRIPT
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
    script: str | None,
) -> None:
    """Measure how fast the model reads and writes, beside generate and llama.cpp.

    All run the same weights in turn, in the same minutes; the GGUF file (`midfill model pull NAME --gguf`)
    and the package xllamacpp (`pip install xllamacpp`) are needed for llama.cpp. It takes a minute
    or two: leave the machine alone. With --shape nothing is fetched: the weights are made up, in a
    temporary folder (2 bytes a weight).

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
        raise click.UsageError("--shape makes a model up: give it without --model and --gguf.")
    settings = read_settings(model=model, device=device)
    plan = EnginePlan(rounds, prefill_tokens, context_tokens, cancellations=cancellations)

    def work(report: Progress) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            used, weights = settings, Weights()
            if shape is not None:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="midfill-shape-")))
                write_shape(shape, folder, report=lambda share: report(f"making up {shape}", share))
                used, weights = settings.model_copy(update={"model": str(folder)}), Weights(folder)
            elif script is None and (found := store.find(settings.model)) is not None:
                weights = Weights(found.path, gguf or store.find_gguf(settings.model))
            result = asyncio.run(
                measure(used, engine_maker(script, drafts=False), report, weights=weights, plan=plan)
            )
            return result if shape is None else result | {"model": f"random:{shape}"}

    show(with_progress("loading the model", work), table, as_json=as_json)


@bench.command("adapters")
@click.option("--rank", type=click.IntRange(1, 256), default=16, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=8, show_default=True)
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")
@MODEL
@JSON
def bench_adapters(rank: int, rounds: int, device: str | None, model: str | None, as_json: bool) -> None:
    """Measure what an adapter costs: a token with it and without, and a swap while an answer is written.

    The adapters are made up, in a temporary folder. The model is loaded twice: leave the machine alone.

    \b
    Examples:
      midfill bench adapters
      midfill bench adapters --rank 64 --json
    """
    from midfill.bench.adapters import AdapterPlan, table
    from midfill.bench.adapters import bench_adapters as measure
    from midfill.models import store

    settings = read_settings(model=model, device=device, engine="local")
    if (found := store.find(settings.model)) is None:
        raise MidfillError(f"{settings.model!r} is not on this machine: midfill model pull {settings.model}")
    make = engine_maker(None, drafts=False)
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
@click.option("--limit-s", type=click.FloatRange(0, min_open=True), help="Stop typing after so many seconds.")
@click.option(
    "--speed", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="Type faster."
)
@click.option(
    "--accept/--no-accept",
    "accepts",
    default=True,
    help="Whether right suggestions are accepted; otherwise they are typed through.",
)
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw the latencies and the outcomes (PNG, SVG, PDF)."
)
@click.option(
    "--against",
    type=click.Choice(["llama.cpp", "generate"]),
    multiple=True,
    help="Play every document to this engine too, in turn, and print the ratios. May be given twice.",
)
@GGUF
@click.option(
    "--lines",
    type=(click.IntRange(1), click.IntRange(0)),
    default=(256, 64),
    show_default=True,
    help="Whole lines before and after the cursor that llama.cpp is sent.",
)
@click.option(
    "--patient",
    is_flag=True,
    help="llama.cpp finishes, and keeps, what nobody waits for: so its plugin does.",
)
@MODEL
@JSON
@SCRIPT
def bench_replay(
    trace: Path | None,
    files: Path | None,
    seed: int,
    episodes: int | None,
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
    script: str | None,
) -> None:
    """Type like a person into the real server, in real time, and measure what the person gets.

    TRACE is a file of recorded typing (.jsonl or .jsonl.gz); with --files the typing is made up from
    statistics of real people, the same for the same seed. Requests are cancelled by the next key, and a
    suggestion that leads to the text that is to be typed is accepted.

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
    sessions = read_sessions(trace, files, seed, episodes)
    settings = read_settings(model=model)
    baselines = [_baseline(name, settings, gguf, lines, patient=patient) for name in dict.fromkeys(against)]
    backends = [ServerBackend(script, {"model": model} if model else None), *baselines]
    runs = with_progress(
        "loading the model",
        lambda tell: asyncio.run(
            replay.replay(sessions, backends, tell, replay.Pace(speed, limit_s, accepts))
        ),
    )
    what: dict[str, Any] = {"trace": str(trace or files), "seed": seed if files else None, "speed": speed}
    what["accepts"] = accepts
    what["model"] = settings.model if script is None else "scripted"
    summary = what | report.summarise(runs[0])
    if baselines:
        summary["others"] = {run.name: report.summarise(run) for run in runs[1:]}
        summary["ratios"] = report.compare(runs[0], runs[1:])
        summary["llama.cpp"] = {"lines": lines, "patient": patient} if "llama.cpp" in against else None
    if plot is not None:
        draw(runs, "midfill bench replay: {model}, {trace}".format(**summary), plot)
    show(summary, report.table, as_json=as_json)


def read_sessions(
    trace: Path | None, files: Path | None, seed: int, episodes: int | None
) -> list[TypingSession]:
    """What is to be typed: a recording, or what `typing_options` say. Raises `MidfillError`."""
    from midfill.bench import trace as traces
    from midfill.bench import virtual_user

    if trace is not None and files is None:
        return traces.read_trace(trace)[:episodes]
    if files is not None and trace is None:
        return virtual_user.generate(files, seed, episodes or _MADE_UP)
    raise click.UsageError("Give either a TRACE, a file of recorded typing, or --files DIR, a source tree.")


def _baseline(
    name: str, settings: Settings, gguf: Path | None, lines: tuple[int, int], *, patient: bool
) -> Backend:
    """Another engine on the same weights. Raises `MidfillError` with the remedy if it cannot be had."""
    from midfill.bench.backends import GenerateBackend
    from midfill.bench.baselines import can_run_llama_cpp
    from midfill.bench.llama_vim import LlamaVim, Options
    from midfill.models import store

    found = store.find(settings.model)
    if name == "generate":
        if found is None:
            raise MidfillError(f"Fetch the model first: midfill model pull {settings.model}")
        return GenerateBackend(found, settings)
    if not can_run_llama_cpp():
        raise MidfillError("--against llama.cpp needs xllamacpp. Run: pip install xllamacpp")
    if (file := gguf or store.find_gguf(settings.model)) is None:
        raise MidfillError(
            "--against llama.cpp needs the weights as a GGUF file. "
            f"Run: midfill model pull {settings.model} --gguf"
        )
    return LlamaVim(file, Options(*lines, patient=patient))


@bench.command("shared")
@click.option("--rounds", type=click.IntRange(4, 1000), default=60, show_default=True)
@MODEL
@JSON
def bench_shared(rounds: int, model: str | None, as_json: bool) -> None:
    """What it costs that the model is in another process (`engine = "shared"`), beside one in this process.

    Needs memory for two models.

    \b
    Example:
      midfill bench shared --rounds 100 --json
    """
    from midfill.bench import shared_engine

    settings = read_settings(model=model)
    here, shared = engine_maker("local"), engine_maker("shared")
    result = with_progress(
        "measuring",
        lambda report: asyncio.run(
            shared_engine.measure(lambda: here(settings), lambda: shared(settings), rounds, report)
        ),
    )
    show(result, shared_engine.table, as_json=as_json)
