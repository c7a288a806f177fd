"""`midfill eval`: how good the suggestions are."""

from __future__ import annotations

import asyncio
import time
import tomllib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from midfill.cli.shared import ADAPTER, JSON, MODEL, SCRIPT, engine_maker, read_settings, show, with_progress
from midfill.cli.terminal import say
from midfill.errors import MidfillError

if TYPE_CHECKING:
    from midfill.engine.api import Progress
    from midfill.evaluation.fillers import Filler
    from midfill.settings import Settings

_RESULTS = click.option(
    "--results", type=click.Path(path_type=Path), help="Keep results here, and go on from them."
)
_SERVER = click.option("--server", is_flag=True, help="Through `midfill serve` in a process of its own.")
_PLOT = click.option("--plot", type=click.Path(path_type=Path), help="Draw the results (PNG, SVG, PDF).")
_SET = click.option(
    "--set",
    "given",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting for this run; may be repeated.",
)

_DEADLINE_S = 120.0


@click.group("eval")
def evaluate() -> None:
    """Measure how good the suggestions are."""


@evaluate.command("infilling")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--raw", is_flag=True, help="The model alone: no anchoring, healing, stopping or clean-up.")
@click.option(
    "--cut", is_flag=True, help="Also test beginnings of a text that fails, as if it had been stopped there."
)
@_SERVER
@click.option("--limit", type=click.IntRange(1), help="At most this many tasks, evenly from each kind.")
@click.option("--max-tokens", type=click.IntRange(1, 1024), help="Most tokens of a suggestion.")
@_RESULTS
@click.option(
    "--compare", type=click.Path(path_type=Path), help="Results of another run, to compare in pairs."
)
@_PLOT
@_SET
@MODEL
@ADAPTER
@JSON
@SCRIPT
def eval_infilling(
    file: Path,
    raw: bool,
    cut: bool,
    server: bool,
    limit: int | None,
    max_tokens: int | None,
    results: Path | None,
    compare: Path | None,
    plot: Path | None,
    given: tuple[str, ...],
    model: str | None,
    adapter: str | None,
    as_json: bool,
    script: str | None,
) -> None:
    """Fill the holes of FILE's tasks, run their tests, and print what share passes.

    FILE has a JSON object a line (.jsonl or .jsonl.gz), in the format of HumanEval-Infilling: task_id,
    prompt, suffix, canonical_solution, test. The programs are run, without network where the system allows
    it, but they can write your files: use tasks that you trust. JavaScript needs node, Java a JDK.

    \b
    Examples:
      midfill eval infilling tasks.jsonl.gz --limit 40
      midfill eval infilling tasks.jsonl --results new.jsonl --compare old.jsonl --json
      midfill eval infilling tasks.jsonl --raw --cut --plot raw.png
    """
    from midfill.evaluation import infilling, records, sandbox

    if raw and server:
        raise click.UsageError("--raw leaves the server out: give one of --raw and --server.")
    draw = _plotter(plot)
    tasks, skipped = infilling.runnable(infilling.read_tasks(file))
    tasks = infilling.sample(tasks, limit) if limit else tasks
    settings = _settings(given, model=model, adapter=adapter, max_new_tokens=max_tokens)
    earlier = records.read(compare)[1] if compare else None
    header = {
        "eval": "infilling",
        "tasks": file.name,
        "cut": cut,
        "through": _through(raw, server),
        **_described(settings),
    }
    kept = records.Records(results, header)
    if any(task.id not in kept.rows for task in tasks):
        _with_filler(
            settings,
            script,
            lambda filler, tell: infilling.evaluate(tasks, filler, kept, tell, cut=cut),
            raw=raw,
            server=server,
        )
    found = [infilling.Result(**kept.rows[task.id]) for task in tasks]
    summary = {"model": settings.model, "through": _through(raw, server), **infilling.summarise(found)}
    summary |= {"network": not sandbox.isolation(), "skipped": skipped}
    if earlier is not None:
        summary["compared"] = infilling.compare(found, earlier)
    if plot is not None:
        draw.infilling(summary, plot)
    show(summary, infilling.describe, as_json=as_json)


