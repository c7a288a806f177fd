"""As much of the Hugging Face hub's interface as a download needs, on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """A hub.

    Attributes:
        repositories: the files of each; none means that it is gated.
        lying: repositories that tell a wrong SHA-256.
        fetched: the files that were asked for.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes] | None] = {}
        self.lying: set[str] = set()
        self.fetched: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if name not in self.server.repositories:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif (files := self.server.repositories[name]) is None:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "/resolve/" in path:
            file = path.rpartition("/")[2]
            if self.command == "GET":
                self.server.fetched.add(file)
            etag = hashlib.sha256(files[file]).hexdigest()
            self.answer(200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            siblings = [self.sibling(name, *one) for one in files.items()]
            found = {"id": name, "sha": COMMIT, "siblings": siblings}
            if "/tree/" in path:
                found = [
                    {"type": "file", "path": one["rfilename"], "size": one["size"], "oid": "0"}
                    for one in siblings
                ]
            self.answer(200, json.dumps(found).encode())

    do_HEAD = do_GET

    def sibling(self, name, file, content):
        found = {"rfilename": file, "size": len(content)}
        if file.endswith(".safetensors"):
            sha = "0" * 64 if name in self.server.lying else hashlib.sha256(content).hexdigest()
            found["lfs"] = {"sha256": sha, "size": len(content), "pointerSize": 1}
        return found

    def answer(self, status, content, headers=None):
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass
