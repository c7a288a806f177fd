"""`midfill adapter`: adapters of this machine, and where they are used."""

from __future__ import annotations

from typing import Any

import click

from midfill.cli.shared import JSON, show


@click.group()
def adapter() -> None:
    """Adapters (LoRA) that change the model's habits: list, use, import."""


@adapter.command("list")
@JSON
def adapter_list(as_json: bool) -> None:
    """List the adapters on this machine, with what their judgement came to."""
    from midfill.adapters.registry import Registry

    entries = Registry().entries()
    show({"adapters": [entry.as_dict() for entry in entries]}, _table, as_json=as_json)


def _table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "digest", "base", "rank", "verdict"):
        table.add_column(title)
    for entry in result["adapters"]:
        table.add_row(
            entry["name"],
            entry["digest"][:12],
            entry["base"],
            str(entry["rank"]),
            verdict(entry["judgement"]),
        )
    return table if result["adapters"] else "No adapters so far."


def verdict(judgement: dict[str, Any]) -> str:
    """A verdict for a table."""
    shown = "not judged" if judgement["verdict"] == "none" else judgement["verdict"]
    return f"{shown}, forced" if judgement["forced"] else str(shown)
