"""Learning an adapter for an editor: asked first, shown as progress, cancelled with a checkpoint."""

import asyncio
import json

import pytest
import raw
import tiny
from planted_history import Planted, grow

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]


@pytest.fixture
def start(scripted, tmp_path, monkeypatch):
    """A server in a workspace with a history, with a tiny model to learn for."""
    # The process imports torch before it has more to say.
    monkeypatch.setattr(raw, "TIMEOUT_S", 90)
    monkeypatch.setenv("MIDFILL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MIDFILL_STATE", str(tmp_path / "state"))
    tiny.write_model("gpt_bigcode", tmp_path / "model")
    project = Planted.new(tmp_path / "project")

    async def start(commits=12):
        grow(project, commits)
        settings = {"family": "stable-code", "prefix_tokens": 64, "suffix_tokens": 32}
        server = await scripted(arguments=["--model", str(tmp_path / "model")], initialize=False)
        await server.initialize(
            rootUri=project.root.as_uri(),
            capabilities={"window": {"workDoneProgress": True}},
            initializationOptions=settings,
        )
        return server

    return start


def train(server, **options):
    params = {"command": "midfill.adapter.train", "arguments": [options]}
    server.request("train", "workspace/executeCommand", params)


def is_question(message):
    return message.get("method") == "window/showMessageRequest"


async def until(server, wanted, answers=(), *, answer=True):
    """Answer what the server asks for, questions by these, until a message is the wanted one."""
    answers = list(answers)
    async with asyncio.timeout(120):
        while True:
            message = await server.receive()
            method = message.get("method")
            if is_question(message) and answer:
                reply = {"title": answers.pop(0)} if answers else None
                server.send({"jsonrpc": "2.0", "id": message["id"], "result": reply})
            elif method in {"window/workDoneProgress/create", "client/registerCapability"}:
                server.send({"jsonrpc": "2.0", "id": message["id"], "result": None})
            if wanted(message):
                return message


def progress(message, kind):
    """What a message tells of the training, if it is of that kind."""
    value = message.get("params", {}).get("value", {}) if message.get("method") == "$/progress" else {}
    return value if value.get("kind") == kind else None


def workers(server):
    found = raw.descendants(server.pid)
    return [process for process, line in found.items() if "midfill.training.worker" in line]


def shown(message):
    return message["params"]["message"] if message.get("method") == "window/showMessage" else ""


@pytest.mark.slow
async def test_a_training_is_shown_and_cancelled_with_a_checkpoint(start, tmp_path):
    server = await start()
    train(server, name="mine", minutes=30)
    begun = await until(
        server, lambda m: (b := progress(m, "begin")) and b["title"] == "midfill: adapter mine", ["Train"]
    )
    token = begun["params"]["token"]
    assert begun["params"]["value"]["cancellable"]
    shares = []

    def learnt(message):
        if message.get("params", {}).get("token") == token and (report := progress(message, "report")):
            shares.append(report["percentage"])
            return report["message"].startswith("train: step 2 ")
        return False

    await until(server, learnt)
    assert shares == sorted(shares)
    train(server)
    refused = await until(server, lambda m: m.get("id") == "train")
    assert "already being trained" in refused["result"]["error"]
    server.notify("window/workDoneProgress/cancel", {"token": token})
    ended = await until(server, lambda m: m.get("params", {}).get("token") == token and progress(m, "end"))
    assert ended["params"]["value"]["message"] == "stopped"
    said = await until(server, shown)
    assert "a checkpoint is in" in shown(said)
    state = json.loads((tmp_path / "data" / "training" / "mine" / "checkpoint" / "state.json").read_text())
    assert state["step"] >= 2
    # The next time the user may go on there. It ends with its server.
    train(server, name="mine")
    asked = await until(server, is_question, answer=False)
    titles = [action["title"] for action in asked["params"]["actions"]]
    assert titles == ["Train", "Resume from the checkpoint", "Do not train"]
    server.send({"jsonrpc": "2.0", "id": asked["id"], "result": {"title": titles[1]}})
    await until(server, lambda m: progress(m, "report"))
    [worker] = workers(server)
    server.process.stdin.close()
    await asyncio.to_thread(worker.wait, 60)


@pytest.mark.parametrize("answer", ["Do not train", None])
async def test_nothing_is_learnt_unless_the_user_agrees(start, tmp_path, answer):
    """A file of a workspace can make some editors send a command; it cannot answer for the user."""
    server = await start()
    train(server)
    await until(server, is_question, [answer] if answer else [])
    # The next command is taken, so the one before has come to its end.
    name = None
    while name is None:
        train(server)
        name = (await until(server, lambda m: m.get("id") == "train"))["result"]["name"]
    assert name == "project"
    assert not workers(server)
    assert not (tmp_path / "data" / "training").exists()


async def test_what_cannot_be_learnt_is_said(start):
    server = await start(commits=1)
    train(server)
    said = await until(server, lambda m: "has 1 commits" in shown(m), ["Train"])
    assert said["params"]["type"] == 1


@pytest.mark.parametrize("options", [{"name": "../x"}, {"minutes": 0}, {"minutes": "long"}, {"name": 3}])
async def test_odd_arguments_are_refused(start, options):
    server = await start(commits=1)
    train(server, **options)
    answer = await until(server, lambda m: m.get("id") == "train")
    assert "error" in answer or "not a valid adapter name" in answer["result"]["error"]
