"""The verdict: whether an adapter is better than its base model on a repository's newest commits.

All conditions must hold: the adapter's files are intact and reproduce what was trained; on the test commits,
which were used neither for training nor for choosing, its log-loss (middle and end) is significantly lower,
with commits as clusters; it saves at least as many characters with the server's prompts, context and filters;
it does not make other code worse; it does not slow down answers. "rejected" and "inconclusive" both mean off.
`decide` is pure; the other functions measure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from midfill.adapters.registry import Evaluation
from midfill.completion.answer import Trigger
from midfill.engine.api import Engine, EngineSpec
from midfill.engine.factory import create
from midfill.errors import EngineError
from midfill.evaluation.fillers import Hole, PipelineFiller
from midfill.evaluation.records import Records
from midfill.evaluation.repository import score
from midfill.evaluation.statistics import ALPHA, Effect, effect, median_bounds, more_commits
from midfill.models import store
from midfill.models.store import LocalModel
from midfill.settings import Settings
from midfill.training.data import Example
from midfill.training.job import Limits

if TYPE_CHECKING:
    from midfill.training.model import Adapted

Verdict = Literal["enabled", "rejected", "inconclusive"]
SCALES = (1.0, 0.75, 0.5)
NUM_HOLES = 24
# Kinds of holes with nothing after the cursor on its line, where the server answers automatic requests.
_HOLE_KINDS = ("line", "block")
_ZERO_SCALE_TOLERANCE = 1e-4
_SAVED_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class HoleResults:
    """Suggestions for the same holes with the base model and with the adapter.

    Attributes:
        base, adapter: characters saved; see `evaluation.repository.score`.
        latency: median of the ratio of the answers' times, adapter to base; None if there were no holes.
        latency_bounds: bounds of that median; far from each other on a busy machine.
        pairs: for the report: the hole, the author's text, the base's suggestion, the adapter's suggestion.
    """

    base: int
    adapter: int
    latency: float | None
    latency_bounds: tuple[float, float] = (-math.inf, math.inf)
    pairs: tuple[tuple[str, str, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Measurements:
    """Everything that a verdict is based on; None or empty was not measured.

    Attributes:
        problems: faults of the adapter itself, a sentence each.
        scale: the chosen strength of the adapter; 0 means that the base was best on the dev commits.
        dev: log-loss per token on the dev commits, by scale.
        effect: gain on the test commits.
        nll_base, nll_adapter: log-loss per token on the test commits.
        gain_at_ends: the part of the gain per token that comes from predicting where the middle ends; the
            rest comes from the middle's text.
        general: log-loss on other code, as a share of the base's.
        hole_results: suggestions with and without the adapter.
        num_comparisons: adapters that these test commits have been used for, this one included.
        by_commit: (commit, gain per token, tokens), in order of time.
    """

    problems: tuple[str, ...] = ()
    scale: float = 1.0
    dev: Mapping[str, float] = field(default_factory=dict)
    effect: Effect | None = None
    nll_base: float | None = None
    nll_adapter: float | None = None
    gain_at_ends: float | None = None
    general: float | None = None
    hole_results: HoleResults | None = None
    num_comparisons: int = 1
    by_commit: tuple[tuple[str, float, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict with its reasons, a sentence each."""

    verdict: Verdict
    reasons: tuple[str, ...]


def decide(measurements: Measurements, limits: Limits | None = None) -> Decision:
    """Return the verdict with its reasons. "enabled" requires that every condition holds."""
    limits = limits or Limits()
    if measurements.problems:
        return Decision("rejected", measurements.problems)
    if measurements.scale == 0:
        return Decision(
            "rejected", ("On the dev commits, no strength of the adapter is better than the base model.",)
        )
    found = measurements.effect
    if found is None:
        return Decision("inconclusive", ("The adapter was not measured on any test commit.",))
    numbers = (found.gain, measurements.nll_base, measurements.nll_adapter, measurements.general)
    if any(one is not None and not math.isfinite(one) for one in numbers):
        return Decision("rejected", ("A log-loss is NaN or infinite.",))
    against = tuple(_against(found, measurements, limits))
    if against:
        return Decision("rejected", against)
    missing = tuple(_missing(found, measurements, limits))
    if missing:
        return Decision("inconclusive", missing)
    return Decision(
        "enabled",
        (
            f"Log-loss is {found.gain:.3f} nats per token lower ({found.low:.3f} to {found.high:.3f}) on "
            f"{found.commits} later commits.",
        ),
    )


