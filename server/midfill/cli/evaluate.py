"""`midfill eval`: measure how good the suggestions are."""

from __future__ import annotations

import asyncio
import time
import tomllib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from midfill.cli.engine_choice import engine_factory, read_settings
from midfill.cli.options import ADAPTER, ENGINE, JSON, MODEL
from midfill.cli.terminal import say, show, with_progress
from midfill.errors import MidfillError

if TYPE_CHECKING:
    from midfill.engine.api import Progress
    from midfill.evaluation.fillers import Filler
    from midfill.settings import Settings

_FILE = click.Path(path_type=Path)
_RESULTS = click.option(
    "--results", type=_FILE, help="Save results to this file, and skip those that it has already."
)
_SERVER = click.option(
    "--server", is_flag=True, help="Ask a `midfill serve` process, as an editor would, not the pipeline."
)
_PLOT = click.option("--plot", type=_FILE, help="Draw the results to this file (PNG, SVG or PDF).")
_SET = click.option(
    "--set",
    "given",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting for this run. May be repeated.",
)

_DEADLINE_S = 120.0


@click.group("eval")
def evaluate() -> None:
    """Measure how good the suggestions are."""


@evaluate.command("infilling")
@click.argument("file", type=_FILE)
@click.option(
    "--raw", is_flag=True, help="Ask the model alone: no anchoring, token healing, early stop or clean-up."
)
@click.option(
    "--cut",
    is_flag=True,
    help="If a text fails, also test its beginnings, as if generation had stopped there.",
)
@_SERVER
@click.option("--limit", type=click.IntRange(1), help="Maximum number of tasks, spread over all kinds.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 1024),
    help="Maximum number of tokens per suggestion. [default: the setting `max_new_tokens`]",
)
@_RESULTS
@click.option("--compare", type=_FILE, help="Compare with these results of another run, task by task.")
@_PLOT
@_SET
@MODEL
@ADAPTER
@JSON
@ENGINE
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
    engine_override: str | None,
) -> None:
    """Fill the holes of FILE's tasks, run their tests, and print what is right.

    Prints the shares whose tests pass, that are the original text, whose first line is the original's ("line
    0"), and that are empty and why, by kind and language.

    FILE has one JSON object per line (.jsonl or .jsonl.gz): task_id, language, prompt, suffix,
    canonical_solution, and as tests `test` (HumanEval-Infilling), `io_tests` (SAFIM) or none. The programs
    are run, without network where the system allows it, but they can write your files: use tasks that you
    trust. JavaScript needs node, Java a JDK, C++ needs g++.

    \b
    Examples:
      midfill eval infilling tasks.jsonl.gz --limit 40
      midfill eval infilling tasks.jsonl --results new.jsonl --compare old.jsonl --json
      midfill eval infilling tasks.jsonl --raw --cut --plot raw.png
    """
    from midfill.evaluation import infilling, infilling_tasks, records

    if raw and server:
        raise click.UsageError("--raw and --server exclude each other.")
    draw = _plotter(plot)
    tasks, skipped = infilling_tasks.runnable(infilling_tasks.read_tasks(file))
    tasks = infilling_tasks.sample(tasks, limit) if limit else tasks
    settings = _settings(given, model=model, adapter=adapter, max_new_tokens=max_tokens)
    earlier = records.read(compare)[1] if compare else None
    through = _through(raw, server)
    header = {
        "eval": "infilling",
        "version": 2,
        "tasks": file.name,
        "cut": cut,
        "through": through,
        **_described(settings),
    }
    kept = records.Records(results, header)
    if any(task.id not in kept.rows for task in tasks):

        async def fill(filler: Filler, tell: Callable[[float], None]) -> None:
            await infilling.evaluate(tasks, filler, kept, tell, cut=cut)

        _with_filler(settings, engine_override, fill, raw=raw, server=server)
    summary = {"model": settings.model, "through": through}
    summary |= _infilling_summary([kept.rows[task.id] for task in tasks], skipped, earlier)
    if plot is not None:
        draw.infilling(summary, plot)
    show(summary, infilling.describe, as_json=as_json)


