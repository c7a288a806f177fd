"""Accepted suggestions are counted, on this machine, without their text."""

import asyncio
import json
import sys

import pytest

import forkserver
from midfill.completion.stats.acceptance import AcceptanceCounts, read
from midfill.lsp.client import Client

pytestmark = pytest.mark.asyncio(loop_scope="module")

URI = "file:///work/main.py"
HERE = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 4}, "context": {"triggerKind": 2}}


async def start(script, tmp_path, monkeypatch, name="an editor", options=None):
    monkeypatch.setenv("MIDFILL_STATE", str(tmp_path / "state"))
    client = await Client.start([*forkserver.command("serve"), *script({"text": "compute(1)"})])
    heard = []
    client.on_notification = lambda method, params: heard.append((method, params))
    await client.initialize(options, name)
    async with asyncio.timeout(60):
        while not any(m == "$/progress" and p["value"]["kind"] == "end" for m, p in heard):
            await client.request("midfill/explain", {"textDocument": {"uri": URI}})
    item = {"uri": URI, "languageId": "python", "version": 1, "text": "x = \ny = 2\n"}
    client.notify("textDocument/didOpen", {"textDocument": item})
    return client


async def insert(client, text):
    place = {"line": 0, "character": 4}
    change = {"range": {"start": place, "end": place}, "text": text}
    params = {"textDocument": {"uri": URI, "version": 2}, "contentChanges": [change]}
    client.notify("textDocument/didChange", params)


async def accepted(client, item):
    command = item["command"]
    assert command["command"] == "midfill.accepted"
    params = {"command": command["command"], "arguments": command["arguments"]}
    assert await client.request("workspace/executeCommand", params) is None


@pytest.mark.parametrize("by", ["command", "edit", "both", "whole text"])
async def test_an_accepted_item_is_counted(script, tmp_path, monkeypatch, by):
    client = await start(script, tmp_path, monkeypatch)
    [item] = (await client.request("textDocument/inlineCompletion", HERE))["items"]
    if by == "whole text":
        changes = [{"text": "x = compute(1)\ny = 2\n"}]
        params = {"textDocument": {"uri": URI, "version": 2}, "contentChanges": changes}
        client.notify("textDocument/didChange", params)
    elif by != "command":
        await insert(client, item["insertText"])
    if by in {"command", "both"}:
        await accepted(client, item)
    await client.close()
    path = tmp_path / "state" / "feedback.json"
    assert read(path) == {"scripted": {"python": AcceptanceCounts(offered=1, accepted=1, accepted_chars=10)}}
    assert "compute" not in path.read_text()


async def test_a_popup_item_has_the_command_too(script, tmp_path, monkeypatch):
    client = await start(script, tmp_path, monkeypatch)
    [item] = (await client.request("textDocument/completion", HERE))["items"]
    await accepted(client, item)
    await client.close()
    assert read(tmp_path / "state" / "feedback.json")["scripted"]["python"].accepted == 1


@pytest.mark.parametrize(("name", "options"), [("midfill", None), ("an editor", {"countFeedback": False})])
async def test_own_measurements_and_users_who_do_not_want_it_are_not_counted(
    script, tmp_path, monkeypatch, name, options
):
    client = await start(script, tmp_path, monkeypatch, name, options)
    [item] = (await client.request("textDocument/inlineCompletion", HERE))["items"]
    assert "command" not in item
    await insert(client, item["insertText"])
    await client.close()
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("arguments", [None, [], [99], ["x"], [{"id": 1}], [True]])
async def test_a_command_with_odd_arguments_counts_nothing(script, tmp_path, monkeypatch, arguments):
    client = await start(script, tmp_path, monkeypatch)
    params = {"command": "midfill.accepted", "arguments": arguments}
    assert await client.request("workspace/executeCommand", params) is None
    await client.close()
    assert not (tmp_path / "state").exists()


async def test_the_status_command_prints_the_counts(script, tmp_path, monkeypatch):
    client = await start(script, tmp_path, monkeypatch)
    [item] = (await client.request("textDocument/inlineCompletion", HERE))["items"]
    await accepted(client, item)
    await client.close()
    shown = json.loads(await status("--json"))
    assert shown["counts"]["scripted"]["python"]["accepted"] == 1
    assert shown["counts_file"] == str(tmp_path / "state" / "feedback.json")
    assert "1 (100%)" in await status()


async def status(*options):
    command = (sys.executable, "-P", "-m", "midfill", "status", *options)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    return (await process.communicate())[0].decode()