def _against(found: Effect, measurements: Measurements, limits: Limits) -> Sequence[str]:
    reasons = []
    if found.gain <= 0:
        sure = "" if found.high >= 0 else ", which is significant"
        reasons.append(f"Log-loss is {-found.gain:.3f} nats per token higher than the base's{sure}.")
    elif found.gain < limits.gain and found.low > 0:
        reasons.append(
            f"Log-loss is only {found.gain:.4f} nats per token lower; the minimum useful gain is "
            f"{limits.gain:g}."
        )
    hole_results = measurements.hole_results
    if hole_results is not None and hole_results.adapter < hole_results.base:
        reasons.append(
            f"Its suggestions save fewer characters: {hole_results.adapter} instead of {hole_results.base}."
        )
    if measurements.general is not None and measurements.general > limits.general:
        reasons.append(
            f"Log-loss on other code is {measurements.general - 1:.1%} higher "
            f"(limit: {limits.general - 1:.0%})."
        )
    if (
        hole_results is not None
        and hole_results.latency is not None
        and hole_results.latency_bounds[0] > limits.latency
    ):
        reasons.append(_slower(hole_results, hole_results.latency, limits) + ".")
    return reasons


def _slower(results: HoleResults, latency: float, limits: Limits) -> str:
    """Return how much longer answers take, with the interval."""
    low, high = results.latency_bounds
    interval = f"{low - 1:.0%} to {high - 1:.0%}; " if math.isfinite(low) else ""
    return (
        f"Answers take {latency - 1:.0%} longer with the adapter ({interval}limit: {limits.latency - 1:.0%})"
    )


def _missing(found: Effect, measurements: Measurements, limits: Limits) -> Sequence[str]:
    reasons = []
    if found.commits < limits.commits:
        reasons.append(
            f"{limits.commits - found.commits} more commits are needed: only {found.commits} could be used "
            "as test commits."
        )
    elif found.examples < limits.examples:
        reasons.append(
            f"The test commits gave {found.examples} examples; at least {limits.examples} are needed."
        )
    if found.low <= 0:
        more = more_commits(found, _alpha(measurements.num_comparisons))
        needed = f"About {more} more commits are needed" if more else "Far more commits are needed"
        reasons.append(
            f"{needed} to tell a gain of {found.gain:.3f} nats per token "
            f"({found.low:.3f} to {found.high:.3f}) from chance."
        )
    if measurements.hole_results is None or measurements.hole_results.latency is None:
        reasons.append("The characters saved and the time of answers were not measured.")
    elif measurements.hole_results.latency > limits.latency:
        reasons.append(
            _slower(measurements.hole_results, measurements.hole_results.latency, limits)
            + ", but that may be chance: evaluate it again while the machine is otherwise idle."
        )
    if measurements.general is None:
        reasons.append("The log-loss on other code was not measured.")
    return reasons


def as_dict(measurements: Measurements, decision: Decision) -> dict[str, Any]:
    """Return the result as `--json` prints it and the registry keeps it, without source text."""
    found = measurements.effect
    hole_results = measurements.hole_results
    finite = found is not None and math.isfinite(found.low)
    return {
        "verdict": decision.verdict,
        "reasons": list(decision.reasons),
        "nll_gain": round(found.gain, 5) if found is not None else None,
        "interval": [round(found.low, 5), round(found.high, 5)] if found is not None and finite else None,
        "commits": found.commits if found is not None else 0,
        "examples": found.examples if found is not None else 0,
        "nll_base": measurements.nll_base,
        "nll_adapter": measurements.nll_adapter,
        "nll_gain_at_ends": measurements.gain_at_ends,
        "alpha": _alpha(measurements.num_comparisons),
        "comparisons": measurements.num_comparisons,
        "scale": measurements.scale,
        "dev": dict(measurements.dev),
        "general": measurements.general,
        "saved_chars": None
        if hole_results is None
        else {"base": hole_results.base, "adapter": hole_results.adapter, "holes": len(hole_results.pairs)},
        "latency": None if hole_results is None else hole_results.latency,
        "by_commit": [list(one) for one in measurements.by_commit],
    }


def _alpha(num_comparisons: int) -> float:
    """Return the error probability of one comparison (Bonferroni): many tries pass more often by chance."""
    return ALPHA / max(1, num_comparisons)


