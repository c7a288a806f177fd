"""Probing: ask a model which order of prefix and suffix it was trained for.

The model's files do not tell. So the model gets known holes in each order, and the order in which it finds
the true middle most likely is the one of its training; if the prefix alone does as well, the model was not
trained to fill in the middle. Runs on the event loop; used for models whose name fits no family when they are
loaded, and by `midfill model check` and `midfill eval families`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from midfill.engine.api import Engine, Progress, Request, Tokenizer
from midfill.errors import MidfillError, ModelError
from midfill.fim.templates import FAMILIES, Family, Layout, family_in_name, problems, recognise_family

_LOG = logging.getLogger(__name__)

# (code before the hole, true middle, code after it). At line starts, where tokens begin; the middle can be
# known only from the text after it.
HOLES = (
    (
        "import json\n\n\ndef load(path):\n",
        "    with open(path) as orders_file:",
        "\n        return json.load(orders_file)\n",
    ),
    (
        "def area(shape):\n    width = shape.width\n",
        "    depth_mm = shape.depth",
        "\n    return width * depth_mm\n",
    ),
    (
        "const rows = await read();\n",
        "const shipped = [];",
        "\nfor (const row of rows) {\n  shipped.push(row.id);\n}\n",
    ),
    (
        "public static double mean(int[] values) {\n    int total = 0;\n",
        "    for (int grade : values) {",
        "\n        total += grade;\n    }\n    return (double) total / values.length;\n}\n",
    ),
)
# The appending order proves nothing: a model without FIM training reads the suffix as earlier text, whatever
# the sentinels, and continues the prefix.
_CONCLUSIVE = (Layout.PSM, Layout.SPM)
_ORDERS = (*_CONCLUSIVE, Layout.APPENDING)
# A model uses the suffix if that makes the middle likelier by this many nats per character.
_MARGIN = 0.1


@dataclass(frozen=True, slots=True)
class Probe:
    """Likelihood of the true middles for one model.

    Attributes:
        scores: mean log-probability of the middles in each order, in nats per character; at most 0.
        alone: the same after the prefix alone.
    """

    scores: Mapping[Layout, float]
    alone: float

    @property
    def best(self) -> Layout:
        """The order in which the middles are likeliest, among those that require training."""
        return max(
            (layout for layout in _CONCLUSIVE if layout in self.scores),
            key=lambda layout: self.scores[layout],
        )

    @property
    def understood(self) -> bool:
        """Whether the model uses the suffix in that order."""
        return self.scores[self.best] > self.alone + _MARGIN

    def agrees(self, family: Family) -> bool:
        """Return whether the model fills holes in an order of the family's row."""
        return self.understood and self.best in family.layouts

    def as_dict(self) -> dict[str, Any]:
        """Return the result for `--json`."""
        return {
            "nats_per_char": {str(layout): _rounded(score) for layout, score in self.scores.items()},
            "prefix_alone": _rounded(self.alone),
            "best": str(self.best),
            "understood": self.understood,
        }


def _rounded(score: float) -> float | None:
    """Return a score for JSON, which has no infinity: None for text that the model cannot write at all."""
    return round(score, 3) if math.isfinite(score) else None


async def probe(engine: Engine, family: Family) -> Probe:
    """Score `HOLES` in each order with the sentinels of a family. Raises `EngineError`."""
    orders = _ORDERS if family.middle else (Layout.SPM,)
    scores = {order: await _mean_score(engine, family, order) for order in orders}
    return Probe(scores, await _mean_score(engine, family, None))


async def identify(engine: Engine, named: str | None = None) -> tuple[str, Family]:
    """Return the family of a started engine's model, by `recognise_family` or by probing.

    Raises:
        ModelError: the family is not known, and the model understands none whose sentinels its vocabulary
            has.
        EngineError: the model failed.
    """
    model = engine.model
    if model.served_by:
        return await _identify_served(engine, named)
    try:
        return recognise_family(model, named)
    except ModelError:
        if named or model.family:
            raise
        candidates = _candidates(model.tokenizer)
        probes = [(name, family, await probe(engine, family)) for name, family in candidates.items()]
        understood = [found for found in probes if found[2].understood]
        if not understood:
            raise
        name, family, best = max(understood, key=lambda found: found[2].scores[found[2].best])
        layouts = (Layout.ANCHORED, Layout.PSM) if best.best is Layout.PSM else (Layout.SPM,)
        _LOG.info("probed the model: it is like the FIM family %s, in the order %s", name, best.best)
        # The vocabulary does not tell how the model was shown other files.
        return f"{name} (probed)", replace(family, layouts=layouts, cross_file=None)


async def _identify_served(engine: Engine, named: str | None) -> tuple[str, Family]:
    """Return the family of a model that another program serves.

    Its name tells the family, and a probe confirms it, unless the vocabulary is known to be that of a model
    in the catalogue, whose family is known. Raises as `identify`.
    """
    model = engine.model
    name = named or model.family or family_in_name(model.name)
    remedy = f'Serve another model, or set `family = "..."` to one of: {", ".join(FAMILIES)}.'
    if name is None:
        raise ModelError(f"The FIM family of {model.name!r} ({model.served_by}) is not known. {remedy}")
    name, family = recognise_family(model, name)
    if named or (model.family and model.proven) or not family.middle:
        return name, family
    found = await probe(engine, family)
    if not found.agrees(family):
        what = "does not fill in the middle" if not found.understood else f"expects the order {found.best}"
        raise ModelError(
            f"{model.name!r} ({model.served_by}) was tested as a model of the FIM family {name!r}, "
            f"and {what}. {remedy}"
        )
    return name, family


