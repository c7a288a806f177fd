"""A server of a later version: its answers to `midfill/explain` have what no client knows yet.

Started as `python future_server.py EXPLANATION`; EXPLANATION is a JSON object.
"""

import json
import sys
from pathlib import Path

# Clients start programs with PYTHONSAFEPATH: Python then imports nothing from the folder of a script.
sys.path.insert(0, str(Path(__file__).parent))
from wire import received, send

CAPABILITIES = {"textDocumentSync": {"openClose": True, "change": 2}, "inlineCompletionProvider": {}}

results = {
    "initialize": {"capabilities": CAPABILITIES, "serverInfo": {"name": "midfill", "version": "9.0.0"}},
    "midfill/explain": json.loads(sys.argv[1]),
    "textDocument/inlineCompletion": {"items": []},
}
for message in received():
    method = message.get("method")
    if method == "exit":
        break
    if method == "initialized":
        for value in ({"kind": "begin", "title": "midfill: future"}, {"kind": "end", "message": "ready"}):
            send(method="$/progress", params={"token": "loading", "value": value})
    if "id" in message and method is not None:
        send(id=message["id"], result=results.get(method))
