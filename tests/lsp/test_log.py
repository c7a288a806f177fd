"""Nobody has to read what the server writes beside its answers, and it may be written anywhere."""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from raw import COMMAND, Raw, frame

pytestmark = pytest.mark.asyncio(loop_scope="module")

URI = "file:///work/main.py"

# Writes more than a pipe takes, in every way, from the event loop and from a thread, when it is initialized.
NOISY = """
import faulthandler, logging, os, sys, threading, warnings
import midfill.cli.main as cli, midfill.lsp.handlers.initialized as handler

MUCH = "x" * 200_000
old = handler.load_model

def fails():
    raise RuntimeError(MUCH)

def load_model(session):
    print(MUCH)
    print(MUCH, file=sys.stderr)
    warnings.warn(MUCH)
    faulthandler.dump_traceback(sys.stderr)
    logging.getLogger("midfill").error(MUCH)
    logging.getLogger("another library").error(MUCH)
    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    os.system("head -c 200000 /dev/zero >&2; echo x")
    for number in (1, 2):
        try:
            os.write(number, MUCH.encode())
        except BlockingIOError:
            pass
    return old(session)

handler.load_model = load_model
cli.main()
"""


def unread(kind):
    """The end of a pipe or a socket that a process writes to, and the other one, which is not read."""
    if kind == "pipe":
        read, write = os.pipe()
        return os.fdopen(write, "wb", buffering=0), os.fdopen(read, "rb", buffering=0)
    ours, theirs = socket.socketpair()
    return theirs, ours


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a descriptor that C libraries write to may block"
)
@pytest.mark.parametrize("kind", ["pipe", "socket"])
async def test_a_stderr_that_nobody_reads_stops_nothing(script, kind):
    theirs, ours = unread(kind)
    with ours:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", NOISY, "serve", "--log-level", "debug", *script({"text": "1"})),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=theirs,
            limit=1 << 26,
        )
        theirs.close()
        async with Raw(process) as server:
            await server.initialize()
            await server.loaded()
            for _ in range(50):
                await server.serves()
            server.request("end", "shutdown")
            await server.answer("end")
            server.notify("exit")
            assert await server.status() == 0


async def test_a_log_that_nobody_reads_stops_nothing(script):
    """The server's own lines at `info`, until there are more of them than any pipe takes."""
    theirs, ours = unread("pipe")
    with ours:
        process = await asyncio.create_subprocess_exec(
            *(*COMMAND, "--log-level", "debug", *script({"text": "1"})),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=theirs,
            limit=1 << 26,
        )
        theirs.close()
        async with Raw(process) as server:
            await server.initialize()
            await server.loaded()
            item = {"uri": URI, "languageId": "python", "version": 1, "text": "x = "}
            server.notify("textDocument/didOpen", {"textDocument": item})
            here = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 4}}
            for id_ in range(1_500):
                server.request(id_, "textDocument/inlineCompletion", here | {"context": {"triggerKind": 1}})
                assert "result" in await server.answer(id_)
            server.process.stdin.close()
            assert await server.status() == 1
        # What was written before the pipe was full is there, in order.
        assert b"serving" in ours.read(1 << 16)


async def ended(server):
    """The exit status, and what was written to stderr. On a slow machine the start alone takes seconds."""
    async with asyncio.timeout(60):
        said = await server.process.stderr.read()
        return await server.process.wait(), said


async def test_what_is_said_last_before_the_end_is_written():
    async with await Raw.start("--log-level", "info", "--engine", "scripted:/no/such/file") as server:
        await server.initialize()
        while (await server.receive()).get("method") != "window/showMessage":
            pass
        server.process.stdin.close()
        status, said = await ended(server)
        assert status == 1
        assert b"Cannot read the engine script" in said


async def test_an_error_at_the_start_is_written(tmp_path):
    (tmp_path / "config.toml").write_text("no_such_setting = 1\n")
    env = {"MIDFILL_CONFIG": str(tmp_path / "config.toml")}
    async with await Raw.start(env=env) as server:
        status, said = await ended(server)
        assert status == 1
        assert said.startswith(b"midfill: ")
        assert b"no_such_setting" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is Linux's")
async def test_a_log_file_on_a_full_disk_stops_nothing(scripted):
    server = await scripted({"text": "1"}, arguments=["--log-file", "/dev/full", "--log-level", "debug"])
    await server.loaded()
    await server.serves()
    server.process.stdin.close()
    status, said = await ended(server)
    assert status == 1
    assert b"Traceback" not in said


async def test_a_log_file_that_is_a_pipe_without_a_reader_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "log")
    async with await Raw.start("--log-file", str(tmp_path / "log")) as server:
        status, said = await ended(server)
        assert status == 1
        assert b"Cannot write the log file" in said


async def test_a_closed_stderr_takes_nothing_away(script):
    """Its number is free then, and would be that of the next file."""
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND]
    async with await Raw.start("--log-level", "debug", *script({"text": "1"}), command=command) as server:
        await server.initialize()
        await server.loaded()
        await server.serves()
        server.process.stdin.close()
        assert await server.status() == 1


async def test_descriptors_that_do_not_block_are_served(script):
    """Some editors have set that on their side of a socket, or of a pipe, which is the server's side too."""
    big = {"textDocument": {"uri": URI, "languageId": "python", "version": 1, "text": "x = 1\n" * 200_000}}
    messages = [
        {"id": 1, "method": "initialize", "params": {"processId": None, "rootUri": None, "capabilities": {}}},
        {"method": "textDocument/didOpen", "params": big},
        {"id": 2, "method": "midfill/documentText", "params": {"textDocument": {"uri": URI}}},
        {"id": 3, "method": "shutdown"},
        {"method": "exit"},
    ]
    for_input, our_input = os.pipe()
    our_output, for_output = os.pipe()
    os.set_blocking(for_input, False)
    os.set_blocking(for_output, False)
    process = subprocess.Popen(
        [*COMMAND, *script()], stdin=for_input, stdout=for_output, stderr=subprocess.DEVNULL
    )
    os.close(for_input)
    os.close(for_output)
    with os.fdopen(our_input, "wb") as inputs, os.fdopen(our_output, "rb") as outputs:
        inputs.write(b"".join(frame({"jsonrpc": "2.0"} | message) for message in messages))
        inputs.flush()
        said = outputs.read()
    assert process.wait(60) == 0
    assert len(said) > 1_200_000
    assert b'"id":3' in said