def _candidates(tokenizer: Tokenizer) -> dict[str, Family]:
    """Return the families whose sentinels a vocabulary has, one for each set of sentinels.

    Families without a middle sentinel are left out: probing cannot identify them, see `_CONCLUSIVE`.
    """
    found: dict[tuple[str, ...], str] = {}
    for name, family in FAMILIES.items():
        if family.middle and not problems(family, tokenizer):
            found.setdefault(family.sentinels, name)
    return {name: FAMILIES[name] for name in found.values()}


async def _mean_score(engine: Engine, family: Family, layout: Layout | None) -> float:
    scores = [
        await _score(engine, _prompt(engine.model.tokenizer, family, layout, hole), hole[1]) for hole in HOLES
    ]
    return sum(scores) / len(scores)


def _prompt(
    tokenizer: Tokenizer, family: Family, layout: Layout | None, hole: tuple[str, str, str]
) -> tuple[int, ...]:
    """Return the tokens of a hole; without a layout, those of the prefix alone."""
    texts = {"head": family.prefix_lead + hole[0], "typed": "", "tail": hole[2]}
    parts = list(family.parts(layout or family.layouts[0]))
    if layout is None:
        parts = [part for part in parts if part[1] in (family.bos, "head")]
    tokens: list[int] = []
    for kind, name in parts:
        if kind == "text":
            tokens += tokenizer.encode(texts[name])
        elif (token := tokenizer.token_id(name)) is not None:
            tokens.append(token)
    return tuple(tokens)


async def _score(engine: Engine, tokens: tuple[int, ...], truth: str) -> float:
    """Return the log-probability of `truth` after the tokens, in nats per character.

    The engine is forced to write it; of the possible tokens it takes the likeliest each time.
    """
    request = Request(tokens, len(truth) + 1, forced_prefix=truth)
    text, total = "", 0.0
    async with aclosing(engine.generate(request)) as output:
        async for token in output:
            text += token.text
            total += -math.inf if token.logprob is None else token.logprob
            if len(text) >= len(truth):
                break
    return total / len(truth) if text.startswith(truth) else -math.inf


async def examine(
    tokenizers: Mapping[str, Tokenizer], engines: Mapping[str, Callable[[], Engine]], report: Progress
) -> dict[str, Any]:
    """Return the result of `midfill eval families`: the table checked against vocabularies and models.

    Args:
        tokenizers: vocabularies by name.
        engines: makers of engines to probe, by the model's name; each is started and closed in turn.
        report: called with each model's name and the share done.

    Returns:
        {"families": {family: its row and the vocabularies that it fits, with ids}, "vocabularies": {name: its
        families}, "models": {name: the model's family and probe}}; ready for JSON.
    """
    fitting = {
        family: {
            name: _ids(row, tokenizer)
            for name, tokenizer in tokenizers.items()
            if not problems(row, tokenizer)
        }
        for family, row in FAMILIES.items()
    }
    models = {}
    for at, (name, make) in enumerate(engines.items()):
        report(f"probing {name}", at / len(engines))
        models[name] = await _examine_model(make)
    return {
        "families": {
            family: {
                "layouts": [str(layout) for layout in row.layouts],
                "bos": row.bos or None,
                "vocabularies": fitting[family],
            }
            for family, row in FAMILIES.items()
        },
        "vocabularies": {
            name: [family for family, found in fitting.items() if name in found] for name in tokenizers
        },
        "models": models,
    }


async def _examine_model(make: Callable[[], Engine]) -> dict[str, Any]:
    engine = await asyncio.to_thread(make)
    try:
        await engine.start(lambda _message, _share: None)
        name, family = await identify(engine)
        found = await probe(engine, family)
        return {"family": name, "agrees": found.agrees(family), **found.as_dict()}
    except MidfillError as error:
        return {"family": None, "agrees": False, "error": str(error)}
    finally:
        await engine.close()


def _ids(family: Family, tokenizer: Tokenizer) -> dict[str, dict[str, int]]:
    """Return the sentinels and stops that a vocabulary has, each a single control token."""
    return {
        kind: {name: token for name in names if (token := tokenizer.token_id(name)) is not None}
        for kind, names in (
            ("sentinels", family.sentinels),
            ("stops", family.stops),
            ("files", family.file_marks),
        )
    }


def table(result: Mapping[str, Any]) -> Any:
    """Return the result of `examine` for the user, as rich tables."""
    from rich.console import Group
    from rich.table import Table

    grid = Table(box=None, header_style="bold")
    for title in ("family", "orders", "vocabulary", "sentinels", "stops"):
        grid.add_column(title, overflow="fold")
    for family, row in result["families"].items():
        orders = ", ".join(row["layouts"])
        for vocabulary, ids in row["vocabularies"].items():
            tokens = (" ".join(map(str, ids[kind].values())) for kind in ("sentinels", "stops"))
            grid.add_row(family, orders, vocabulary, *tokens)
        if not row["vocabularies"]:
            grid.add_row(family, orders, "not checked: no vocabulary here")
    models = Table("model", "family", "nats per character", "verdict", box=None, header_style="bold")
    for model, row in result["models"].items():
        if "error" in row:
            models.add_row(model, "", "", row["error"])
            continue
        scores = {**row["nats_per_char"], "prefix alone": row["prefix_alone"]}
        verdict = (
            "agrees" if row["agrees"] else f"DISAGREES: {row['best'] if row['understood'] else 'no FIM'}"
        )
        models.add_row(
            model,
            row["family"],
            ", ".join(f"{order} {score}" for order, score in scores.items()),
            verdict,
        )
    return Group(grid, "", models) if result["models"] else grid
