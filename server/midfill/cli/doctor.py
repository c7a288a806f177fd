"""`midfill doctor`: check the installation."""

from __future__ import annotations

import asyncio
import json

import click

from midfill.cli.engine_choice import engine_factory
from midfill.cli.options import JSON
from midfill.cli.terminal import say

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """Check the installation, and measure the model's speed for about a second.

    Checks package versions, settings, device, disk space, model and memory. Each problem is listed with its
    remedy. Exits with status 1 if there is an error.

    \b
    Examples:
      midfill doctor
      midfill doctor --json
    """
    from midfill.cli.doctor_checks import examine

    checks = asyncio.run(examine(engine_factory(None)))
    if as_json:
        click.echo(json.dumps({"checks": [check.as_dict() for check in checks]}))
    else:
        for check in checks:
            status = click.style(check.status.ljust(8), fg=_COLOURS[check.status])
            say(f"{status}{check.name:10} {check.found}")
            if check.remedy:
                say(f"{'':18} -> {check.remedy}")
    if any(check.status == "error" for check in checks):
        raise click.exceptions.Exit(1)
