"""The user's repository as a benchmark: compare suggestions with the text that its authors wrote.

Runs no program of the repository. The confidence gate, the last stage of the pipeline, is applied to the
results afterwards, so that one run of the model gives the figures of every `eagerness`;
`tests/unit/test_evaluation_repository.py` checks that both give the same answers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from midfill.completion.answer import Trigger
from midfill.completion.confidence import (
    BUILT_IN,
    Calibration,
    Eagerness,
    Evidence,
    length_to_show,
    line_prefixes,
)
from midfill.errors import MidfillError
from midfill.evaluation.fillers import Filler
from midfill.evaluation.holes import KINDS, Sample
from midfill.evaluation.records import Records
from midfill.evaluation.statistics import mcnemar, ratio_interval
from midfill.system.measure import percentiles
from midfill.text.syntax import count_errors

# Time limit of parsing a whole file; more than the server has, since no user waits.
_PARSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one hole.

    Attributes:
        id, file, kind, language: of the hole.
        line_before, line_after: the cursor's line before and after the cursor.
        truth: the original text.
        text: the suggestion without the confidence gate.
        reason: why there is no suggestion.
        tokens, finished: see `Filled`.
        latency_ms: time from request to answer.
        broken: from `breaking_lengths`.
    """

    id: str
    file: str
    kind: str
    language: str
    line_before: str
    line_after: str
    truth: str
    text: str
    reason: str | None
    tokens: tuple[tuple[int, float], ...]
    finished: bool
    latency_ms: float
    broken: tuple[int, ...] | None = None

    @property
    def evidence(self) -> Evidence:
        """The input of the confidence gate."""
        return Evidence(self.text, self.tokens, self.finished, self.line_before)


async def evaluate(
    samples: Sequence[Sample], filler: Filler, records: Records, tell: Callable[[float], None]
) -> None:
    """Fill every hole that `records` does not have yet; `tell` is called with the share done."""
    for number, sample in enumerate(samples):
        if sample.id not in records.rows:
            filled = await filler.fill(sample.hole, Trigger.AUTOMATIC)
            result = Result(
                sample.id,
                sample.file,
                sample.kind,
                sample.hole.language,
                sample.hole.line_before,
                sample.hole.after.partition("\n")[0],
                sample.truth,
                filled.text,
                filled.reason,
                tuple((end, round(logprob, 4)) for end, logprob in filled.tokens),
                filled.finished,
                round(filled.latency_ms, 1),
                breaking_lengths(sample, filled.text),
            )
            records.keep(asdict(result))
        tell((number + 1) / len(samples))


def breaking_lengths(sample: Sample, text: str) -> tuple[int, ...] | None:
    """Return the lengths to cut a suggestion to that give more syntax errors than the original text.

    Parses the whole file. None if there is no grammar for its language.
    """
    before, after, language = sample.hole.before, sample.hole.after, sample.hole.language
    usual = count_errors(before + sample.truth + after, language, _PARSE_S)
    if usual is None:
        return None
    ends = {*line_prefixes(text), len(text)} if text else set()
    counts = {end: count_errors(before + text[:end] + after, language, _PARSE_S) for end in sorted(ends)}
    return tuple(end for end, count in counts.items() if count is not None and count > usual)


def read_result(row: Mapping[str, Any]) -> Result:
    """Return a result from the row that `Records` keeps."""
    tokens = tuple((end, logprob) for end, logprob in row["tokens"])
    broken = row.get("broken")
    return Result(**{**row, "tokens": tokens, "broken": None if broken is None else tuple(broken)})


@dataclass(frozen=True, slots=True)
class Score:
    """The quality of a suggestion, compared with the original text.

    Attributes:
        shown: there is a suggestion.
        exact: it equals the original.
        first_line: its first line is right.
        right: all its lines are right, so it can be accepted as it is (it may be shorter than the original).
        too_long: it has all lines of the original, and more.
        similarity: 0..1, by Ratcliff and Obershelp.
        saved_chars: characters of its leading right lines, which an oracle would accept line by line.
    """

    shown: bool
    exact: bool
    first_line: bool
    right: bool
    too_long: bool
    similarity: float
    saved_chars: int


