"""Processes of midfill forked from one process that has imported the server.

Most of the hundreds of tests that start a server test what it answers, not how Python starts; but the
imports take most of the processor time of such a test. `command()` starts the same program with the
environment, the folder and the standard streams of its caller, only that the modules are imported already.
`forked.py` is what the caller starts: it hands these over and waits. Its process id is not that of the
server, so tests that look at the process itself, and those of how Python starts, use `SERVE_COMMAND`.
"""

import ast
import atexit
import contextlib
import gc
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from midfill.lsp.client import SERVE_COMMAND

FORKED = Path(__file__).with_name("forked.py")
_started: list[tuple[str, ...]] = []


def command(*words):
    """Return what starts midfill with these words, by a fork where the system can."""
    if sys.platform != "linux":
        return (*SERVE_COMMAND[:-1], *words)
    if not _started:
        _started.append(_start())
    return (*_started[0], *words)


def _start():
    folder = tempfile.TemporaryDirectory(prefix="midfill-fork-")
    # Named so that a command line has the words "midfill serve", as the real one has.
    path = f"{folder.name}/midfill"
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Control-C is for the tests alone.
        start_new_session=True,
    )
    # It listens.
    assert process.stdout.readline() == b"ready\n"

    def end():
        process.stdin.close()
        process.wait()
        process.stdout.close()
        folder.cleanup()

    atexit.register(end)
    return (sys.executable, "-I", "-S", str(FORKED), path)


class _Starts:
    """What one caller after the other asks to start; each connection is that of one server."""

    def __init__(self, path):
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._servers = {}

    def serve(self):
        """Until the end of the standard input."""
        self._selector.register(0, selectors.EVENT_READ, self._end)
        self._selector.register(self._listener, selectors.EVENT_READ, self._begin)
        while True:
            for key, _ in self._selector.select():
                # One that ended in this round is closed, and its number may be another's by now.
                if self._selector.get_map().get(key.fd) is key:
                    key.data(key.fileobj)

    def _begin(self, listener):
        caller, _ = listener.accept()
        size, streams, _, _ = socket.recv_fds(caller, 8, 3)
        wanted, more = b"", size
        while more and len(wanted) < int(size):
            more = caller.recv(int(size) - len(wanted))
            wanted += more
        # An editor may have killed its server before that has said what it wants.
        pid = os.fork() if more else None
        if pid == 0:
            self._become(caller, streams, *ast.literal_eval(wanted.decode()))
        for stream in streams:
            os.close(stream)
        if pid is None:
            caller.close()
            return
        ending = os.pidfd_open(pid)
        self._servers[ending] = self._servers[caller] = (pid, ending, caller)
        self._selector.register(ending, selectors.EVENT_READ, self._ended)
        self._selector.register(caller, selectors.EVENT_READ, self._left)

    def _become(self, caller, streams, folder, arguments, environment):
        try:
            for one in (self._selector, self._listener, caller, *{s[2] for s in self._servers.values()}):
                one.close()
            for ending in {s[1] for s in self._servers.values()}:
                os.close(ending)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv = [sys.argv[0], *arguments]
            _run()
        finally:
            os._exit(1)

    def _ended(self, ending):
        """Tell the caller the exit status."""
        pid, _, caller = self._forget(ending)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):
            caller.send(str(status).encode())
        caller.close()

    def _left(self, caller):
        """The caller was killed, and so is what it stands for."""
        pid, _, _ = self._forget(caller)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        caller.close()

    def _forget(self, key):
        pid, ending, caller = self._servers[key]
        for one in (ending, caller):
            del self._servers[one]
            self._selector.unregister(one)
        os.close(ending)
        return pid, ending, caller

    def _end(self, _stdin):
        for pid in {server[0] for server in self._servers.values()}:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def _run():
    from midfill.cli.main import main

    try:
        main()
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _preload():
    """Import what every server imports; nothing that starts a thread, which a fork would lose."""
    import midfill.cli.main
    import midfill.engine.scripted
    import midfill.lsp.recording
    import midfill.lsp.server
    import midfill.system.log_stream  # noqa: F401

    gc.freeze()


if __name__ == "__main__":
    _preload()
    starts = _Starts(sys.argv[1])
    print("ready", flush=True)
    starts.serve()
