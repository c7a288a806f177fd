"""The life of a server process: how it starts, what it refuses, and every way in which it ends."""

import asyncio
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from raw import COMMAND, Raw, descendants, frame

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

URI = "file:///work/main.py"
OPEN = {"textDocument": {"uri": URI, "languageId": "python", "version": 1, "text": "a = \n"}}
ASK = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 4}, "context": {"triggerKind": 2}}


async def test_a_request_before_initialize_is_refused_and_initialize_still_works(scripted):
    server = await scripted(initialize=False)
    server.request(1, "textDocument/inlineCompletion", ASK)
    assert (await server.answer(1))["error"]["code"] == -32002
    result = await server.initialize()
    assert result["serverInfo"]["name"] == "midfill"
    await server.serves()


async def test_notifications_before_initialize_are_dropped(scripted):
    server = await scripted(initialize=False)
    server.notify("textDocument/didOpen", OPEN)
    server.notify("initialized", {})
    await server.initialize()
    server.request(1, "midfill/documentText", {"textDocument": {"uri": URI}})
    assert (await server.answer(1))["error"]["code"] == -32602


async def test_a_second_initialize_is_refused_and_open_documents_are_kept(scripted):
    server = await scripted()
    server.notify("textDocument/didOpen", OPEN)
    server.request(1, "initialize", {"processId": None, "rootUri": None, "capabilities": {}})
    assert (await server.answer(1))["error"]["code"] == -32600
    server.request(2, "midfill/documentText", {"textDocument": {"uri": URI}})
    assert (await server.answer(2))["result"]["text"] == "a = \n"


async def test_requests_after_shutdown_are_refused(scripted):
    server = await scripted()
    server.request(1, "shutdown")
    assert (await server.answer(1)) == {"jsonrpc": "2.0", "id": 1, "result": None}
    for id_, method in enumerate(
        ["textDocument/inlineCompletion", "initialize", "shutdown", "no/such"], start=2
    ):
        server.request(id_, method, {})
        assert (await server.answer(id_))["error"]["code"] == -32600
    server.notify("exit")
    assert await server.status() == 0


async def test_exit_without_shutdown_is_status_one(scripted):
    server = await scripted()
    server.notify("exit")
    assert await server.status() == 1


async def test_exit_before_initialize_is_status_one(scripted):
    server = await scripted(initialize=False)
    server.notify("exit")
    assert await server.status() == 1


@pytest.mark.parametrize(("shutdown", "status"), [(True, 0), (False, 1)])
async def test_it_ends_with_twenty_requests_in_flight(scripted, shutdown, status):
    server = await scripted({"hang": True})
    await server.loaded()
    for id_ in range(20):
        uri = f"file:///work/{id_}.py"
        server.notify("textDocument/didOpen", {"textDocument": OPEN["textDocument"] | {"uri": uri}})
        server.request(id_, "textDocument/inlineCompletion", ASK | {"textDocument": {"uri": uri}})
    if shutdown:
        server.request("bye", "shutdown")
    server.notify("exit")
    assert await server.status() == status
    answers = [message for message in await server.rest() if "method" not in message]
    if shutdown:
        assert {"jsonrpc": "2.0", "id": "bye", "result": None} in answers
    # Each request got its one answer before the end.
    codes = {answer["id"]: answer["error"]["code"] for answer in answers if answer["id"] != "bye"}
    assert codes == dict.fromkeys(range(20), -32800)
    assert len(answers) == 20 + shutdown


async def test_the_end_of_input_ends_it(scripted):
    server = await scripted({"hang": True})
    server.process.stdin.close()
    assert await server.status() == 1


async def test_the_end_of_input_in_the_middle_of_a_frame_ends_it(scripted):
    server = await scripted()
    server.send_bytes(b'Content-Length: 500\r\n\r\n{"jsonrpc"')
    server.process.stdin.close()
    assert await server.status() == 1


