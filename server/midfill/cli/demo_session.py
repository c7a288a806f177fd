"""The session of `midfill demo`: type into sample files with the real server and model.

Starts `midfill serve` as an editor would, types into each sample key by key, requests a suggestion at each
key and shows the ghost text of the last one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from rich.console import Console
from rich.text import Text

from midfill.lsp.client import Client, ServerError
from midfill.system.printable import shown as as_shown
from midfill.text.languages import language_id

_OPEN, _CLOSE = "⟦", "⟧"
# A fast typist; the seed makes all runs equal.
_KEY_INTERVAL_S = (0.045, 0.13)
_LINES_ABOVE = 4
_ANSWER_S = 30.0


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One ghost text. `line` counts from 1; `source` says how it was made, or why there is none."""

    file: str
    line: int
    text: str
    latency_ms: float
    source: str


@dataclass(frozen=True, slots=True)
class TypingSpot:
    """One text to type into a sample, and the text before and after it."""

    before: str
    typed: str
    after: str


def samples() -> Iterator[tuple[str, list[TypingSpot]]]:
    """Yield the file name and the typing spots of each bundled sample."""
    folder = resources.files("midfill.cli.samples")
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if not entry.name.endswith(".sample"):
            continue
        pieces = entry.read_text(encoding="utf-8").split(_OPEN)
        spots = []
        before = pieces[0]
        for number, piece in enumerate(pieces[1:], start=1):
            typed, rest = piece.split(_CLOSE)
            later = "".join(part.split(_CLOSE)[1] for part in pieces[number + 1 :])
            spots.append(TypingSpot(before, typed, rest + later))
            before += typed + rest
        yield entry.name.removesuffix(".sample"), spots


async def play(console: Console | None, options: dict[str, Any]) -> list[Suggestion]:
    """Type into every sample, and return the suggestions in order. Print them if there is a console.

    Raises `MidfillError` if the server or its model does not start.
    """
    client = await Client.start()
    try:
        with console.status("starting midfill serve") if console else nullcontext() as status:

            def report(message: str) -> None:
                if status is not None:
                    # From a plain string rich would read markup.
                    status.update(Text(as_shown(f"midfill serve: {message}")))

            await client.load(options, report)
        shown = []
        for name, spots in samples():
            for spot in spots:
                suggestion = await _type(client, name, spot)
                shown.append(suggestion)
                if console is not None:
                    _show(console, spot, suggestion)
        return shown
    finally:
        await client.close()


async def _type(client: Client, name: str, spot: TypingSpot) -> Suggestion:
    """Open the file, type, and request a suggestion at each key. Each key cancels the request before it."""
    uri = f"file:///demo/{name}"
    document = {"uri": uri, "version": 0}
    language = language_id(name)
    opened = {"uri": uri, "languageId": language, "version": 0, "text": spot.before + spot.after}
    client.notify("textDocument/didOpen", {"textDocument": opened})
    line = spot.before.count("\n")
    column = len(spot.before) - spot.before.rfind("\n") - 1
    keys = random.Random(name)
    asked: tuple[int, asyncio.Future[Any]] | None = None
    begun = time.monotonic()
    for version, char in enumerate(spot.typed, start=1):
        await asyncio.sleep(keys.uniform(*_KEY_INTERVAL_S))
        start = {"line": line, "character": column}
        document["version"] = version
        change = {"range": {"start": start, "end": start}, "text": char}
        client.notify("textDocument/didChange", {"textDocument": document, "contentChanges": [change]})
        column += 1
        if asked is not None and not asked[1].done():
            client.cancel(asked[0])
            asked[1].add_done_callback(lambda future: future.cancelled() or future.exception())
        begun = time.monotonic()
        position = {"line": line, "character": column}
        params = {"textDocument": {"uri": uri}, "position": position, "context": {"triggerKind": 2}}
        asked = client.send_request("textDocument/inlineCompletion", params)
    items: list[dict[str, Any]] = []
    if asked is not None:
        try:
            items = (await asyncio.wait_for(asked[1], _ANSWER_S))["items"]
        except (TimeoutError, ServerError):
            items = []
    latency_ms = (time.monotonic() - begun) * 1000
    why = await client.request("midfill/explain", {"textDocument": {"uri": uri}})
    client.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
    text = items[0]["insertText"] if items else ""
    source = why["source"] if text else f"none: {why['reason']}"
    return Suggestion(name, line + 1, text, round(latency_ms, 1), source)


def _show(console: Console, spot: TypingSpot, suggestion: Suggestion) -> None:
    head = Text()
    head.append(f"{suggestion.file}:{suggestion.line}", style="bold cyan")
    head.append(f"  {suggestion.latency_ms:.0f} ms  ", style="yellow")
    head.append(suggestion.source, style="magenta" if suggestion.text else "red")
    above, _, line = spot.before.rpartition("\n")
    below, _, _ = spot.after.partition("\n")
    body = Text()
    for context in above.split("\n")[-_LINES_ABOVE:]:
        body.append(f"  {context}\n", style="dim")
    body.append(f"  {line}{spot.typed}", style="bold")
    body.append(suggestion.text.replace("\n", "\n  "), style="italic green")
    body.append(f"{below}\n", style="bold")
    console.print(head)
    console.print(body, soft_wrap=True)


def summary(model: str, suggestions: list[Suggestion], seconds: float) -> dict[str, Any]:
    """Return the object that `--json` prints."""
    return {
        "suggestions": [asdict(suggestion) for suggestion in suggestions],
        "model": model,
        "seconds": round(seconds, 2),
    }