def score(text: str, truth: str) -> Score:
    """Compare a suggestion with the original text, ignoring blanks at line ends."""
    ours, theirs = _rows(text), _rows(truth)
    if not ours:
        return Score(False, not theirs, False, False, False, float(not theirs), 0)
    agreeing = 0
    for mine, their in zip(ours, theirs, strict=False):
        if mine != their:
            break
        agreeing += 1
    return Score(
        shown=True,
        exact=ours == theirs,
        first_line=agreeing > 0,
        right=agreeing == len(ours),
        too_long=bool(theirs) and agreeing == len(theirs) < len(ours),
        similarity=difflib.SequenceMatcher(
            None, "\n".join(ours).strip(), "\n".join(theirs).strip(), autojunk=False
        ).ratio(),
        saved_chars=sum(len(row.strip()) for row in ours[:agreeing]),
    )


def _rows(text: str) -> list[str]:
    rows = [row.rstrip() for row in text.split("\n")]
    while rows and not rows[-1]:
        rows.pop()
    return rows


def summarise(results: Sequence[Result], eagerness: Eagerness, by: Calibration = BUILT_IN) -> dict[str, Any]:
    """Return the figures of one `eagerness`, and the trade-off of all, as `--json` prints them."""
    summary = {"eagerness": str(eagerness), "calibration": by.source or None}
    summary |= _figures(results, eagerness, by)
    names = ("shown", "precision", "exact", "too_long")
    plain = ("syntax_errors", "saved_chars", "silent_where_nothing")
    trades = {}
    for level in Eagerness:
        figures = _figures(results, level, by)
        trades[str(level)] = {
            **{name: figures[name]["all"] for name in names},
            **{name: figures[name] for name in plain},
        }
    return {**summary, "by_eagerness": trades}


def shown_text(result: Result, eagerness: Eagerness, by: Calibration = BUILT_IN) -> str:
    """Return the part of a suggestion that the user would see."""
    return result.text[: length_to_show(result.evidence, eagerness, by)]


def _figures(results: Sequence[Result], eagerness: Eagerness, by: Calibration) -> dict[str, Any]:
    written = [result for result in results if result.truth]
    nothing = [result for result in results if not result.truth]

    def rate(of: Callable[[Score], float], among: Sequence[Result]) -> dict[str, float | None]:
        kinds = {kind: [result for result in among if result.kind == kind] for kind in KINDS}
        groups = {**{kind: group for kind, group in kinds.items() if group}, "all": among}
        return {
            name: _mean(sum(of(scores[result.id]) for result in group), len(group))
            for name, group in groups.items()
        }

    texts = {result.id: shown_text(result, eagerness, by) for result in results}
    scores = {result.id: score(texts[result.id], result.truth) for result in results}
    shown = [result for result in results if scores[result.id].shown]
    parsed = [len(texts[result.id]) in result.broken for result in shown if result.broken is not None]
    files = [result.file for result in written]
    return {
        "holes": len(results),
        "files": len({result.file for result in results}),
        "exact": rate(lambda one: one.exact, written),
        "exact_interval": ratio_interval(
            files, [scores[result.id].exact for result in written], [1] * len(written)
        ),
        "first_line": rate(lambda one: one.first_line, written),
        "similarity": rate(lambda one: one.similarity, written),
        "shown": rate(lambda one: one.shown, results),
        "precision": rate(lambda one: one.right, shown),
        "too_long": rate(lambda one: one.too_long, shown),
        "syntax_errors": _mean(sum(parsed), len(parsed)),
        "saved_chars": sum(one.saved_chars for one in scores.values()),
        "saved_share": _mean(sum(one.saved_chars for one in scores.values()), _num_chars(written)),
        "saved_share_by_kind": {
            kind: _mean(sum(scores[one.id].saved_chars for one in group), _num_chars(group))
            for kind in KINDS
            if (group := [result for result in written if result.kind == kind])
        },
        "silent_where_nothing": rate(lambda one: not one.shown, nothing)["all"] if nothing else None,
        "reasons": _count(result.reason or "low-confidence" for result in results if not texts[result.id]),
        "latency_ms": percentiles([result.latency_ms for result in results], 50, 95),
    }


def _num_chars(results: Sequence[Result]) -> int:
    """Return the number of characters of the original texts that are not blanks."""
    return sum(len("".join(result.truth.split())) for result in results)


def _mean(total: float, number: int) -> float | None:
    return round(total / number, 4) if number else None


