"""Large files, fast typists and slow readers. Times and memory are the subject here."""

import asyncio
import itertools
import json

import psutil
import pytest

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process, pytest.mark.slow]

URI = "file:///work/main.py"
MB = 1_000_000


def open_document(server, text, uri=URI):
    item = {"uri": uri, "languageId": "python", "version": 1, "text": text}
    server.notify("textDocument/didOpen", {"textDocument": item})


def insert(server, line, character, text, version, *, uri=URI):
    here = {"line": line, "character": character}
    changes = [{"range": {"start": here, "end": here}, "text": text}]
    server.notify(
        "textDocument/didChange",
        {"textDocument": {"uri": uri, "version": version}, "contentChanges": changes},
    )


def ask(server, id_, line, character, *, uri=URI, method="textDocument/inlineCompletion"):
    params = {"textDocument": {"uri": uri}, "position": {"line": line, "character": character}}
    server.request(id_, method, params | {"context": {"triggerKind": 2}})


async def answers(server, num):
    """The next `num` answers by id; each id comes once."""
    found = {}
    while len(found) < num:
        message = await server.receive()
        if "method" not in message:
            assert message["id"] not in found
            found[message["id"]] = message
    return found


def computed_s(server):
    """Seconds of processor time that the server has used: other programs do not count."""
    return sum(psutil.Process(server.pid).cpu_times()[:2])


