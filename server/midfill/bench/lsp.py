"""`midfill bench lsp`: the server's latency without the model, with keys typed over pipes.

The server runs in its own process, with a scripted engine, so that reading, editing, prompt building,
postprocessing and answering are measured. With `busy`, a real model decodes all the time on a thread of that
process, and competes for the interpreter.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from midfill.lsp.client import SERVE_COMMAND, Client

_URI = "file:///bench/main.py"
_TYPED = "    result = compute(values, key)\n"
_NUM_LINES = 5_000
_NUM_WARM_UP = 50
_TARGETS = {"median_ms": 3.0, "p99_ms": 6.0}
_BUSY_TARGETS = {"p95_ms": 10.0}


async def bench_lsp(num_keys: int, busy_model: str | None = None) -> dict[str, Any]:
    """Type keys into the middle of a document; return the latencies from change and request to answer.

    `busy_model` names the model that decodes meanwhile. Raises `MidfillError` if the server cannot load it.
    """
    with tempfile.TemporaryDirectory(prefix="midfill-bench-") as folder:
        script = Path(folder) / "script.json"
        script.write_text(json.dumps({"rules": [{"text": "items)"}]}), encoding="utf-8")
        engine = f"scripted:{script}" if busy_model is None else f"busy:{script}"
        client = await Client.start([*SERVE_COMMAND, "--engine", engine])
        try:
            await client.load({} if busy_model is None else {"model": busy_model})
            latencies_ms = await _type(client, num_keys)
        finally:
            await client.close()
    targets = _TARGETS if busy_model is None else _BUSY_TARGETS
    cuts = statistics.quantiles(latencies_ms, n=100, method="inclusive")
    found = {"median_ms": statistics.median(latencies_ms), "p95_ms": cuts[94], "p99_ms": cuts[98]}
    return {
        "benchmark": "lsp",
        "busy": busy_model,
        "lines": _NUM_LINES,
        "keys": num_keys,
        **{name: round(value, 3) for name, value in found.items()},
        "max_ms": round(max(latencies_ms), 3),
        "targets": targets,
        "met": all(found[name] < limit for name, limit in targets.items()),
    }


async def _type(client: Client, num_keys: int) -> list[float]:
    text = "".join(f"    value_{i} = compute({i}, key)  # line {i}\n" for i in range(_NUM_LINES))
    item = {"uri": _URI, "languageId": "python", "version": 1, "text": text}
    client.notify("textDocument/didOpen", {"textDocument": item})
    line, column = _NUM_LINES // 2, 0
    # Make an empty line to type into.
    _insert(client, (line, 0), "\n", 2)
    latencies_ms = []
    for key in range(_NUM_WARM_UP + num_keys):
        char = _TYPED[key % len(_TYPED)]
        begun = time.perf_counter()
        _insert(client, (line, column), char, key + 3)
        line, column = (line + 1, 0) if char == "\n" else (line, column + 1)
        params = {
            "textDocument": {"uri": _URI},
            "position": {"line": line, "character": column},
            "context": {"triggerKind": 2},
        }
        await client.request("textDocument/inlineCompletion", params)
        latencies_ms.append((time.perf_counter() - begun) * 1000)
    return latencies_ms[_NUM_WARM_UP:]


def _insert(client: Client, position: tuple[int, int], text: str, version: int) -> None:
    place = {"line": position[0], "character": position[1]}
    change = {"range": {"start": place, "end": place}, "text": text}
    params = {"textDocument": {"uri": _URI, "version": version}, "contentChanges": [change]}
    client.notify("textDocument/didChange", params)
