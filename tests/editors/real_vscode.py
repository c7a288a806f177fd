"""A real VS Code in a real browser with the packaged extension and the real server, driven by keys.

VS Code comes as its own server, which the npm package code-server brings, and Chromium shows it. One server
and one browser serve all tests; a window is a page with a folder, an extension host and a midfill of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

# Generous: it is reached only by what never happens, and machines may be busy.
LIMIT_S = 90
POLL_S = 0.02

EXTENSION = Path(__file__).parents[2] / "clients" / "vscode"
EDITORS = Path(os.environ.get("MIDFILL_TEST_EDITORS") or Path.home() / ".cache" / "midfill-tests")
SERVER_MAIN = EDITORS / "code-server-4.100.3/node_modules/code-server/lib/vscode/out/server-main.js"

SETTINGS = {
    "chat.disableAIFeatures": True,
    "editor.fontSize": 14,
    "editor.minimap.enabled": False,
    "editor.quickSuggestions": {"other": "off", "comments": "off", "strings": "off"},
    "extensions.autoUpdate": False,
    "git.enabled": False,
    "security.workspace.trust.enabled": False,
    "telemetry.telemetryLevel": "off",
    "window.commandCenter": False,
    "workbench.startupEditor": "none",
    "workbench.tips.enabled": False,
}
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
STATUS = '[id="midfill.midfill.status"]'


def missing():
    """What is not here of all that is needed, or None."""
    if not SERVER_MAIN.exists():
        return str(SERVER_MAIN)
    return next((name for name in ("chromium", "node", "npm") if shutil.which(name) is None), None)


def package():
    """The extension as its users get it: `npm run package`, with the packages that are locked."""
    installed = EXTENSION / "node_modules" / ".package-lock.json"
    locked = EXTENSION / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < locked.stat().st_mtime:
        _npm("ci", "--ignore-scripts", "--no-audit", "--no-fund")
    _npm("run", "package")
    return EXTENSION / "midfill.vsix"


def _npm(*arguments):
    done = subprocess.run(
        ["npm", *arguments],
        cwd=EXTENSION,
        # The wheel in it is built by the Python that runs the tests.
        env=os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"npm {' '.join(arguments)}:\n{done.stdout}"


class VSCode:
    """VS Code's server and a browser."""

    def __init__(self, folder, vsix):
        from playwright.sync_api import sync_playwright  # noqa: PLC0415 - only where there is a browser

        self.folder = folder
        self.data = folder / "data"
        self._options = [
            "--accept-server-license-terms",
            f"--user-data-dir={self.data}",
            f"--server-data-dir={self.data}",
            f"--extensions-dir={folder / 'extensions'}",
        ]
        self.log = folder / "server.log"
        self.settings()
        self.install(vsix)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *self._command(),
                    "--host=127.0.0.1",
                    f"--port={self.port}",
                    "--without-connection-token",
                    "--telemetry-level=off",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
        self._playwright = sync_playwright().start()
        self.browser = self._playwright.chromium.launch_persistent_context(
            folder / "browser",
            executable_path=shutil.which("chromium"),
            headless=True,
            args=CHROMIUM,
            viewport={"width": 1000, "height": 640},
        )
        self.browser.set_default_timeout(LIMIT_S * 1000)
        # Nothing but the server is spoken to.
        here = re.compile(rf"^(http|ws)://127\.0\.0\.1:{self.port}/|^(data|blob):")
        self.browser.route(lambda url: not here.match(url), lambda route: route.abort())
        self._wait_for_server()

    def _command(self):
        return ["node", str(SERVER_MAIN), *self._options]

    def _environment(self):
        homes = {
            "HOME": str(self.folder),
            "MIDFILL_CACHE": os.environ.get("MIDFILL_CACHE") or str(Path.home() / ".cache" / "midfill"),
            "MIDFILL_CONFIG": str(self.folder / "config.toml"),
        }
        return os.environ | homes

    def _wait_for_server(self):
        end = time.monotonic() + LIMIT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise AssertionError(self.log.read_text()) from None
                time.sleep(POLL_S)
            else:
                return

    def install(self, vsix):
        subprocess.run(
            [*self._command(), "--install-extension", str(vsix)],
            check=True,
            capture_output=True,
            env=self._environment(),
        )

    def settings(self, values=None):
        """The user's settings; those of the machine are kept in a file of their own."""
        for name in ("User", "Machine"):
            path = self.data / name / "settings.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(SETTINGS | (values or {}), indent=1))
            partial.replace(path)

    def close(self):
        self.browser.close()
        self._playwright.stop()
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
