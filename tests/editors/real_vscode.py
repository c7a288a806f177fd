"""A real VS Code in a real browser with the packaged extension and the real server, driven by keys.

VS Code comes as its own server, which the npm package code-server brings, and Chromium shows it. One server
and one browser serve all tests; a window is a page with a folder, an extension host and a midfill of its own.
"""

from __future__ import annotations

import contextlib
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

import psutil

# Generous: it is reached only by what never happens, and machines may be busy.
LIMIT_S = 90
POLL_MS = 20
# How long something is waited for before it is asked for again.
PATIENCE_S = 3

EXTENSION = Path(__file__).parents[2] / "clients" / "vscode"
EDITORS = Path(os.environ.get("MIDFILL_TEST_EDITORS") or Path.home() / ".cache" / "midfill-tests")
SERVER_MAIN = EDITORS / "code-server-4.100.3/node_modules/code-server/lib/vscode/out/server-main.js"

SETTINGS = {
    "chat.disableAIFeatures": True,
    "editor.fontSize": 14,
    "editor.minimap.enabled": False,
    "editor.quickSuggestions": {"other": "off", "comments": "off", "strings": "off"},
    "extensions.autoUpdate": False,
    "files.autoSave": "off",
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


# The text of decorations and of the lines below the cursor's, by where they are on the screen.
GHOST = r"""() => {
  const rows = new Map();
  const parts = document.querySelectorAll(
    ".editor-instance .ghost-text-decoration, .editor-instance .suggest-preview-text .view-line, " +
    ".editor-instance .ghost-text-view-zone .view-line");
  for (const part of parts) {
    const { top, left } = part.getBoundingClientRect();
    const row = Math.round(top / 4);
    rows.set(row, [...(rows.get(row) ?? []), [left, part.textContent]]);
  }
  return [...rows].sort((a, b) => a[0] - b[0])
    .map(([, texts]) => texts.sort((a, b) => a[0] - b[0]).map(([, text]) => text).join("")).join("\n");
}"""


def package():
    """The extension as its users get it: `npm run package`, with the packages that are locked."""
    installed = EXTENSION / "node_modules" / ".package-lock.json"
    locked = EXTENSION / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < locked.stat().st_mtime:
        npm("ci", "--ignore-scripts", "--no-audit", "--no-fund")
    npm("run", "package")
    return EXTENSION / "midfill.vsix"


# Files that are on no disk, in a folder of a scheme of their own, as those of a repository on the web are.
MEMORY = """
const vscode = require("vscode");
const FILES = new Map([["/main.py", new TextEncoder().encode("values = [1, 2]\\n")]]);
const stat = (uri) => {
  if (uri.path === "/") return { type: vscode.FileType.Directory, ctime: 0, mtime: 0, size: 0 };
  if (!FILES.has(uri.path)) throw vscode.FileSystemError.FileNotFound(uri);
  return { type: vscode.FileType.File, ctime: 0, mtime: 0, size: FILES.get(uri.path).length };
};
exports.activate = (context) => {
  const provider = {
    onDidChangeFile: new vscode.EventEmitter().event,
    watch: () => new vscode.Disposable(() => {}),
    stat,
    readDirectory: () => [...FILES.keys()].map((name) => [name.slice(1), vscode.FileType.File]),
    readFile: (uri) => (stat(uri), FILES.get(uri.path)),
    writeFile: (uri, content) => FILES.set(uri.path, content),
    createDirectory: () => {}, delete: () => {}, rename: () => {},
  };
  context.subscriptions.push(
    vscode.workspace.registerFileSystemProvider("memory", provider),
    vscode.commands.registerCommand("memory.folder", () =>
      vscode.workspace.updateWorkspaceFolders(0, 0, { uri: vscode.Uri.parse("memory:/"), name: "memory" })),
    vscode.commands.registerCommand("memory.file", () =>
      vscode.window.showTextDocument(vscode.Uri.parse("memory:/main.py"))),
  );
};
"""


def package_memory(folder):
    """An extension whose files are in memory only: a virtual workspace."""
    source = folder / "memory"
    source.mkdir()
    commands = [{"command": f"memory.{what}", "title": f"Memory: {what}"} for what in ("folder", "file")]
    manifest = {
        "name": "memory",
        "publisher": "midfill-tests",
        "version": "0.0.1",
        "engines": {"vscode": "^1.91.0"},
        "main": "./main.js",
        "activationEvents": ["onFileSystem:memory", "onStartupFinished"],
        "extensionKind": ["workspace"],
        "contributes": {"commands": commands},
    }
    (source / "package.json").write_text(json.dumps(manifest))
    (source / "main.js").write_text(MEMORY)
    vsce = EXTENSION / "node_modules" / ".bin" / "vsce"
    options = ["--skip-license", "--allow-missing-repository", "--no-dependencies", "--out", "memory.vsix"]
    subprocess.run([vsce, "package", *options], cwd=source, check=True, capture_output=True)
    return source / "memory.vsix"


def npm(*arguments):
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
    return done.stdout


class VSCode:
    """VS Code's server and a browser, which windows are opened in.

    Args:
        folder: everything is written below it; it is the home of the programs that run.
        vsix: packaged extensions.
        hostile: a `Hostile` folder that the extension host runs in, as after `code .` there.
    """

    def __init__(self, folder, *vsix, hostile=None):
        from playwright.sync_api import sync_playwright

        self.folder = folder
        self.hostile = hostile
        self.data = folder / "data"
        # What the extension finds on its PATH: Python, and whatever else a test puts there.
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.program("python3", getattr(sys, "_base_executable", sys.executable))
        self._command = [
            shutil.which("node"),
            str(SERVER_MAIN),
            "--accept-server-license-terms",
            f"--user-data-dir={self.data}",
            f"--server-data-dir={self.data}",
            f"--extensions-dir={folder / 'extensions'}",
        ]
        self.log = folder / "server.log"
        self.configure()
        subprocess.run(
            [*self._command, *(f"--install-extension={file}" for file in vsix)],
            check=True,
            capture_output=True,
            env=self._environment(),
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        arguments = ["--host=127.0.0.1", f"--port={self.port}", "--without-connection-token"]
        # The environment is the one that it is given, not that of a login shell.
        arguments += ["--force-disable-user-env"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self._command, *arguments, "--telemetry-level=off"],
                cwd=hostile and hostile.folder,
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
        # Nobody but the server is spoken to.
        here = re.compile(rf"^(http|ws)://127\.0\.0\.1:{self.port}/|^(data|blob):")
        self.browser.route(lambda url: not here.match(url), lambda route: route.abort())
        wait(self._is_up, lambda: f"VS Code did not start:\n{self.log.read_text()}")

    def _environment(self):
        homes = {
            "HOME": str(self.folder),
            # A midfill that the machine may have must not be found; a test that wants one puts it there.
            "PATH": os.pathsep.join([str(self.programs), str(Path(shutil.which("node")).parent), "/bin"]),
            # An environment that the extension makes gets the real packages, but does not fetch them.
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if Path(path).name == "site-packages"),
            "PIP_NO_DEPS": "1",
            # Among them may be midfill itself, which pip would find installed already.
            "PIP_IGNORE_INSTALLED": "1",
            "PIP_NO_INDEX": "1",
            "MIDFILL_CACHE": os.environ.get("MIDFILL_CACHE") or str(Path.home() / ".cache" / "midfill"),
            "MIDFILL_CONFIG": str(self.folder / "config.toml"),
            "MIDFILL_DATA": str(self.folder / "midfill-data"),
        }
        return os.environ | homes | (self.hostile.environment(homes) if self.hostile else {})

    def _is_up(self):
        assert self.process.poll() is None, self.log.read_text()
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def program(self, name, target):
        """Put a program on the PATH that starts `target`."""
        file = self.programs / name
        file.write_text(f'#!/bin/sh\nexec "{target}" "$@"\n')
        file.chmod(0o755)

    def configure(self, **values):
        """The user's settings, all of them, as if written by hand; `midfill_x__y` is `midfill.x.y`."""
        named = {name.replace("__", "."): value for name, value in values.items()}
        # Where VS Code is a server, settings of the machine are in a file of their own.
        for kind in ("User", "Machine"):
            path = self.data / kind / "settings.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(SETTINGS | named, indent=1))
            partial.replace(path)

    def close(self):
        self.browser.close()
        self._playwright.stop()
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Window:
    """One window of VS Code, on a folder.

    Args:
        code: the server and the browser.
        folder: for files.
        is_empty: the folder is not opened.
    """

    def __init__(self, code, folder, *, is_empty=False):
        self.code = code
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.page = code.browser.new_page()
        what = "ew=true" if is_empty else f"folder={folder}"
        self.page.goto(f"http://127.0.0.1:{code.port}/?{what}")
        self.file = None
        self._warm = False
        self.until(lambda: self.page.locator(STATUS).count(), "the status bar item")

    # What a person sees

    @property
    def ghost(self):
        """The ghost text as it is drawn, from top to bottom; "" if there is none."""
        return plain(self.page.evaluate(GHOST))

    @property
    def status(self):
        """The text of the status bar item."""
        return plain(self.page.locator(STATUS).inner_text()).strip()

    @property
    def tooltip(self):
        """What the status bar item says to those who point at it."""
        self.page.locator(STATUS).hover()
        hover = self.page.locator(".workbench-hover-container").last
        hover.wait_for()
        text = plain(hover.inner_text())
        self.page.mouse.move(500, 300)
        return text

    @property
    def notes(self):
        """The notifications."""
        return self.page.locator(".notification-toast .notification-list-item-message").all_inner_texts()

    @property
    def choices(self):
        """The entries of the list at the top."""
        return self.page.locator(".quick-input-list .monaco-list-row .label-name").all_inner_texts()

    @property
    def popup(self):
        """The items of the suggestion popup."""
        return self.page.locator(".suggest-widget.visible .monaco-list-row .label-name").all_inner_texts()

    @property
    def lines(self):
        """The lines of the editor that are drawn, in the order of the document's tree."""
        return plain(self.page.locator(".editor-instance .view-lines").inner_text())

    @property
    def text(self):
        """The file on disk."""
        return self.file.read_text(encoding="utf-8")

    # What a person does

    def open(self, name, text):
        """Make a file, open it, and go to its end."""
        self.file = self.folder / name
        self.file.write_text(text, encoding="utf-8")
        self.press("Escape", "Control+P")
        self.page.locator(".quick-input-box input").fill(str(self.file))
        self.until(lambda: any(name in choice for choice in self.choices), f"the file {name}")
        self.press("Enter")
        self.page.locator(".tab.active", has_text=name).wait_for()
        self.page.locator(".editor-instance .view-lines").wait_for()
        self.press("Control+End")
        if not self._warm:
            # VS Code makes what asks for ghost text when it is idle, or at the latest when it is told to ask.
            self.press("Alt+Backslash")
            self._warm = True

    def type(self, text):
        """Type into the editor, once it has the keyboard: a list that closes keeps it for a moment."""
        self.page.locator(".quick-input-widget").first.wait_for(state="hidden")
        self.page.locator(".editor-instance .monaco-editor.focused").wait_for()
        self.page.keyboard.type(text)

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)

    def run(self, command):
        """Run a command by its name in the palette."""
        self.press("F1")
        self.page.locator(".quick-input-box input").fill(f">{command}")
        self.until(lambda: self.choices[:1] == [command], f"the command {command!r}")
        self.press("Enter")

    def choose(self, label):
        """Choose an entry of the list at the top."""
        self.until(lambda: any(label in one for one in self.choices), f"the entry {label!r}")
        self.page.locator(".quick-input-list .monaco-list-row", has_text=label).first.click()

    def click(self, button):
        """Click a button of a notification."""
        self.page.locator(".notification-toast .monaco-button", has_text=button).first.click()

    def trust(self):
        """Trust the workspace, on the page that VS Code has for it."""
        self.run("Workspaces: Manage Workspace Trust")
        self.page.locator(".workspace-trust-editor .monaco-button", has_text="Trust").first.click()

    def watch_ghost(self):
        """From now on note every ghost text that is drawn; gives a function that tells them."""
        self.page.evaluate(
            f"""() => {{
              const ghost = {GHOST};
              window.ghosts = [];
              new MutationObserver(() => window.ghosts.push(ghost()))
                .observe(document.querySelector(".editor-instance"), {{ childList: true, subtree: true }});
            }}"""
        )
        return lambda: self.page.evaluate("window.ghosts")

    # What a test waits for

    def sees(self, ghost):
        self.until(lambda: self.ghost == ghost, f"the ghost text {ghost!r}")

    def gets(self, ghost):
        """The ghost text is this, asked for by the key if it does not come by itself.

        On a busy machine the focus may leave the editor for a moment, and VS Code drops the answer.
        """
        with contextlib.suppress(AssertionError):
            wait(lambda: self.ghost == ghost, str, self.page.wait_for_timeout, PATIENCE_S)
            return
        self.again(
            f"the ghost text {ghost!r}",
            lambda: self.ghost == ghost,
            lambda: self.press("Control+1", "Alt+Backslash"),
        )

    def saves(self, text):
        """The file is this once it is saved."""
        self.press("Control+S")
        self.until(lambda: self.text == text, f"the text {text!r}")

    def shows(self, status):
        self.until(lambda: self.status == status, f"the status {status!r}")

    def says(self, words):
        self.until(lambda: any(words in note for note in self.notes), f"the message {words!r}")

    def explains(self, words):
        """The explanation of the last suggestion has these words; asked again until it has."""
        self.again("the explanation", lambda: any(words in note for note in self.notes), self._explain)

    def _explain(self):
        self.run("Notifications: Clear All Notifications")
        self.run("midfill: Explain Last Suggestion")

    def asks_popup_for(self, item):
        """The popup has the item; asked again until it has."""
        self.again(
            f"the item {item!r}",
            lambda: item in self.popup,
            lambda: self.press("Escape", "Control+Space"),
        )

    def again(self, what, condition, action):
        """Act until the condition holds soon after that."""
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            action()
            with contextlib.suppress(AssertionError):
                wait(condition, str, self.page.wait_for_timeout, PATIENCE_S)
                return
        raise AssertionError(f"{what} never came: {self.describe()}")

    def until(self, condition, what):
        wait(condition, lambda: f"{what} never came: {self.describe()}", self.page.wait_for_timeout)

    def describe(self):
        found = {"status": self.status, "ghost": self.ghost, "notes": self.notes, "choices": self.choices}
        found["servers"] = [process.cmdline() for process in self.servers]
        return json.dumps(found | {"popup": self.popup, "file": self.file and self.text}, indent=1)

    @property
    def servers(self):
        """The processes of midfill that belong to VS Code: one for each window."""
        found = []
        for process in psutil.Process(self.code.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "serve" in process.cmdline():
                    found.append(process)
        return found

    @property
    def server_pids(self):
        return [process.pid for process in self.servers]

    def serves(self, program):
        """Whether a server is that program."""
        return any(str(program) in process.cmdline() for process in self.servers)

    def close(self):
        self.page.close()


def wait(condition, describe, pause_ms=lambda ms: time.sleep(ms / 1000), limit_s=LIMIT_S):
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(describe())
        pause_ms(POLL_MS)


def plain(text):
    """Text of a page with its hard spaces made soft."""
    return text.replace("\u00a0", " ")
