"""The report on an adapter: one self-contained HTML file, with plots if matplotlib is installed.

It shows source text (suggestions side by side), so only its owner can read it. It loads nothing.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from midfill.errors import AdapterError
from midfill.system import text_files
from midfill.system.file_errors import why_unwritable
from midfill.system.private import private_folder
from midfill.training.verdict import Measurements

_MAX_PAIRS = 24
_COLOURS = {"enabled": "#1a7f37", "rejected": "#b42318", "inconclusive": "#9a6700"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse }
td, th { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top }
pre { background: #f6f8fa; padding: .4rem .6rem; margin: 0; font-size: 12px }
pre { white-space: pre-wrap; min-width: 12rem }
img { max-width: 100% } .verdict { font-weight: 600 } .quiet { color: #59636e }
"""


def write(
    path: Path,
    name: str,
    repository: str,
    result: Mapping[str, Any],
    measurements: Measurements,
    *,
    forced: bool,
) -> None:
    """Write the report. Raises `AdapterError` if it cannot be written."""
    parts = [
        f"<h1>Adapter {_text(name)} on the history of {_text(repository)}</h1>",
        _verdict(result, forced),
        "<h2>Conditions</h2>",
        _table(_conditions(result)),
        *_pictures(result, measurements),
        *_training(result),
        *_pairs(measurements),
        '<p class="quiet">This file contains source text of the repository. It stays on this machine.</p>',
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>midfill adapter {_text(name)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    try:
        private_folder(path.parent, tighten=False)
        text_files.replace(path, page, private=True)
    except OSError as error:
        raise AdapterError(f"Cannot write the report {path}: {why_unwritable(error)}.") from error


def _verdict(result: Mapping[str, Any], forced: bool) -> str:
    verdict = result["verdict"]
    reasons = "".join(f"<li>{_text(reason)}</li>" for reason in result["reasons"])
    said = "The adapter is used." if verdict == "enabled" else "The adapter is not used."
    if forced:
        said += " --force overrides the verdict."
    colour = _COLOURS[verdict]
    return f'<p class="verdict" style="color:{colour}">{verdict}. {said}</p><ul>{reasons}</ul>'


def _conditions(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("test commits (the newest)", f"{result['commits']}, with {result['examples']} examples")]
    if result["nll_gain"] is not None:
        interval = result["interval"]
        shown = f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else "not known"
        rows.append(
            (
                "log-loss, nats per token",
                f"{result['nll_base']:.4f} base, {result['nll_adapter']:.4f} adapter",
            )
        )
        rows.append(
            (
                "gain and its confidence bounds",
                f"{result['nll_gain']:+.4f} ({shown}; error probability {result['alpha']:.2%} each)",
            )
        )
        rows.append(("part of the gain from predicting the end", f"{result['nll_gain_at_ends']:+.4f}"))
    if result["comparisons"] > 1:
        rows.append(("adapters compared on these commits", str(result["comparisons"])))
    if saved := result["saved_chars"]:
        rows.append(
            (
                "characters saved",
                f"{saved['base']} base, {saved['adapter']} adapter, in {saved['holes']} suggestions",
            )
        )
    if result["general"] is not None:
        rows.append(("log-loss on other code, change", f"{result['general'] - 1:+.1%}"))
    if result["latency"] is not None:
        rows.append(("time of an answer, change", f"{result['latency'] - 1:+.0%} (median)"))
    rows.append(("strength (scale of the adapter)", f"{result['scale']:g}"))
    for scale, loss in result["dev"].items():
        rows.append((f"log-loss on dev commits, strength {scale}", f"{loss:.4f}"))
    return rows


def _training(result: Mapping[str, Any]) -> list[str]:
    if not (training := result.get("training")):
        return []
    names = ("examples", "steps", "planned_steps", "seconds", "seconds_per_step", "tokens", "layout")
    return ["<h2>Training</h2>", _table([(name.replace("_", " "), str(training[name])) for name in names])]


def _pairs(measurements: Measurements) -> list[str]:
    if measurements.hole_results is None or not measurements.hole_results.pairs:
        return []
    rows = [
        f"<tr><td>{_text(place)}</td>"
        + "".join(f"<td><pre>{_text(text)}</pre></td>" for text in texts)
        + "</tr>"
        for place, *texts in measurements.hole_results.pairs[:_MAX_PAIRS]
    ]
    head = "<tr><th>place</th><th>author's text</th><th>base</th><th>adapter</th></tr>"
    return ["<h2>Suggestions side by side</h2>", f"<table>{head}{''.join(rows)}</table>"]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _text(value: object) -> str:
    return html.escape(str(value))


def _pictures(result: Mapping[str, Any], measurements: Measurements) -> list[str]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ["<p class='quiet'>No plots, because matplotlib is not installed: pip install matplotlib</p>"]
    pictures = []
    if measurements.by_commit:
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes = figure.subplots()
        gains = [gain for _, gain, _ in measurements.by_commit]
        colours = ["#1a9850" if gain > 0 else "#d6604d" for gain in gains]
        axes.bar(range(len(gains)), gains, color=colours)
        axes.axhline(0, color="#333333", linewidth=0.8)
        if result["interval"]:
            axes.axhspan(*result["interval"], color="#4393c3", alpha=0.25, label="bounds of the gain")
            axes.legend(fontsize=8)
        axes.set_xticks(
            range(len(gains)),
            [commit[:7] for commit, _, _ in measurements.by_commit],
            fontsize=6,
            rotation=90,
        )
        axes.set_ylabel("gain, nats per token")
        axes.set_title("gain in log-loss by test commit; above 0 is better", fontsize=10)
        pictures.append(_picture("Gain by commit", figure))
    if measurements.hole_results is not None and measurements.hole_results.latency is not None:
        figure = Figure(figsize=(9, 2.2), layout="constrained")
        saved, latency = figure.subplots(1, 2)
        bars = saved.barh(
            ["adapter", "base"],
            [measurements.hole_results.adapter, measurements.hole_results.base],
            color=["#1a9850", "#999999"],
        )
        saved.bar_label(bars, fontsize=8)
        saved.set_title("characters saved", fontsize=10)
        bars = latency.barh(
            ["adapter", "base"], [measurements.hole_results.latency, 1.0], color=["#4393c3", "#999999"]
        )
        latency.bar_label(bars, fmt="{:.2f}", fontsize=8)
        latency.set_title("time of an answer, base = 1", fontsize=10)
        for axes in (saved, latency):
            axes.margins(x=0.12)  # for the numbers
        pictures.append(_picture("Suggestions", figure))
    losses = (result.get("training") or {}).get("losses")
    if losses:
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(range(1, len(losses) + 1), losses, color="#4393c3", linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel("nats per token")
        axes.set_title("loss while training", fontsize=10)
        pictures.append(_picture("Training loss", figure))
    return pictures


def _picture(title: str, figure: Any) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{encoded}">'
