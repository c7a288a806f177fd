"""The base protocol for servers that tests put in the place of others: messages over stdin and stdout."""

import json
import sys


def send(**message):
    body = json.dumps({"jsonrpc": "2.0", **message}).encode()
    sys.stdout.buffer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
    sys.stdout.buffer.flush()


def received():
    while line := sys.stdin.buffer.readline():
        length = 0
        while line.strip():
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
            line = sys.stdin.buffer.readline()
        yield json.loads(sys.stdin.buffer.read(length))