@evaluate.command("repo")
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--holes", type=click.IntRange(1), default=100, show_default=True, help="How many holes.")
@click.option("--seed", type=int, default=0, show_default=True, help="Which holes.")
@_SERVER
@_RESULTS
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path),
    metavar="A B",
    help="Instead of a run: what is better in results B than in results A of the same holes.",
)
@_PLOT
@_SET
@MODEL
@ADAPTER
@JSON
@SCRIPT
def eval_repo(
    path: Path | None,
    holes: int,
    seed: int,
    server: bool,
    results: Path | None,
    compare: tuple[Path, Path] | None,
    plot: Path | None,
    given: tuple[str, ...],
    model: str | None,
    adapter: str | None,
    as_json: bool,
    script: str | None,
) -> None:
    """Make holes in the repository at PATH, fill them, and compare with what stood there.

    Files of recent commits are drawn more often; the same seed draws the same holes. Nothing is run or
    changed. Suggestions are asked for as by typing; what each `eagerness` would show of them is worked out
    from one run (not with --server, where the server decides). The file of --results holds source text.

    \b
    Examples:
      midfill eval repo .
      midfill eval repo ~/src/app --holes 300 --results app.jsonl --plot app.png
      midfill eval repo . --set suffix_tokens=512 --results long.jsonl
      midfill eval repo --compare short.jsonl long.jsonl --json
    """
    from midfill.completion import calibrations
    from midfill.completion.confidence import Eagerness
    from midfill.evaluation import holes as places
    from midfill.evaluation import records, repository

    if compare:
        eagerness = Eagerness(_settings(given).eagerness)
        difference = repository.compare(records.read(compare[0]), records.read(compare[1]), eagerness)
        show(difference, repository.describe_difference, as_json=as_json)
        return
    if path is None:
        raise click.UsageError("Give the PATH of a repository, or --compare A B.")
    draw = _plotter(plot)
    settings = _settings(given, model=model, adapter=adapter)
    samples = places.choose(path, settings, count=holes, seed=seed)
    eagerness = Eagerness(settings.eagerness)
    header = {"eval": "repo", "repository": path.resolve().name, "seed": seed, **_described(settings)}
    header["through"] = _through(raw=False, server=server)
    if server:
        header["eagerness"] = str(eagerness)
    else:
        # The gate is the last stage, so that it can be applied to the results.
        settings = settings.model_copy(update={"eagerness": "always"})
    kept = records.Records(results, header)
    if any(sample.id not in kept.rows for sample in samples):
        _with_filler(
            settings,
            script,
            lambda filler, tell: repository.evaluate(samples, filler, kept, tell),
            server=server,
            folder=path.resolve(),
        )
    found = [repository.read_result(kept.rows[sample.id]) for sample in samples]
    by = calibrations.in_use(settings.model).calibration
    summary = {**kept.header, **repository.summarise(found, eagerness, by)}
    if plot is not None:
        draw.repository(found, summary, plot, by)
    show(summary, repository.describe, as_json=as_json)


@evaluate.command("families")
@click.option(
    "--vocab",
    "vocabs",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A GGUF file with a vocabulary; may be repeated. Without it, the models on this machine.",
)
@click.option("--no-probe", is_flag=True, help="Only look at vocabularies; load no model.")
@JSON
def eval_families(vocabs: tuple[Path, ...], no_probe: bool, as_json: bool) -> None:
    """Hold the table of FIM families against real vocabularies and models.

    For each family: whether its sentinels are single control tokens, which ids they and its stops have,
    in which orders its prompts can be laid out. Each installed model is loaded and probed: in which
    order of prefix and suffix it finds known middles likeliest. Ends with status 1 if one disagrees.

    \b
    Examples:
      midfill eval families
      midfill eval families --vocab starcoder.gguf --vocab deepseek.gguf --json
    """
    from midfill.fim.probing import examine, table
    from midfill.models import store
    from midfill.models.gguf import tokenizer_from_gguf
    from midfill.models.tokenizer import load_tokenizer

    models = [] if vocabs else store.installed()
    tokenizers = {path.name: tokenizer_from_gguf(path) for path in vocabs}
    tokenizers |= {model.name: load_tokenizer(model.path) for model in models}
    if not tokenizers:
        raise MidfillError(
            "There is no model on this machine: run `midfill model pull`, or give --vocab FILE.gguf."
        )
    settings = read_settings()
    engines = {
        model.name: partial(engine_maker(None), settings.model_copy(update={"model": model.name}))
        for model in models
        if not no_probe
    }
    result = with_progress("probing models", lambda report: asyncio.run(examine(tokenizers, engines, report)))
    show(result, table, as_json=as_json)
    if not all(model["agrees"] for model in result["models"].values()):
        raise click.exceptions.Exit(1)