def _infilling_summary(rows: list[dict[str, Any]], skipped: Any, earlier: Any) -> dict[str, Any]:
    """Return the pass rates of the results and, if there are earlier results, the comparison with them."""
    from midfill.evaluation import infilling, sandbox

    found = [infilling.Result(**row) for row in rows]
    summary = {**infilling.summarise(found), "network": not sandbox.isolation(), "skipped": skipped}
    if earlier is not None:
        summary["compared"] = infilling.compare(found, earlier)
    return summary


@evaluate.command("edits")
@click.argument("folder", metavar="DIR", type=_FILE)
@_RESULTS
@_SET
@MODEL
@ADAPTER
@JSON
@ENGINE
def eval_edits(
    folder: Path,
    results: Path | None,
    given: tuple[str, ...],
    model: str | None,
    adapter: str | None,
    as_json: bool,
    engine_override: str | None,
) -> None:
    """Play next-edit scenarios to a server, and print how often it makes the right edit or stays silent.

    DIR has .txtar files: each a buffer, a cursor, earlier edits, and the buffer as it should be after the
    next one, or that nothing must be suggested. "score" is the mean agreement of the changed lines with the
    expected ones (chrF, 0 to 1), where no suggestion counts as 0; "quiet" is the share of the scenarios
    without a next edit in which nothing was suggested.

    \b
    Examples:
      midfill eval edits scenarios/
      midfill eval edits scenarios/ --set max_new_tokens=64 --results long.jsonl --json
    """
    from midfill.evaluation import next_edits, records
    from midfill.lsp.server_editor import ServerEditor
    from midfill.lsp.server_filler import options_of, start_server
    from midfill.settings import load

    scenarios = next_edits.read_scenarios(folder)
    settings = _settings(given, model=model, adapter=adapter)
    header = {"eval": "edits", "scenarios": folder.resolve().name, **_described(settings)}
    kept = records.Records(results, header)

    async def run(report: Progress) -> None:
        client = await start_server(options_of(settings, load()), report, engine_override)
        try:
            await next_edits.evaluate(
                scenarios,
                ServerEditor(client, settings.model),
                kept,
                lambda share: report("playing scenarios", share),
            )
        finally:
            await client.close()

    if any(scenario.id not in kept.rows for scenario in scenarios):
        with_progress("loading the model", lambda report: asyncio.run(run(report)))
    found = [next_edits.Result(**kept.rows[scenario.id]) for scenario in scenarios]
    summary = {"model": settings.model, **next_edits.summarise(found)}
    show(summary, next_edits.describe, as_json=as_json)


@evaluate.command("repo")
@click.argument("path", type=_FILE, required=False)
@click.option("--holes", type=click.IntRange(1), default=100, show_default=True, help="Number of holes.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Random seed: another one chooses other holes."
)
@click.option(
    "--places",
    type=click.Choice(["all", "line-ends", "inside"]),
    default="all",
    show_default=True,
    help="Where holes may be: at the ends of lines, inside lines and words, or both.",
)
@_SERVER
@_RESULTS
@click.option(
    "--compare",
    nargs=2,
    type=_FILE,
    metavar="A B",
    help="Run nothing: print what changed from results A to results B of the same holes.",
)
@_PLOT
@_SET
@MODEL
@ADAPTER
@JSON
@ENGINE
def eval_repo(
    path: Path | None,
    holes: int,
    seed: int,
    places: str,
    server: bool,
    results: Path | None,
    compare: tuple[Path, Path] | None,
    plot: Path | None,
    given: tuple[str, ...],
    model: str | None,
    adapter: str | None,
    as_json: bool,
    engine_override: str | None,
) -> None:
    """Cut holes into the repository at PATH, fill them, and compare with the original code.

    Recently committed files are chosen more often; the same seed chooses the same holes. Nothing is executed
    or changed. Suggestions are requested as while typing. One run gives the results for every `eagerness`
    (except with --server, where the server's setting decides). The file of --results contains source text.

    \b
    Examples:
      midfill eval repo .
      midfill eval repo ~/src/app --holes 300 --results app.jsonl --plot app.png
      midfill eval repo . --places inside --set suffix_tokens=512 --results long.jsonl
      midfill eval repo --compare short.jsonl long.jsonl --json
    """
    if compare:
        _compare_repo_results(*compare, _settings(given).eagerness, as_json=as_json)
        return
    if path is None:
        raise click.UsageError("Give the PATH of a repository, or --compare A B.")
    from midfill.completion import calibrations
    from midfill.completion.confidence import Eagerness
    from midfill.evaluation import repository

    draw = _plotter(plot)
    settings = _settings(given, model=model, adapter=adapter)
    eagerness = Eagerness(settings.eagerness)
    header = {"eval": "repo", "repository": path.resolve().name, "seed": seed, **_described(settings)}
    header["places"] = places
    header["through"] = _through(raw=False, server=server)
    if server:
        header["eagerness"] = str(eagerness)
    kept_header, rows = _fill_repo_holes(
        path,
        settings,
        header,
        engine_override,
        results=results,
        server=server,
        count=holes,
        seed=seed,
        places=places,
    )
    found = [repository.read_result(row) for row in rows]
    by = calibrations.in_use(settings.model).calibration
    summary = {**kept_header, **repository.summarise(found, eagerness, by)}
    if plot is not None:
        draw.repository(found, summary, plot, by)
    show(summary, repository.describe, as_json=as_json)


