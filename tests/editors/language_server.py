"""A language's own server, beside midfill: it answers every completion request with the same items, and late.

Started as `python language_server.py DELAY_S LABEL...`.
"""

import sys
import threading

from wire import received, send

delay_s, labels = float(sys.argv[1]), sys.argv[2:]
CAPABILITIES = {"textDocumentSync": {"openClose": True, "change": 2}, "completionProvider": {}}
items = [{"label": label, "kind": 14} for label in labels]

for message in received():
    method = message.get("method")
    if method == "exit":
        break
    if method == "initialize":
        send(id=message["id"], result={"capabilities": CAPABILITIES})
    elif method == "textDocument/completion":
        result = {"isIncomplete": False, "items": items}
        threading.Timer(delay_s, send, kwargs={"id": message["id"], "result": result}).start()
    elif "id" in message and method is not None:
        send(id=message["id"], result=None)
