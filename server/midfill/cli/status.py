"""`midfill status`: the model in use, and the acceptance counts."""

from __future__ import annotations

import json

import click

from midfill import __version__
from midfill.cli.engine_choice import read_settings
from midfill.cli.options import JSON
from midfill.cli.terminal import say, terminal


@click.command()
@JSON
def status(as_json: bool) -> None:
    """Show the model in use, and how many of its suggestions you accepted and kept.

    The counts stay on this machine. They are kept per model and language, without any text. Running servers
    write them every 30 seconds. To stop counting, set `count_feedback = false`.

    \b
    Examples:
      midfill status
      midfill status --json
    """
    from midfill.completion import calibrations
    from midfill.completion.stats import acceptance
    from midfill.models import store
    from midfill.settings import config_path

    settings = read_settings()
    counts_path = acceptance.counts_path()
    counts = acceptance.read(counts_path)
    found = store.find_for(settings.model, settings.runner)
    calibration = calibrations.in_use(settings.model)
    result = {
        "version": __version__,
        "model": settings.model,
        "model_path": str(found.path) if found else None,
        "adapter": settings.adapter,
        "settings": str(config_path()),
        "calibration": calibration.calibration.source or None,
        "counts_file": str(counts_path),
        "counts": acceptance.as_dict(counts),
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    here = result["model_path"] or f"not on this machine; run: midfill model pull {settings.model}"
    say(f"midfill {__version__}\nmodel     {settings.model} ({here})")
    say(f"settings  {result['settings']}\ngate      {calibrations.describe(calibration)}")
    say(f"counts    {counts_path}\n")
    terminal().print(acceptance.table(counts))