def _count(values: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def compare(
    before: tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]]],
    after: tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]]],
    eagerness: Eagerness,
) -> dict[str, Any]:
    """Compare two files of results over the holes that both have.

    Each is a header and rows from `records.read`; both get the same `eagerness`. The intervals are those of
    the mean difference, by a bootstrap over files. Raises `MidfillError` if they have no hole in common.
    """
    for header, _ in (before, after):
        if header.get("eval") != "repo":
            raise MidfillError("--compare needs two files of results from `midfill eval repo --results`.")
    pairs = [
        (read_result(row), read_result(after[1][id_])) for id_, row in before[1].items() if id_ in after[1]
    ]
    if not pairs:
        raise MidfillError(
            "The two files have no hole in common: the repository or the seed differs between them."
        )
    both = [
        (score(shown_text(old, eagerness), old.truth), score(shown_text(new, eagerness), new.truth))
        for old, new in pairs
    ]
    files = [old.file for old, _ in pairs]
    figures: dict[str, Any] = {}
    for name in ("exact", "first_line", "right", "similarity", "saved_chars", "too_long", "shown"):
        old, new = ([float(getattr(one, name)) for one in side] for side in zip(*both, strict=True))
        gains = [theirs - ours for ours, theirs in zip(old, new, strict=True)]
        figures[name] = {
            "before": _mean(sum(old), len(old)),
            "after": _mean(sum(new), len(new)),
            "gain": _mean(sum(gains), len(gains)),
            "interval": ratio_interval(files, gains, [1] * len(gains)),
        }
    better = sum(new.exact and not old.exact for old, new in both)
    worse = sum(old.exact and not new.exact for old, new in both)
    return {
        "eagerness": str(eagerness),
        "holes": len(pairs),
        "files": len(set(files)),
        **figures,
        "latency_ms": {
            name: percentiles([result.latency_ms for result in side], 50, 95)
            for name, side in zip(("before", "after"), zip(*pairs, strict=True), strict=True)
        },
        "exact_changes": {"better": better, "worse": worse, "p": mcnemar(better, worse)},
        "differs": sorted(key for key in {*before[0], *after[0]} if before[0].get(key) != after[0].get(key)),
    }


def describe(summary: Mapping[str, Any]) -> str:
    """Return the summary as text."""
    names = ("exact", "first_line", "similarity", "shown", "precision", "too_long")
    kinds = list(summary["shown"])
    headings = (*names, "saved")
    rows = [f"{'':16}" + "".join(f"{name.replace('_', ' '):>12}" for name in headings)]
    for kind in kinds:
        saved = summary["saved_share"] if kind == "all" else summary["saved_share_by_kind"].get(kind)
        cells = (*(summary[name].get(kind) for name in names), saved)
        rows.append(f"{kind:16}" + "".join(f"{'-' if cell is None else f'{cell:.1%}':>12}" for cell in cells))
    if summary["exact_interval"]:
        low, high = summary["exact_interval"]
        rows.append(f"exact, 95 % interval over files: {low:.1%} to {high:.1%}")
    (p50, p95), quiet = summary["latency_ms"].values(), summary["silent_where_nothing"]
    rows.append(
        f"{summary['holes']} holes in {summary['files']} files; an oracle saves "
        f"{summary['saved_share'] or 0:.1%} of the characters; latency p50 {p50:.0f} ms, p95 {p95:.0f} ms"
    )
    if (errors := summary["syntax_errors"]) is not None:
        rows.append(f"{errors:.1%} of the shown suggestions add syntax errors to the file")
    if quiet is not None:
        rows.append(f"no suggestion at {quiet:.1%} of the holes whose original text is empty")
    for level, trade in summary["by_eagerness"].items():
        rows.append(
            f"eagerness {level:7} shows {trade['shown'] or 0:6.1%}, {trade['precision'] or 0:6.1%} right, "
            f"saves {trade['saved_chars']} characters"
            + (" (this run)" if level == summary["eagerness"] else "")
        )
    if reasons := ", ".join(f"{name} {count}" for name, count in summary["reasons"].items()):
        rows.append(f"no suggestion, because: {reasons}")
    return "\n".join(rows)


def describe_difference(difference: Mapping[str, Any]) -> str:
    """Return a comparison as text."""
    rows = [f"{'':14}{'before':>9}{'after':>9}{'gain':>9}   95 % interval over files"]
    for name, figure in difference.items():
        if isinstance(figure, dict) and "gain" in figure:
            interval = figure["interval"]
            shown = f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else "too few files"
            label = name.replace("_", " ")
            rows.append(
                f"{label:14}{figure['before']:9.4f}{figure['after']:9.4f}{figure['gain']:+9.4f}   {shown}"
            )
    changes, differs = difference["exact_changes"], ", ".join(difference["differs"]) or "nothing"
    rows.append(
        f"{difference['holes']} holes in {difference['files']} files; exact: {changes['better']} better, "
        f"{changes['worse']} worse, p = {changes['p']}; the runs differ in: {differs}"
    )
    return "\n".join(rows)
