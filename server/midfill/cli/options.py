"""Options that several commands have."""

from __future__ import annotations

import click

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
MODEL = click.option("--model", metavar="NAME", help="Use this model instead of the one in your settings.")
ADAPTER = click.option(
    "--adapter",
    metavar="NAME|DIR",
    help="Use this LoRA adapter: a name from `midfill adapter list`, or a folder in PEFT format.",
)
ENGINE = click.option(
    "--engine",
    "engine_override",
    metavar="WHERE",
    help="Where the model runs, instead of the setting `engine`: local, shared or a URL.",
)
