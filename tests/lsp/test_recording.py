"""A recorded session, replayed against a fresh server, gives the same answers."""

import json
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from raw import Raw

import forkserver

pytestmark = pytest.mark.asyncio(loop_scope="module")

URI = "file:///work/main.py"
HEADER = '{"midfillRecording": 1}\n'


@pytest.fixture
def rules():
    return [{"after": "slow = ", "hang": True}, {"after": "a = ", "text": "1"}, {"text": "other"}]


async def record(script, rules, path, client=None):
    """A session of everything that can be answered in several ways."""
    async with await Raw.start(*script(*rules), "--record", str(path)) as server:
        info = {"clientInfo": {"name": client, "version": "1"}} if client else {}
        await server.initialize(processId=1, capabilities={"window": {"workDoneProgress": True}}, **info)
        # Its answer depends on whether the model has been loaded, so a replay does not compare it.
        ask(server, "early", 0, 0)
        while (message := await server.receive()).get("params", {}).get("value", {}).get("kind") != "end":
            if message.get("method") == "window/workDoneProgress/create":
                server.send({"jsonrpc": "2.0", "id": message["id"], "result": None})
        item = {"uri": URI, "languageId": "python", "version": 1, "text": "a = é😀\nslow = \n"}
        server.notify("textDocument/didOpen", {"textDocument": item})
        ask(server, 1, 0, 4)
        await server.answer(1)
        edit = {
            "textDocument": {"uri": URI, "version": 2},
            "contentChanges": [{"text": "a = \nslow = \nb = \n"}],
        }
        server.notify("textDocument/didChange", edit)
        ask(server, 1, 0, 4)
        await server.answer(1)
        ask(server, "cancelled", 1, 7)
        server.notify("$/cancelRequest", {"id": "cancelled"})
        await server.answer("cancelled")
        server.send(b"not json \xff")
        assert (await server.receive())["error"]["code"] == -32700
        server.request(3, "no/such")
        await server.answer(3)
        server.request(4, "shutdown")
        await server.answer(4)
        server.notify("exit")
        assert await server.status() == 0


def ask(server, id_, line, character):
    params = {
        "textDocument": {"uri": URI},
        "position": {"line": line, "character": character},
        "context": {"triggerKind": 1},
    }
    server.request(id_, "textDocument/inlineCompletion", params)