def zero_scale_problem(adapted: Adapted, examples: Sequence[Example]) -> str | None:
    """Return a sentence if the adapter at scale 0 differs from its base, which all comparisons rest on."""
    before, adapted.scale = adapted.scale, 0.0
    for example in examples[:2]:
        without = adapted.loss_sum(example)
        with adapted.as_base():
            base = adapted.loss_sum(example)
        if abs(without - base) > _ZERO_SCALE_TOLERANCE * max(1.0, abs(base)):
            adapted.scale = before
            return (
                f"At scale 0 the adapter changes the model's output: log-loss {without:.4f} instead of "
                f"{base:.4f}."
            )
    adapted.scale = before
    return None


def saved_adapter_problem(adapted: Adapted, folder: Path, example: Example) -> str | None:
    """Read the saved adapter; return a sentence if the logits of one prompt differ then."""
    before = adapted.probe_logits(example)
    scale = adapted.scale
    adapted.load(folder)
    after = adapted.probe_logits(example)
    difference = float((before - after).abs().max())
    if not difference <= _SAVED_TOLERANCE * max(1.0, float(before.abs().max())):
        return (
            f"The saved adapter differs from the trained one: logits by up to {difference:.4g} at strength "
            f"{scale}."
        )
    return None


def choose_scale(
    adapted: Adapted, examples: Sequence[Example], base: Sequence[float], tell: Callable[[float], None]
) -> tuple[float, dict[str, float]]:
    """Return the scale with the lowest log-loss on the dev commits (0 is the base), and all log-losses."""
    tokens = sum(len(example.target) for example in examples)
    table = {"0": sum(base) / tokens}
    total = len(SCALES) * len(examples)
    for number, scale in enumerate(SCALES):
        adapted.scale = scale
        sums = 0.0
        for index, example in enumerate(examples):
            sums += adapted.loss_sum(example)
            tell((number * len(examples) + index + 1) / total)
        table[f"{scale:g}"] = sums / tokens
    finite = {key: value for key, value in table.items() if math.isfinite(value)}
    best = float(min(finite, key=lambda key: (finite[key], float(key)))) if finite else 0.0
    adapted.scale = best
    return best, {key: round(value, 5) for key, value in table.items()}


def measure_losses(
    adapted: Adapted,
    test: Sequence[Example],
    general: Sequence[Example],
    *,
    num_comparisons: int,
    records: Records,
    tell: Callable[[float], None],
) -> Measurements:
    """Measure the log-loss of base and adapter on each example of the test commits and of other code.

    Results that `records` has already are not computed again. Records hold ids and numbers, no text.
    """
    everything = {example.id: example for example in (*_in_rounds(test), *general)}
    for number, example in enumerate(everything.values()):
        if example.id not in records.rows:
            with adapted.as_base():
                base = adapted.middle_and_end(example)
            records.keep({"id": example.id, "base": base, "adapter": adapted.middle_and_end(example)})
        tell((number + 1) / len(everything))
    of_test, of_general = (
        [(sum(records.rows[one.id]["base"]), sum(records.rows[one.id]["adapter"])) for one in part]
        for part in (test, general)
    )
    at_ends = sum(records.rows[one.id]["base"][1] - records.rows[one.id]["adapter"][1] for one in test)
    tokens = [len(example.target) for example in test]
    found = effect(
        [example.commit for example in test],
        [base - ours for base, ours in of_test],
        tokens,
        _alpha(num_comparisons),
    )
    base_general = sum(base for base, _ in of_general)
    return Measurements(
        scale=adapted.scale,
        effect=found,
        nll_base=round(sum(base for base, _ in of_test) / max(1, sum(tokens)), 5),
        nll_adapter=round(sum(ours for _, ours in of_test) / max(1, sum(tokens)), 5),
        gain_at_ends=round(at_ends / max(1, sum(tokens)), 5),
        general=round(sum(ours for _, ours in of_general) / base_general, 5) if base_general else None,
        num_comparisons=num_comparisons,
        by_commit=tuple(_by_commit(test, of_test)),
    )


def _by_commit(
    test: Sequence[Example], losses: Sequence[tuple[float, float]]
) -> Sequence[tuple[str, float, int]]:
    sums: dict[str, tuple[float, int]] = {}
    for example, (base, ours) in zip(test, losses, strict=True):
        gain, tokens = sums.get(example.commit, (0.0, 0))
        sums[example.commit] = gain + base - ours, tokens + len(example.target)
    return [(commit, round(gain / tokens, 5), tokens) for commit, (gain, tokens) in sums.items()]


def choose_holes(test: Sequence[Example]) -> list[Example]:
    """Return the examples at which suggestions are compared, evenly from all commits."""
    holes = [example for example in test if example.kind in _HOLE_KINDS and example.truth.strip()]
    return _in_rounds(holes)[:NUM_HOLES]


