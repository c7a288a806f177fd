"""Fit the confidence model to results of `midfill eval repo`, and evaluate it on others.

Each file of results is one repository. Thresholds come from predictions for repositories that the weights
were not fitted to (leave one out), and are evaluated on held-out files that were used for neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midfill.completion.calibrations import Saved
from midfill.completion.confidence import BUILT_IN, Eagerness, features, line_prefixes
from midfill.errors import MidfillError
from midfill.evaluation import records
from midfill.evaluation.repository import Result, Score, read_result, score

Array = NDArray[np.float64]

# Share of saved characters that each eagerness keeps, relative to showing everything.
_KEPT = {Eagerness.LOW: 0.75, Eagerness.NORMAL: 0.97, Eagerness.HIGH: 0.999}
_PENALTY = 3.0
_NUM_BINS = 8
# Minimum number of suggestions for replacing the built-in weights.
_LEAST_SUGGESTIONS = 100


@dataclass(frozen=True, slots=True)
class Case:
    """A suggestion with all its prefixes that could be shown.

    Attributes:
        group: the repository.
        names: names of the features.
        rows: features of each prefix, in the order of `names`.
        scores: quality of each prefix.
    """

    group: str
    names: tuple[str, ...]
    rows: Array
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """A logistic model."""

    names: tuple[str, ...]
    bias: float
    weights: Array

    def predict(self, rows: Array) -> Array:
        """Return the probability of each row of features."""
        found: Array = 1 / (1 + np.exp(-(self.bias + rows @ self.weights)))
        return found


def read_cases(paths: Sequence[Path]) -> list[Case]:
    """Read the suggestions of files of `midfill eval repo --results`. Raises `MidfillError`."""
    cases = []
    for path in paths:
        found = [read_result(row) for row in records.read(path)[1].values()]
        cases += [_case(str(path), result) for result in found if result.text and result.tokens]
    if not cases:
        raise MidfillError(
            "These files have no suggestions with log-probabilities: " + ", ".join(map(str, paths))
        )
    return cases


def model_of(paths: Sequence[Path]) -> str:
    """Return the model of these results. Raises `MidfillError` if there are several."""
    models = {str(records.read(path)[0].get("model")) for path in paths}
    if len(models) > 1:
        raise MidfillError(
            f"The results are of several models ({', '.join(sorted(models))}). Calibrate each separately."
        )
    return models.pop()


def _case(group: str, result: Result) -> Case:
    evidence = result.evidence
    found = [features(evidence, end) for end in line_prefixes(result.text)]
    rows = np.array([list(row.values()) for row in found])
    scores = tuple(score(result.text[:end], result.truth) for end in line_prefixes(result.text))
    return Case(group, tuple(found[0]), rows, scores)


def fit(cases: Sequence[Case]) -> Fit:
    """Fit by maximum likelihood with a ridge penalty on standardised features, with Newton's method."""
    rows = np.concatenate([case.rows for case in cases])
    right = np.array([one.right for case in cases for one in case.scores], dtype=np.float64)
    mean, deviation = rows.mean(axis=0), rows.std(axis=0) + 1e-9
    design = np.column_stack([np.ones(len(rows)), (rows - mean) / deviation])
    penalty = np.diag([1e-6, *[_PENALTY] * rows.shape[1]])
    found = np.zeros(design.shape[1])
    for _ in range(50):
        likely = 1 / (1 + np.exp(-design @ found))
        gradient = design.T @ (right - likely) - penalty @ found
        hessian = (design * (likely * (1 - likely))[:, None]).T @ design + penalty
        step = np.linalg.solve(hessian, gradient)
        found += step
        if np.abs(step).max() < 1e-9:
            break
    weights = found[1:] / deviation
    return Fit(cases[0].names, float(found[0] - weights @ mean), weights)


def cross_predict(cases: Sequence[Case]) -> list[Array]:
    """Return the probabilities of each case by a model that was fitted to the other groups."""
    groups = {case.group for case in cases}
    if len(groups) < 2:
        raise MidfillError("Calibration needs results of at least two repositories.")
    models = {group: fit([case for case in cases if case.group != group]) for group in groups}
    return [models[case.group].predict(case.rows) for case in cases]


def shown(case: Case, likely: Array, threshold: float) -> Score | None:
    """Return the quality of the prefix that is shown at a threshold; None if nothing is shown."""
    places = np.flatnonzero(likely >= threshold)
    return case.scores[places[-1]] if len(places) else None


def trade(cases: Sequence[Case], likely: Sequence[Array], threshold: float) -> dict[str, float]:
    """Return shown share, precision and saved characters at a threshold, compared with showing everything."""
    seen = [one for case, p in zip(cases, likely, strict=True) if (one := shown(case, p, threshold))]
    everything = [case.scores[-1] for case in cases]
    full = sum(one.saved_chars for one in everything)
    return {
        "threshold": round(threshold, 4),
        "shown": round(len(seen) / len(cases), 4),
        "precision": round(sum(one.right for one in seen) / max(1, len(seen)), 4),
        "precision_of_all": round(sum(one.right for one in everything) / len(cases), 4),
        "saved_of_all": round(sum(one.saved_chars for one in seen) / max(1, full), 4),
    }