def replay(path, script_arguments, *options):
    command = shlex.join([*forkserver.command("serve"), *script_arguments])
    return subprocess.run(
        forkserver.command("replay", str(path), "--command", command, *options),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("client", [None, "helix"])
async def test_a_recorded_session_is_replayed_with_equal_answers(script, tmp_path, rules, client):
    path = tmp_path / "session.jsonl"
    # Helix gets other answers than most clients, in a replay too.
    await record(script, rules, path, client)
    done = replay(path, script(*rules), "--json")
    result = json.loads(done.stdout)
    assert result["different"] == []
    assert result["equal"] == result["compared"] >= 6
    assert result["compared"] + result["while_loading"] == result["requests"]
    assert result["median_ms"]["replayed"] > 0
    assert done.returncode == 0


@pytest.mark.parametrize("client", [None, "helix"])
async def test_a_replay_is_no_second_opinion(script, tmp_path, rules, monkeypatch, client):
    monkeypatch.setenv("MIDFILL_STATE", str(tmp_path / "state"))
    path = tmp_path / "session.jsonl"
    await record(script, rules, path, client)
    counts = (tmp_path / "state" / "feedback.json").read_text()
    assert '"offered": 2' in counts
    command = shlex.join([*forkserver.command("serve"), *script(*rules)])
    replayed = subprocess.run(
        forkserver.command("replay", str(path), "--command", command, "--speed", "0"),
        capture_output=True,
        check=False,
    )
    assert replayed.returncode == 0, replayed.stdout
    assert (tmp_path / "state" / "feedback.json").read_text() == counts


async def test_a_difference_is_shown_and_is_status_one(script, tmp_path, rules):
    path = tmp_path / "session.jsonl"
    await record(script, rules, path)
    other = [rules[0], {"after": "a = ", "text": "2"}, rules[2]]
    done = replay(path, script(*other), "--speed", "0")
    assert done.returncode == 1
    assert '"insertText": "1"' in done.stdout
    assert '"insertText": "2"' in done.stdout


async def test_a_recording_is_private_and_says_what_it_holds(script, tmp_path, rules):
    path = tmp_path / "session.jsonl"
    await record(script, rules, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert "source text" in header["warning"]
    assert {line["from"] for line in lines} == {"client", "server"}
    assert [line["t"] for line in lines] == sorted(line["t"] for line in lines)
    help_text = subprocess.run(
        forkserver.command("serve", "--help"), capture_output=True, text=True, check=True
    ).stdout
    assert "source text" in " ".join(help_text.split())


async def test_an_older_recording_is_kept(script, tmp_path, rules):
    path = tmp_path / "session.jsonl"
    path.write_text("mine")
    await record(script, rules, path)
    assert path.read_text() == "mine"
    assert json.loads((tmp_path / "session.jsonl.2").read_text().splitlines()[0])["midfillRecording"] == 1


async def test_nothing_is_recorded_unless_asked_for(scripted, tmp_path):
    server = await scripted({"text": "1"})
    await server.loaded()
    assert [path.name for path in tmp_path.iterdir()] == ["script.json"]


async def test_a_session_that_was_cut_off_is_replayed_as_far_as_it_goes(script, tmp_path, rules):
    path = tmp_path / "session.jsonl"
    await record(script, rules, path)
    text = path.read_text()
    path.write_text(text[: text.index("cancelRequest")])
    assert replay(path, script(*rules), "--speed", "0").returncode == 0


@pytest.mark.parametrize(
    "text",
    [
        *("", "junk\n", "{}\n{}\n", '{"midfillRecording": 99}\n{}\n', "[]\n", "[" * 100_000 + "\n"),
        *(
            HEADER + line + "\n"
            for line in (
                *("[]", "7", "null", '{"t": NaN, "from": "client"}', '{"t": 1e999, "from": "client"}'),
                '{"t": 0, "from": "client", "bytes": 7}',
                '{"t": 0, "from": "client", "message": ' + "[" * 100_000,
                '{"t": 0, "from": "client", "message": ' + "[" * 500 + "]" * 500 + "}",
                '{"t": ' + "9" * 1000 + ', "from": "client"}',
            )
        ),
    ],
    ids=lambda text: repr(text[-50:]),
)
async def test_what_is_no_recording_is_refused_in_a_sentence(tmp_path, text):
    path = tmp_path / "session.jsonl"
    path.write_text(text)
    done = replay(path, [])
    assert done.returncode == 1
    assert done.stderr.startswith("midfill: ")
    assert "Traceback" not in done.stderr


async def test_messages_of_no_form_are_played_and_break_nothing(script, tmp_path, rules):
    path = tmp_path / "session.jsonl"
    messages = [
        *(
            {"method": "$/progress"},
            {"method": "$/progress", "params": {"value": 7}},
            {"method": ["x"], "id": 1},
        ),
        *([], [{"id": 1}], 7, "x", {"method": "workspace/executeCommand", "id": 2, "params": []}),
        {"method": "\x1b[2J\u202e", "id": {"a": 1}},
    ]
    lines = [
        json.dumps({"t": 0, "from": sender, "message": message})
        for message in messages
        for sender in ("server", "client")
    ]
    path.write_text(HEADER + "\n".join(lines) + "\n")
    done = replay(path, script(*rules), "--speed", "0")
    assert "Traceback" not in done.stderr
    assert all(mark.isprintable() or mark == "\n" for mark in done.stdout)


async def test_a_strangers_recording_trains_and_chooses_no_adapter(script, tmp_path, rules):
    """What it asks for stands in the log of a server that has been started for it."""
    path, log = tmp_path / "session.jsonl", tmp_path / "sent"
    await record(script, rules, path)
    lines = path.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if '"initialized"' in line)
    added = []
    for number, command in enumerate(("use", "off", "train", "stop", "list")):
        params = {"command": f"midfill.adapter.{command}", "arguments": ["mine"]}
        asked = {
            "jsonrpc": "2.0",
            "id": f"adapter{number}",
            "method": "workspace/executeCommand",
            "params": params,
        }
        answer = {"jsonrpc": "2.0", "id": f"adapter{number}", "result": None}
        added += [
            json.dumps({"t": 0, "from": sender, "message": message})
            for sender, message in (("client", asked), ("server", answer))
        ]
        added.append(json.dumps({"t": 0, "from": "client", "bytes": json.dumps(asked)}))
    lines[first + 1 : first + 1] = added
    path.write_text("\n".join(lines) + "\n")
    replay(path, [*script(*rules), "--record", str(log)], "--speed", "0")
    sent = log.read_text()
    assert '"midfill.adapter.list"' in sent
    assert not [
        one for one in ("use", "off", "train", "stop") if f'"command":"midfill.adapter.{one}"' in sent
    ]


async def test_a_recording_that_cannot_be_written_is_said_at_once(script, tmp_path):
    done = subprocess.run(
        [*forkserver.command("serve", *script()), "--record", str(tmp_path / "no" / "x")],
        capture_output=True,
        text=True,
        input="",
        check=False,
    )
    assert done.returncode == 1
    assert "Cannot write the recording" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
async def test_a_full_disk_ends_the_recording_and_not_the_server(script, tmp_path):
    code = (
        "import midfill.lsp.recording as r, midfill.cli.main as c, sys\n"
        "r._create = lambda path: (path, open('/dev/full', 'w'))\n"
        f"sys.argv = ['midfill', 'serve', '--record', 'x', *{script({'text': '1'})!r}]\n"
        "c.main()\n"
    )
    async with await Raw.start(command=[sys.executable, "-P", "-c", code], cwd=tmp_path) as server:
        await server.initialize()
        await server.loaded()
        await server.serves()