def _in_rounds(examples: Sequence[Example]) -> list[Example]:
    """Return the examples in rounds: one of each commit, then another of each, and so on."""
    by_commit: dict[str, list[Example]] = {}
    for example in examples:
        by_commit.setdefault(example.commit, []).append(example)
    rounds = max(map(len, by_commit.values()), default=0)
    return [group[number] for number in range(rounds) for group in by_commit.values() if number < len(group)]


def served_model(model: LocalModel, runner: str) -> tuple[LocalModel, str]:
    """Return the base model as the user's runner takes it, and the runner.

    If there is no GGUF file of a model that was trained on its folder, OpenVINO or torch runs the folder.
    """
    if runner != "llamacpp":
        return model, runner
    found = store.find_for(model.name, runner)
    return (model, "auto") if found is None else (found, runner)


async def fill(
    model: LocalModel,
    adapter: Path,
    settings: Settings,
    holes: Sequence[Example],
    root: Path,
    num_threads: int,
    tell: Callable[[float], None],
) -> HoleResults:
    """Get the server pipeline's suggestion for each hole, with the base and with the adapter in turn.

    Args:
        model: the base model.
        adapter: the adapter's folder.
        settings: the user's; a suggestion that is not shown automatically saves no characters.
        holes: from `choose_holes`.
        root: the folder with the tree before the held-out commits, or the repository.
        num_threads: threads of each model.
        tell: called with the share done.
    """
    served, runner = served_model(model, settings.runner)
    spec = EngineSpec(
        served, device=settings.device, dtype=settings.dtype, num_threads=num_threads, runner=runner
    )
    settings = settings.model_copy(update={"adapter": None, "deadline_s": 600.0})
    engines = await start_alike([spec, replace(spec, adapter=adapter)])
    fillers = []
    try:
        for engine in engines:
            filler = PipelineFiller(engine, settings)
            fillers.append(filler)
            if settings.context:
                await filler.open_folder(root)
            if holes:  # The first answer of a model is slower than the others.
                await filler.fill(_hole(holes[-1], root), Trigger.AUTOMATIC)
        saved, ratios, pairs = [0, 0], [], []
        for number, example in enumerate(holes):
            hole = _hole(example, root)
            # Each comes first every second time, so that other load on the machine affects both.
            order = (0, 1) if number % 2 else (1, 0)
            filled = {which: await fillers[which].fill(hole, Trigger.AUTOMATIC) for which in order}
            for which in order:
                saved[which] += score(filled[which].text, example.truth).saved_chars
            ratios.append(filled[1].latency_ms / max(0.01, filled[0].latency_ms))
            pairs.append((example.id, example.truth, filled[0].text, filled[1].text))
            tell((number + 1) / len(holes))
        latency = round(statistics.median(ratios), 4) if ratios else None
        return HoleResults(saved[0], saved[1], latency, median_bounds(ratios), tuple(pairs))
    finally:
        for filler in fillers:
            filler.close()
        await _close(engines)


async def start_alike(
    specs: Sequence[EngineSpec], make: Callable[[EngineSpec], Engine] = create
) -> list[Engine]:
    """Start an engine for each spec, on one device and in one format, so that their speed can be compared.

    Those that do not fit together into the memory of a GPU are started on the CPU. Raises as `Engine.start`.
    """
    engines = [make(spec) for spec in specs]
    try:
        for engine in engines:
            await engine.start(lambda _message, _share: None)
        if len({(engine.model.device, engine.model.dtype) for engine in engines}) == 1:
            return engines
    except EngineError:
        if specs[0].device == "cpu":
            await _close(engines)
            raise
    except BaseException:
        await _close(engines)
        raise
    await _close(engines)
    return await start_alike([replace(spec, device="cpu", dtype="auto") for spec in specs], make)


async def _close(engines: Sequence[Engine]) -> None:
    for engine in engines:
        await engine.close()


def _hole(example: Example, root: Path) -> Hole:
    return Hole((root / example.path).as_uri(), example.language, example.before, example.after)


def evaluation_of(result: Mapping[str, Any], *, forced: bool) -> Evaluation:
    """Return a result as the registry keeps it."""
    kept = {key: value for key, value in result.items() if key not in {"verdict", "reasons", "training"}}
    training = {key: value for key, value in (result["training"] or {}).items() if key != "losses"}
    return Evaluation(result["verdict"], tuple(result["reasons"]), forced, {**kept, "training": training})