@pytest.mark.parametrize("char", ["x", "é"])
async def test_a_line_of_ten_megabytes_costs_what_ten_of_one_cost(scripted, char):
    server = await scripted({"text": "1"})
    await server.loaded()
    seconds = {}
    for size in (2 * MB, 10 * MB):
        uri = f"file:///{size}.py"
        before, begun_s = server.memory(), computed_s(server)
        open_document(server, (char * 9 + " ") * (size // 10), uri=uri)
        ask(server, 1, 0, size, uri=uri)
        ask(server, 2, 0, size // 2, uri=uri, method="textDocument/completion")
        insert(server, 0, size, "y = ", 2, uri=uri)
        ask(server, 3, 0, size + 4, uri=uri)
        found = await answers(server, 3)
        tries = itertools.count(4)
        # Until all of it has been searched for secrets there is no suggestion.
        while not (items := found[max(found)]["result"]["items"]):
            number = next(tries)
            ask(server, number, 0, size + 4, uri=uri)
            found = await answers(server, 1)
        assert len(items) == 1
        seconds[size], memory = computed_s(server) - begun_s, server.peak_memory() - before
        print(f"{size // MB} MB line: {seconds[size]:.2f} s, {memory / MB:.0f} MB")
    # Were it quadratic, it would take 25 times as long.
    assert seconds[10 * MB] < 15 * seconds[2 * MB]
    assert memory < 300 * MB


async def test_a_key_costs_about_the_same_in_a_short_file_and_in_a_hundred_thousand_lines(scripted):
    server = await scripted({"text": "1"})
    await server.loaded()
    seconds = {}
    for num_lines in (1_000, 100_000):
        uri = f"file:///{num_lines}.py"
        open_document(server, "".join(f"    value_{i} = compute({i})\n" for i in range(num_lines)), uri=uri)
        await server.serves()
        begun_s = computed_s(server)
        for key in range(200):
            insert(server, num_lines // 2, key, "x", key + 2, uri=uri)
            ask(server, key, num_lines // 2, key + 1, uri=uri)
            assert "result" in await server.answer(key)
        seconds[num_lines] = computed_s(server) - begun_s
        print(f"{num_lines} lines: {1000 * seconds[num_lines] / 200:.2f} ms a key")
    # Reading the whole text at each key would take some fifty times as long.
    assert seconds[100_000] < 15 * seconds[1_000]


async def test_five_hundred_keys_each_with_a_request_and_a_cancel(scripted, tmp_path):
    log = tmp_path / "log"
    server = await scripted({"text": "x" * 20, "token_delay_s": 0.001}, log=str(log))
    await server.loaded()
    open_document(server, "a = \n" * 1000)
    for key in range(500):
        insert(server, 500, 4 + key, " ", key + 2)
        ask(server, key, 500, 5 + key)
        if key < 499:
            server.notify("$/cancelRequest", {"id": key})
    found = await answers(server, 500)
    assert set(found) == set(range(500))
    codes = {found[key]["error"]["code"] for key in range(499) if "error" in found[key]}
    assert codes <= {-32800}
    assert len(found[499]["result"]["items"]) == 1
    await server.serves()
    # Few of the answers that nobody waits for any more are written to their end.
    steps = sum(json.loads(line)["steps"] for line in log.read_text().splitlines())
    assert steps < 500 * 20 / 4


async def test_two_hundred_requests_at_once(scripted):
    server = await scripted({"text": "1"})
    await server.loaded()
    for number in range(200):
        open_document(server, "a = \n", uri=f"file:///{number}.py")
    for number in range(200):
        ask(server, number, 0, 4, uri=f"file:///{number}.py")
    found = await answers(server, 200)
    assert all(len(answer["result"]["items"]) == 1 for answer in found.values())


async def test_two_hundred_requests_of_one_document_at_once(scripted):
    server = await scripted({"text": "1"})
    await server.loaded()
    open_document(server, "a = \n")
    for number in range(200):
        ask(server, number, 0, 4)
    found = await answers(server, 200)
    assert len(found[199]["result"]["items"]) == 1
    assert all(found[number].get("error", {"code": -32800})["code"] == -32800 for number in range(199))


async def test_opened_and_closed_documents_leave_nothing(scripted):
    server = await scripted({"text": "1"})
    await server.loaded()
    text = "    total = compute(value)  # of a line\n" * 25_000

    async def visit(numbers):
        for number in numbers:
            uri = f"file:///{number}.py"
            open_document(server, text, uri=uri)
            ask(server, number, 10, 39, uri=uri)
            await server.answer(number)
            server.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
            await server.serves()

    before = server.memory()
    await visit(range(150))
    print(f"150 documents of 1 MB: {(server.memory() - before) / MB:.1f} MB left")
    assert server.memory() - before < 50 * MB


async def test_many_documents_open_at_once_leave_nothing(scripted):
    server = await scripted({"text": "1"})
    await server.loaded()
    text = "    total = compute(value)  # of a line\n" * 25_000
    before = server.memory()
    for number in range(150):
        open_document(server, text, uri=f"file:///{number}.py")
    await server.serves()
    for number in range(150):
        server.notify("textDocument/didClose", {"textDocument": {"uri": f"file:///{number}.py"}})
    await server.serves()
    print(f"150 open documents of 1 MB: {(server.memory() - before) / MB:.1f} MB left")
    assert server.memory() - before < 50 * MB


async def test_a_client_that_stops_reading_for_three_seconds(scripted, tmp_path):
    log = tmp_path / "log"
    server = await scripted({"text": "1"}, log=str(log))
    await server.loaded()
    text = "x = 1\n" * 200_000
    open_document(server, text)
    open_document(server, "a = \n", uri="file:///small.py")
    server.process.stdout._transport.pause_reading()
    for number in range(20):
        server.request(number, "midfill/documentText", {"textDocument": {"uri": URI}})
    ask(server, "while deaf", 0, 4, uri="file:///small.py")
    num_before = len(log.read_text().splitlines())
    # Time itself is under test.
    await asyncio.sleep(3)
    # Its output is stuck in the pipe, and yet it has read on and asked the model.
    runs = [json.loads(line) for line in log.read_text().splitlines()[num_before:]]
    assert [run["outcome"] for run in runs if not run["idle"]] == ["finished"]
    server.process.stdout._transport.resume_reading()
    found = await answers(server, 21)
    assert all(found[number]["result"]["text"] == text for number in range(20))
    assert found["while deaf"]["result"]["items"]


def at(line, character, *, until=0, text=""):
    start, end = {"line": line, "character": character}, {"line": line, "character": character + until}
    return {"range": {"start": start, "end": end}, "text": text}


def two_changes(line):
    """A bracket and what the editor closes it with, as two changes."""
    return [at(line, 3, text="("), at(line, 4, text=")")]


# What is done at each of the cursors, from the last line up as most editors send it, or from the first down.
CURSORS = {
    "brackets": lambda num: [at(line, 3, text="()") for line in range(num)],
    "brackets, one by one": lambda num: [change for line in range(num) for change in two_changes(line)],
    "braces on lines of their own": lambda num: [at(line, 3, text="{\n}") for line in reversed(range(num))],
    "lines ends": lambda num: [at(line, 3, text="\n") for line in reversed(range(num))],
    "deletions": lambda num: [at(line, 3, until=2) for line in range(num)],
    "replacements": lambda num: [at(line, 0, until=3, text="é)") for line in range(num)],
    "one long line": lambda num: [at(num, 20 * place, text="()") for place in reversed(range(num))],
}


@pytest.mark.parametrize("what", CURSORS)
async def test_a_change_at_each_of_many_cursors_takes_time_in_proportion(shared, what):
    await shared.loaded()

    async def seconds(num, version):
        uri = f"file:///work/{num}.py"
        open_document(shared, "".join(f"foo{line} = bar\n" for line in range(num)) + "é" * 20 * num, uri)
        # There is a suggestion, so that edits are followed.
        ask(shared, version, 0, 0, uri=uri)
        await shared.answer(version)
        taken = []
        for turn in range(3):
            document = {"uri": uri, "version": version + turn}
            changes = {"textDocument": document, "contentChanges": CURSORS[what](num)}
            begun = shared.loop_s()
            shared.notify("textDocument/didChange", changes)
            await shared.serves()
            taken.append(shared.loop_s() - begun)
        shared.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
        return min(taken)

    few, many = await seconds(500, 10), await seconds(2_000, 20)
    print(f"{what}: {few * 1000:.0f} ms for 500 cursors, {many * 1000:.0f} ms for 2,000")
    # Sixteen times as long when each cursor costs the whole document.
    assert many < 10 * few


async def test_edits_of_many_cells_at_once_take_time_in_proportion(scripted):
    server = await scripted({"text": "1"})
    await server.loaded()

    async def seconds(num):
        notebook = f"file:///work/{num}.ipynb"
        cells = [f"cell://{num}/{cell}" for cell in range(num)]
        texts = [
            {"uri": cell, "languageId": "python", "version": 1, "text": "a = b\n" * 20} for cell in cells
        ]
        kinds = [{"kind": 2, "document": cell} for cell in cells]
        opened = {"uri": notebook, "notebookType": "jupyter-notebook", "version": 1, "cells": kinds}
        server.notify("notebookDocument/didOpen", {"notebookDocument": opened, "cellTextDocuments": texts})
        ask(server, num, 0, 4, uri=cells[0])
        await server.answer(num)
        taken = []
        for version in range(2, 5):
            edits = [
                {"document": {"uri": cell, "version": version}, "changes": [at(3, 2, text="()")]}
                for cell in cells
            ]
            change = {"cells": {"textContent": edits}}
            begun = server.loop_s()
            server.notify(
                "notebookDocument/didChange",
                {"notebookDocument": {"uri": notebook, "version": version}, "change": change},
            )
            await server.serves()
            taken.append(server.loop_s() - begun)
        return min(taken)

    few, many = await seconds(250), await seconds(1_000)
    print(f"cells: {few * 1000:.0f} ms for 250, {many * 1000:.0f} ms for 1,000")
    assert many < 10 * few
