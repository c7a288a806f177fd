"""Fill the holes of an evaluation through the real server, by the messages that an editor would send."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from midfill.completion.answer import Trigger
from midfill.engine.api import Progress
from midfill.evaluation.fillers import Filled, Hole
from midfill.lsp.client import SERVE_COMMAND, Client
from midfill.settings import Settings
from midfill.text.documents import Encoding, count_units


class ServerFiller:
    """The real server over pipes, as a filler of `evaluation`. Make it with `start`, and close it."""

    def __init__(self, client: Client, model: str) -> None:
        self.model = model
        self._client = client

    @classmethod
    async def start(
        cls,
        options: Mapping[str, Any],
        model: str,
        report: Progress,
        engine: str | None = None,
        folder: Path | None = None,
    ) -> ServerFiller:
        """Start a server and wait until it has loaded its model and indexed the workspace.

        `options` are settings as an editor sends them; `engine` names a script instead of a model, for
        tests; `folder` is the workspace. Raises `MidfillError` with the server's message if it cannot load.
        """
        return cls(await start_server(options, report, engine, folder), model)

    async def close(self) -> None:
        """End the server."""
        await self._client.close()

    async def fill(self, hole: Hole, trigger: Trigger) -> Filled:
        """Fill one hole. The latency is the client's, from the request to the answer."""
        item = {"uri": hole.uri, "languageId": hole.language, "version": 1, "text": hole.before + hole.after}
        document = {"textDocument": {"uri": hole.uri}}
        line, column = hole.cursor.line, count_units(hole.line_before, Encoding.UTF16)
        self._client.notify("textDocument/didOpen", {"textDocument": item})
        sent_s = time.monotonic()
        params = document | {
            "position": {"line": line, "character": column},
            "context": {"triggerKind": 1 if trigger is Trigger.INVOKED else 2},
        }
        items = (await self._client.request("textDocument/inlineCompletion", params))["items"]
        latency_ms = (time.monotonic() - sent_s) * 1000
        explained = await self._client.request("midfill/explain", document)
        self._client.notify("textDocument/didClose", document)
        return Filled(_inserted(items[0], hole) if items else "", explained["reason"], latency_ms)


async def start_server(
    options: Mapping[str, Any], report: Progress, engine: str | None = None, folder: Path | None = None
) -> Client:
    """Start a server and wait until it has loaded and indexed, as `ServerFiller.start` says."""
    client = await Client.start([*SERVE_COMMAND, *(["--engine", engine] if engine else [])])
    try:
        await client.load(options, lambda message: report(message, None), folder=folder)
        await client.request("midfill/indexed", None)
    except BaseException:
        await client.close()
        raise
    return client


def _inserted(item: Mapping[str, Any], hole: Hole) -> str:
    """Return the text between `before` and `after` once an editor has applied the item.

    An item may replace text around the cursor and repeat it; that text is not part of the hole.
    """
    text: str = item["insertText"].replace("\r\n", "\n")
    area = item.get("range")
    if area is None:
        return text
    column = count_units(hole.line_before, Encoding.UTF16)
    num_before, num_after = column - area["start"]["character"], area["end"]["character"] - column
    repeated_before = hole.line_before[len(hole.line_before) - num_before :] if num_before > 0 else ""
    repeated_after = hole.after[:num_after] if num_after > 0 else ""
    return text.removeprefix(repeated_before).removesuffix(repeated_after)


def options_of(settings: Settings, base: Settings) -> dict[str, Any]:
    """Return what an editor has to send so that a server with the settings `base` gets `settings`."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings.model_dump().items()
        if value != getattr(base, name)
    }