async def test_sigterm_ends_it(scripted):
    server = await scripted({"hang": True})
    server.process.send_signal(signal.SIGTERM)
    assert await server.status() == 1


async def test_a_closed_output_ends_it_even_when_it_has_nothing_to_say(scripted):
    server = await scripted()
    await server.loaded()
    server.close_output()
    assert await server.status() == 1


async def test_a_closed_output_ends_it_while_it_answers(scripted):
    server = await scripted()
    server.close_output()
    for id_ in range(50):
        server.request(id_, "midfill/explain", {"textDocument": {"uri": URI}})
    assert await server.status() == 1


async def test_it_ends_though_nobody_reads_what_it_has_to_say(script):
    big = {"textDocument": OPEN["textDocument"] | {"text": "x = 1\n" * 200_000}}
    messages = [
        {"id": 1, "method": "initialize", "params": {"processId": None, "rootUri": None, "capabilities": {}}},
        {"method": "textDocument/didOpen", "params": big},
        *(
            {"id": 2, "method": "midfill/documentText", "params": {"textDocument": {"uri": URI}}}
            for _ in range(20)
        ),
    ]
    process = subprocess.Popen(
        [*COMMAND, *script()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process:
        process.stdin.write(b"".join(frame({"jsonrpc": "2.0"} | message) for message in messages))
        process.stdin.close()
        assert process.wait(60) == 1


async def test_a_whole_session_in_one_write_is_served_in_order(scripted):
    server = await scripted(initialize=False)
    initialize = {"processId": None, "rootUri": None, "capabilities": {}}
    server.request(1, "initialize", initialize)
    server.notify("initialized", {})
    server.notify("textDocument/didOpen", OPEN)
    server.request(2, "midfill/documentText", {"textDocument": {"uri": URI}})
    server.request(3, "shutdown")
    server.notify("exit")
    server.process.stdin.close()
    assert await server.status() == 0
    answers = {message["id"]: message for message in await server.rest() if "method" not in message}
    assert sorted(answers) == [1, 2, 3]
    assert answers[2]["result"]["text"] == "a = \n"


# Starts the rest of its arguments, and stays until it is killed.
EDITOR = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"


@pytest.mark.parametrize("levels", [1, 2], ids=["its parent", "further up"])
async def test_the_death_of_the_editor_ends_it_though_its_input_stays_open(script, levels):
    command = [sys.executable, "-c", EDITOR] * levels + COMMAND
    async with await Raw.start(*script(), command=command) as editor:
        await editor.initialize(processId=editor.pid)
        await editor.loaded()
        servers = descendants(editor.pid)
        assert len(servers) == levels
        editor.process.kill()
        async with asyncio.timeout(60):
            await editor.rest()
            for server in servers:
                # With a wrapper between them, that one is not the server's to end.
                if "serve" in servers[server]:
                    await asyncio.to_thread(server.wait)


async def test_an_editor_that_is_not_visible_here_is_not_watched(scripted):
    """In a container or a sandbox the editor has a number that is nobody's here, or somebody else's."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    numbers = {ended.pid: "nobody", other.pid: "somebody else", 4_194_303: "beyond", 2**31 - 1: "absurd"}
    servers = []
    for number in numbers:
        server = await scripted(initialize=False, arguments=["--log-level", "info"])
        await server.initialize(processId=number)
        await server.loaded()
        servers.append((number, server))
    other.communicate(b"\n")
    for number, server in servers:
        # What ends the server would have been done by the time that it has answered.
        await server.serves()
        await server.serves()
        server.process.stdin.close()
        assert await server.status() == 1
        logged = (await server.process.stderr.read()).decode()
        assert logged.count(f"the editor's process {number} is not watched") == 1


@pytest.mark.parametrize("process_id", ["12", -1, 0, None, 1.5, {}, 2**40])
async def test_a_strange_process_id_does_not_lock_the_editor_out(scripted, process_id):
    server = await scripted(initialize=False)
    server.request(1, "initialize", {"processId": process_id, "rootUri": None, "capabilities": {}})
    assert "result" in await server.answer(1)


async def test_it_leaves_no_child_behind(scripted):
    server = await scripted()
    await server.loaded()
    children = psutil.Process(server.pid).children(recursive=True)
    server.process.stdin.close()
    await server.status()
    assert not [child for child in children if child.is_running()]


@pytest.mark.slow
async def test_an_idle_server_neither_polls_nor_spins(scripted):
    server = await scripted()
    await server.loaded()
    process = psutil.Process(server.pid)
    await asyncio.sleep(1)  # start-up (imports, the first collection) is over
    cpu, switches = sum(process.cpu_times()[:2]), process.num_ctx_switches().voluntary
    # Time itself is under test.
    await asyncio.sleep(5)
    # Spinning would take all of it.
    assert sum(process.cpu_times()[:2]) - cpu < 0.05 * 5
    assert process.num_ctx_switches().voluntary - switches < 20


@pytest.mark.slow
async def test_it_does_not_spin_while_a_request_waits_and_input_has_garbage(scripted):
    server = await scripted({"hang": True})
    await server.loaded()
    server.notify("textDocument/didOpen", OPEN)
    server.send_bytes(b"\r\n\r\nContent-Length: -1\r\n\r\nxx")
    server.request(1, "textDocument/inlineCompletion", ASK)
    process = psutil.Process(server.pid)
    await asyncio.sleep(1)  # what was sent has been read
    cpu = sum(process.cpu_times()[:2])
    # Time itself is under test.
    await asyncio.sleep(2)
    assert sum(process.cpu_times()[:2]) - cpu < 0.05 * 2


async def test_initialize_is_answered_before_a_model_is_loaded(scripted):
    # Starting it waits for the answer, for less than the model takes.
    server = await scripted({"text": "1"}, load_delay_s=600)
    await server.serves()
    server.request("state", "midfill/status", {})
    assert (await server.answer("state"))["result"]["state"] == "loading"


def is_progress(message, kind):
    return message.get("method") == "$/progress" and message["params"]["value"]["kind"] == kind


async def test_an_editor_that_is_slow_to_show_progress_holds_nothing_up(scripted):
    server = await scripted(initialize=False)
    await server.initialize(capabilities={"window": {"workDoneProgress": True}})
    # It has other things to do, and lets the server wait for longer than the model takes.
    await server.loaded()
    (asked,) = [m for m in server.seen if m.get("method") == "window/workDoneProgress/create"]
    assert not any(m.get("method") == "$/progress" for m in server.seen)
    server.send({"jsonrpc": "2.0", "id": asked["id"], "result": None})
    begun, ended = await server.receive(), await server.receive()
    assert is_progress(begun, "begin")
    assert begun["params"]["value"]["title"].startswith("midfill: ")
    assert is_progress(ended, "end")
    assert begun["params"]["token"] == ended["params"]["token"] == asked["params"]["token"]
    # Who refuses is told nothing.
    refusing = await scripted(initialize=False)
    await refusing.initialize(capabilities={"window": {"workDoneProgress": True}})
    while (asked := await refusing.receive()).get("method") != "window/workDoneProgress/create":
        pass
    refusing.send({"jsonrpc": "2.0", "id": asked["id"], "error": {"code": -32601, "message": "no"}})
    await refusing.loaded()
    assert not any(m.get("method") == "$/progress" for m in refusing.seen)


async def test_a_socket_pair_serves_as_stdio(script):
    """Node gives its children sockets in place of pipes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [*COMMAND, *script()], stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL
        )
        theirs.close()
        ours.settimeout(60)
        ours.sendall(
            frame({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"capabilities": {}}})
        )
        assert b'"result"' in ours.recv(1 << 16)
        ours.sendall(frame({"jsonrpc": "2.0", "id": 2, "method": "shutdown"}))
        assert b'"id":2' in ours.recv(1 << 16)
        ours.sendall(frame({"jsonrpc": "2.0", "method": "exit"}))
        assert process.wait(60) == 0