def _compare_repo_results(first: Path, second: Path, eagerness: str, *, as_json: bool) -> None:
    from midfill.completion.confidence import Eagerness
    from midfill.evaluation import records, repository

    difference = repository.compare(records.read(first), records.read(second), Eagerness(eagerness))
    show(difference, repository.describe_difference, as_json=as_json)


def _fill_repo_holes(
    path: Path,
    settings: Settings,
    header: dict[str, Any],
    engine_override: str | None,
    *,
    results: Path | None,
    server: bool,
    **draw: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Fill the holes that the file of results does not have yet. Return its header and a row per hole.

    `draw` is passed to `holes.choose`.
    """
    from midfill.evaluation import holes, records, repository

    samples = holes.choose(path, settings, **draw)
    kept = records.Records(results, header)
    if not server:
        # The confidence filter is the last stage, so it can be applied to the results afterwards.
        settings = settings.model_copy(update={"eagerness": "always"})
    if any(sample.id not in kept.rows for sample in samples):

        async def fill(filler: Filler, tell: Callable[[float], None]) -> None:
            await repository.evaluate(samples, filler, kept, tell)

        _with_filler(settings, engine_override, fill, server=server, folder=path.resolve())
    return kept.header, [kept.rows[sample.id] for sample in samples]


@evaluate.command("families")
@click.option(
    "--vocab",
    "vocabs",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="GGUF file with a vocabulary. May be repeated. [default: the models on this machine]",
)
@click.option("--no-probe", is_flag=True, help="Check vocabularies only; load no model.")
@JSON
def eval_families(vocabs: tuple[Path, ...], no_probe: bool, as_json: bool) -> None:
    """Check the table of FIM families against real vocabularies and models.

    For each family, prints if its sentinels are single control tokens, the ids of the sentinels and stops,
    and the prompt layouts that it supports. Each installed model is loaded and probed for the order of
    prefix and suffix with the lowest log-loss of known middles. Exits with status 1 if a model disagrees
    with its family.

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
            "There is no model on this machine. Run `midfill model pull NAME`, or give --vocab FILE.gguf."
        )
    settings = read_settings()
    engines = {
        model.name: partial(engine_factory(None), settings.model_copy(update={"model": model.name}))
        for model in models
        if not no_probe
    }
    result = with_progress("probing models", lambda report: asyncio.run(examine(tokenizers, engines, report)))
    show(result, table, as_json=as_json)
    if not all(model["agrees"] for model in result["models"].values()):
        raise click.exceptions.Exit(1)


