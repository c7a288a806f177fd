"""`midfill replay`: play a recorded session and compare the answers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import click

from midfill.cli.options import JSON
from midfill.cli.terminal import say


@click.command()
@click.argument("recording", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--command",
    metavar="CMD",
    help="Command that starts the server. [default: `midfill serve` of this installation]",
)
@click.option(
    "--speed",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="Speed-up factor; 0 sends each message as soon as earlier requests are answered.",
)
@JSON
def replay(recording: Path, command: str | None, speed: float, as_json: bool) -> None:
    """Play a session that `midfill serve --record` wrote, and compare the answers.

    Exits with status 1 if an answer differs from the recorded one.

    \b
    Examples:
      midfill replay session.jsonl --speed 0
      midfill replay session.jsonl --command 'midfill serve --model qwen2.5-coder-1.5b' --json
    """
    from midfill.lsp import recording as sessions

    result = asyncio.run(sessions.replay(recording, command, speed))
    say(json.dumps(result) if as_json else sessions.describe(result))
    if result["different"]:
        raise click.exceptions.Exit(1)