def thresholds(cases: Sequence[Case], likely: Sequence[Array]) -> dict[Eagerness, float]:
    """Return for each eagerness the highest threshold that keeps its share of the saved characters."""
    found = {}
    for eagerness, kept in _KEPT.items():
        fitting = [
            float(threshold)
            for threshold in np.arange(0.01, 0.9, 0.01)
            if trade(cases, likely, threshold)["saved_of_all"] >= kept
        ]
        found[eagerness] = round(max(fitting, default=0.01), 2)
    return found


def brier(cases: Sequence[Case], likely: Sequence[Array]) -> float:
    """Return the Brier score (mean squared error) of the probabilities of prefixes; lower is better."""
    right = np.array([one.right for case in cases for one in case.scores], dtype=np.float64)
    return float(np.mean((np.concatenate(likely) - right) ** 2))


def _built_in(names: Sequence[str]) -> Fit:
    weights = np.array([BUILT_IN.weights[name] for name in names])
    return Fit(tuple(names), BUILT_IN.weights["bias"], weights)


def reliability(likely: Array, right: Array) -> list[dict[str, float]]:
    """Return bins of equal size: mean predicted probability, share that is right, and count."""
    order = np.argsort(likely, kind="stable")
    return [
        {
            "predicted": round(float(likely[part].mean()), 4),
            "right": round(float(right[part].mean()), 4),
            "count": len(part),
        }
        for part in np.array_split(order, _NUM_BINS)
        if len(part)
    ]


def calibrate(training: Sequence[Path], held_out: Sequence[Path]) -> dict[str, Any]:
    """Fit weights and thresholds to `training`, evaluate them on `held_out`. Raises `MidfillError`."""
    cases = read_cases(training)
    crossed = cross_predict(cases)
    levels = thresholds(cases, crossed)
    model, built_in = fit(cases), _built_in(cases[0].names)
    result: dict[str, Any] = {
        "suggestions": len(cases),
        "weights": {"bias": round(model.bias, 4)}
        | {name: round(float(weight), 4) for name, weight in zip(model.names, model.weights, strict=True)},
        "thresholds": {str(eagerness): threshold for eagerness, threshold in levels.items()},
        "training": {str(level): trade(cases, crossed, cut) for level, cut in levels.items()},
        "repositories": len({case.group for case in cases}),
        "brier": {
            "fitted": round(brier(cases, crossed), 4),
            "built_in": round(brier(cases, [built_in.predict(case.rows) for case in cases]), 4),
        },
    }
    if held_out:
        others = read_cases(held_out)
        likely = [model.predict(case.rows) for case in others]
        right = np.array([one.right for case in others for one in case.scores], dtype=np.float64)
        result["held_out"] = {
            "suggestions": len(others),
            **{str(level): trade(others, likely, cut) for level, cut in levels.items()},
            "brier": round(brier(others, likely), 4),
            "brier_built_in": round(brier(others, [built_in.predict(case.rows) for case in others]), 4),
            "reliability": reliability(np.concatenate(likely), right),
        }
    return result


def why_not(result: Mapping[str, Any]) -> str | None:
    """Return a sentence why a calibration should not be used; None if it beats the built-in one."""
    if result["suggestions"] < _LEAST_SUGGESTIONS:
        return (
            f"It was fitted to {result['suggestions']} suggestions only; at least {_LEAST_SUGGESTIONS} are "
            "needed."
        )
    pairs = [
        ("repositories that it was not fitted to", result["brier"]["fitted"], result["brier"]["built_in"])
    ]
    if "held_out" in result:
        held = result["held_out"]
        pairs.append(("the held-out results", held["brier"], held["brier_built_in"]))
    for where, fitted, built_in in pairs:
        if fitted >= built_in:
            scores = f"Brier scores {fitted:.4f} and {built_in:.4f}"
            return f"On {where} it is not better than the built-in calibration ({scores})."
    return None


def to_saved(result: Mapping[str, Any], model: str, today: str) -> Saved:
    """Return a calibration for saving; `today` is YYYY-MM-DD. Raises `MidfillError` if it is not usable."""
    levels = [result["thresholds"][level] for level in BUILT_IN.thresholds]
    # Kept shares rise with eagerness, so thresholds never rise with it; they may be equal.
    try:
        return Saved(
            model=model,
            suggestions=result["suggestions"],
            repositories=result["repositories"],
            made=today,
            weights=result["weights"],
            thresholds=dict(zip(map(str, BUILT_IN.thresholds), levels, strict=True)),
        )
    except ValueError as error:
        raise MidfillError(f"These results give no usable calibration: {error}") from error


def describe(result: Mapping[str, Any]) -> str:
    """Return the evaluation of a calibration as text."""
    score = result["brier"]
    rows = [
        f"Fitted to {result['suggestions']} suggestions in {result['repositories']} repositories.",
        f"Brier score, for each repository with weights of the others: {score['fitted']:.4f}; the built-in "
        f"calibration has {score['built_in']:.4f} (lower is better).",
    ]
    if "held_out" in result:
        held = result["held_out"]
        rows.append(
            f"On {held['suggestions']} held-out suggestions: {held['brier']:.4f}; the built-in calibration "
            f"has {held['brier_built_in']:.4f}."
        )
    for part in ("training", "held_out"):
        for level in result["thresholds"] if part in result else ():
            one = result[part][level]
            rows.append(
                f"{part:9} {level:7} threshold {one['threshold']:.0%}: shown {one['shown']:.1%}, precision "
                f"{one['precision']:.1%} (without threshold {one['precision_of_all']:.1%}), saved characters "
                f"{one['saved_of_all']:.1%} of those without threshold"
            )
    return "\n".join(rows)