@evaluate.command("calibrate")
@click.argument("training", metavar="[RESULTS]...", nargs=-1, type=_FILE)
@click.option("--held-out", multiple=True, type=_FILE, help="Evaluate on these results. May be repeated.")
@click.option(
    "--write", "writes", is_flag=True, help="Save it for this model. Servers use it when they next start."
)
@click.option("--force", is_flag=True, help="With --write: save it even if the built-in one is better.")
@click.option("--reset", is_flag=True, help="Remove the saved calibration of the model instead.")
@click.option(
    "--model",
    metavar="NAME",
    help="Model to calibrate. [default: that of the results; with --reset, that of your settings]",
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
    """Fit the confidence filter (setting `eagerness`) to results of `midfill eval repo`.

    The filter decides which suggestions are shown. Give one file of RESULTS per repository, at least two:
    thresholds are chosen on repositories that the weights were not fitted to. With --write, the calibration
    is saved if it predicts better than the built-in one. The saved file contains numbers only.

    \b
    Examples:
      midfill eval calibrate app.jsonl tool.jsonl site.jsonl --held-out other.jsonl
      midfill eval calibrate app.jsonl tool.jsonl --write
      midfill eval calibrate --reset
    """
    from midfill.completion import calibrations

    if reset:
        if training or held_out or writes:
            raise click.UsageError("--reset takes no RESULTS, --held-out or --write.")
        name = model or read_settings().model
        removed = calibrations.remove(name)
        text = f"Removed {removed}." if removed else f"There is no saved calibration for {name}."
        show({"model": name, "removed": removed and str(removed)}, lambda _: text, as_json=as_json)
        return
    if not training:
        raise click.UsageError("Give result files of `midfill eval repo`, or --reset.")
    from midfill.evaluation import calibration

    result = calibration.calibrate(training, held_out)
    result["model"] = name = model or calibration.model_of([*training, *held_out])
    result["file"] = None
    why = calibration.why_not(result)
    if writes and why is not None and not force:
        show(result, calibration.describe, as_json=as_json)
        raise MidfillError(f"Not saved. {why} To save it anyway, add --force.")
    if writes:
        today = time.strftime("%Y-%m-%d")
        result["file"] = str(calibrations.write(calibration.to_saved(result, name, today)))
    show(result, calibration.describe, as_json=as_json)
    if writes and not as_json:
        say(f"Saved to {result['file']}. Servers use it for {name} when they next start.")
    elif not as_json:
        say(why or "To use it, add --write.")


def _settings(given: tuple[str, ...], **overrides: Any) -> Settings:
    """Return the user's settings, with `--set` and other options on top.

    The deadline is long: quality is measured apart from speed, so a slow machine must not lose suggestions.
    """
    overrides["deadline_s"] = _DEADLINE_S
    for one in given:
        key, equals, value = one.partition("=")
        if not equals:
            raise click.UsageError(
                f"--set {one} is not KEY=VALUE. Write, for example, --set max_new_tokens=64."
            )
        try:
            overrides[key.strip()] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            # Strings need no quotes.
            overrides[key.strip()] = value
    return read_settings(**overrides)


def _through(raw: bool, server: bool) -> str:
    return "model" if raw else "server" if server else "pipeline"


def _described(settings: Settings) -> dict[str, Any]:
    """Return the settings for the header of results: the model, and all that are not the default."""
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
    engine_override: str | None,
    work: Callable[[Filler, Callable[[float], None]], Awaitable[None]],
    *,
    raw: bool = False,
    server: bool = False,
    folder: Path | None = None,
) -> None:
    """Run `work` with a started filler, under a progress bar. `folder` is the workspace, if any."""
    from midfill.evaluation import fillers
    from midfill.lsp import server_filler
    from midfill.settings import load

    async def run(report: Progress) -> None:
        def tell(share: float) -> None:
            report("filling holes", share)

        if server:
            options = server_filler.options_of(settings, load())
            filler = await server_filler.ServerFiller.start(
                options, settings.model, report, engine_override, folder
            )
            try:
                await work(filler, tell)
            finally:
                await filler.close()
            return
        engine = engine_factory(engine_override)(settings)
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
    """Return the module that draws plots, or None. Raises `MidfillError` if matplotlib is missing."""
    if plot is None:
        return None
    from midfill.bench.plot import need_matplotlib
    from midfill.evaluation import plots

    need_matplotlib()
    return plots
