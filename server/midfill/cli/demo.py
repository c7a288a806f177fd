"""`midfill demo`: ghost text in the terminal, without an editor."""

from __future__ import annotations

import asyncio
import json
import time

import click

from midfill.cli.engine_choice import read_settings
from midfill.cli.options import JSON, MODEL
from midfill.cli.terminal import terminal, with_progress
from midfill.errors import MidfillError

_NEXT_STEPS = (
    ("VS Code", "clients/vscode: npm ci --ignore-scripts && npm run package, then install midfill.vsix"),
    ("Neovim", "midfill setup neovim --write     (also: vim, emacs, helix)"),
    ("others", "midfill setup                    shows what each installed editor needs"),
)


@click.command()
@MODEL
@JSON
def demo(model: str | None, as_json: bool) -> None:
    """Type into sample files and show the ghost text, with the real server and model.

    Downloads the model first if it is not on this machine.

    \b
    Examples:
      midfill demo
      midfill demo --model qwen2.5-coder-1.5b --json
    """
    from midfill.cli import demo_session
    from midfill.models import fetch, store

    begun = time.monotonic()
    settings = read_settings(model=model)
    if store.find(settings.model) is None:
        with_progress(f"downloading {settings.model}", lambda report: fetch.pull(settings.model, report))
    console = None if as_json else terminal()
    suggestions = asyncio.run(demo_session.play(console, {"model": settings.model}))
    seconds = time.monotonic() - begun
    if console is None:
        click.echo(json.dumps(demo_session.summary(settings.model, suggestions, seconds)))
    else:
        console.print(f"{settings.model}, {seconds:.1f} s in total. To use it in your editor:", style="bold")
        for editor, line in _NEXT_STEPS:
            console.print(f"  {editor:8} ", style="cyan", end="")
            console.print(line, soft_wrap=True)
    if not all(suggestion.text for suggestion in suggestions):
        raise MidfillError("Some samples got no suggestion. To find out why, run: midfill doctor")