@evaluate.command("calibrate")
@click.argument("training", nargs=-1, type=click.Path(path_type=Path))
@click.option("--held-out", multiple=True, type=click.Path(path_type=Path), help="Judge it on these results.")
@click.option(
    "--write", "writes", is_flag=True, help="Use it for this model from the next start of servers on."
)
@click.option("--force", is_flag=True, help="Write it even if it is no better than the built-in one.")
@click.option("--reset", is_flag=True, help="Instead: remove what was written for the model.")
@click.option(
    "--model",
    metavar="NAME",
    help="The model it is for, as `midfill/status` names it, if not that of the results or settings.",
)
@JSON
def eval_calibrate(
    training: tuple[Path, ...],
    held_out: tuple[Path, ...],
    writes: bool,
    force: bool,
    reset: bool,
    model: str | None,
    as_json: bool,
) -> None:
    """Fit what decides on showing a suggestion (`eagerness`) to results of `midfill eval repo`.

    Give a file of results for each repository, two at least: thresholds are chosen by predictions for
    repositories that the weights have not seen. Without --write nothing changes. It is written if it
    predicts better than the built-in calibration, to a file of your own that holds numbers only.

    \b
    Examples:
      midfill eval calibrate app.jsonl tool.jsonl site.jsonl --held-out other.jsonl
      midfill eval calibrate app.jsonl tool.jsonl --write
      midfill eval calibrate --reset
    """
    from midfill.completion import calibrations

    if reset:
        if training or held_out or writes:
            raise click.UsageError("--reset stands alone, but for --model.")
        name = model or read_settings().model
        removed = calibrations.remove(name)
        text = f"Removed {removed}." if removed else f"There is no calibration of your own for {name}."
        show({"model": name, "removed": removed and str(removed)}, lambda _: text, as_json=as_json)
        return
    if not training:
        raise click.UsageError("Give files of results of `midfill eval repo`, or --reset.")
    from midfill.evaluation import calibration

    result = calibration.calibrate(training, held_out)
    result["model"] = name = model or calibration.model_of([*training, *held_out])
    result["file"] = None
    why = calibration.why_not(result)
    if writes and why is not None and not force:
        show(result, calibration.describe, as_json=as_json)
        raise MidfillError(f"Not written. {why} --force writes it anyway.")
    if writes:
        today = time.strftime("%Y-%m-%d")
        result["file"] = str(calibrations.write(calibration.to_saved(result, name, today)))
    show(result, calibration.describe, as_json=as_json)
    if writes and not as_json:
        say(f"Written to {result['file']}: {name} is judged by it from the next start on.")
    elif not as_json:
        say(why or "--write uses it.")


def _settings(given: tuple[str, ...], **overrides: Any) -> Settings:
    """The user's settings, with `--set` and other options laid over them.

    Quality is measured apart from speed, so that a slow hour of the machine does not count as silence.
    """
    overrides["deadline_s"] = _DEADLINE_S
    for one in given:
        key, equals, value = one.partition("=")
        if not equals:
            raise click.UsageError(f"--set {one}: write KEY=VALUE, for example --set max_new_tokens=64.")
        try:
            overrides[key.strip()] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            # Strings need no quotes.
            overrides[key.strip()] = value
    return read_settings(**overrides)


def _through(raw: bool, server: bool) -> str:
    return "model" if raw else "server" if server else "pipeline"


def _described(settings: Settings) -> dict[str, Any]:
    """What the header of results says of the settings: the model, and what is not the default."""
    from midfill.settings import Settings

    base = Settings()
    changed = {
        key: value
        for key, value in settings.model_dump(mode="json").items()
        if value != base.model_dump(mode="json")[key] and key not in {"model", "deadline_s", "eagerness"}
    }
    return {"model": settings.model, "settings": dict(sorted(changed.items()))}


def _with_filler(
    settings: Settings,
    script: str | None,
    work: Callable[[Filler, Callable[[float], None]], Awaitable[None]],
    *,
    raw: bool = False,
    server: bool = False,
    folder: Path | None = None,
) -> None:
    """Run `work` with a filler that is ready, under a progress bar. `folder` is the workspace, if any."""
    from midfill.evaluation import fillers
    from midfill.lsp import server_filler
    from midfill.settings import load

    async def run(report: Progress) -> None:
        def tell(share: float) -> None:
            report("filling holes", share)

        if server:
            options = server_filler.options_of(settings, load())
            filler = await server_filler.ServerFiller.start(options, settings.model, report, script, folder)
            try:
                await work(filler, tell)
            finally:
                await filler.close()
            return
        engine = engine_maker(script)(settings)
        try:
            await engine.start(report)
            if raw:
                await work(fillers.RawFiller(engine, settings), tell)
                return
            pipeline = fillers.PipelineFiller(engine, settings)
            if folder is not None:
                report("indexing", None)
                await pipeline.open_folder(folder)
            try:
                await work(pipeline, tell)
            finally:
                pipeline.close()
        finally:
            await engine.close()

    with_progress("loading the model", lambda report: asyncio.run(run(report)))


def _plotter(plot: Path | None) -> Any:
    """The module that draws, if a picture is wanted. Raises `MidfillError` before anything is measured."""
    if plot is None:
        return None
    from midfill.bench.plot import need_matplotlib
    from midfill.evaluation import plots

    need_matplotlib()
    return plots
