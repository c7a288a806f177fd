"""`midfill/status`: what a status line shows."""

import asyncio
import os

import pytest

from midfill.lsp.client import SERVE_COMMAND, Client

pytestmark = pytest.mark.asyncio(loop_scope="module")

URI = "file:///work/main.py"


async def status(client, state=None):
    """The status; if `state` is given, once it is that."""
    async with asyncio.timeout(60):
        while True:
            found = await client.request("midfill/status", None)
            if state in {None, found["state"]}:
                return found


async def test_a_model_that_is_being_loaded_is_named(client):
    it = await client(load_delay_s=600, options={"model": "qwen2.5-coder-1.5b"})
    found = await status(it)
    assert (found["state"], found["model"]) == ("loading", "qwen2.5-coder-1.5b")
    assert (found["adapter"], found["device"], found["dtype"]) == (None, None, None)
    assert (found["message"], found["tokensPerSecond"]) == (None, None)


async def test_a_loaded_model_tells_where_it_runs_and_how_fast(client):
    it = await client({"text": "a" * 20, "token_delay_s": 0.01}, options={"prefetch": False})
    found = await status(it, "ready")
    assert (found["model"], found["device"], found["dtype"]) == ("scripted", "cpu", "script")
    assert found["attention"] is None
    assert (found["message"], found["tokensPerSecond"], found["enabled"]) == (None, None, True)
    item = {"uri": URI, "languageId": "python", "version": 1, "text": "x = "}
    it.notify("textDocument/didOpen", {"textDocument": item})
    here = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 4}}
    await it.request("textDocument/inlineCompletion", here | {"context": {"triggerKind": 1}})
    # A token takes 10 ms, or longer where the machine is busy.
    assert 0 < (await status(it))["tokensPerSecond"] <= 100


async def test_a_model_that_cannot_be_loaded_says_why(client):
    it = await client(load_error="There is no model here.")
    assert (await status(it, "failed"))["message"] == "There is no model here."


async def test_switched_off_is_told(client):
    it = await client(options={"enabled": False})
    assert (await status(it))["enabled"] is False
    it.notify("workspace/didChangeConfiguration", {"settings": {"enabled": True}})
    assert (await status(it))["enabled"] is True


async def test_a_null_takes_a_setting_back_to_the_users_own(client):
    it = await client(options={"enabled": False, "model": None})
    assert (await status(it))["enabled"] is False
    it.notify("workspace/didChangeConfiguration", {"settings": {"midfill": {"enabled": None}}})
    assert (await status(it))["enabled"] is True
    assert not any(method == "window/showMessage" for method, _ in it.heard)


async def test_a_file_that_gets_nothing_is_told_with_the_reason(client):
    it = await client({"text": "1"}, options={"excluded_files": ["*.env"], "disabled_languages": ["text"]})
    await status(it, "ready")
    texts = {
        "main.py": ("python", "x = ", None),
        "empty.py": ("python", "", None),
        "local.env": ("shellscript", "A=1\n", "file-excluded"),
        "notes.txt": ("text", "a\n", "language-off"),
    }
    for name, (language, text, reason) in texts.items():
        uri = f"file:///work/{name}"
        item = {"uri": uri, "languageId": language, "version": 1, "text": text}
        it.notify("textDocument/didOpen", {"textDocument": item})
        found = (await it.request("midfill/status", {"textDocument": {"uri": uri}}))["file"]
        assert (found and found["reason"]) == reason
        assert reason is None or found["message"]
    for params in (
        {},
        {"textDocument": None},
        {"textDocument": {"uri": 7}},
        [],
        {"textDocument": {"uri": "x"}},
    ):
        assert (await it.request("midfill/status", params))["file"] is None


async def test_a_model_that_was_not_downloaded_is_told_from_one_that_fails(client, tmp_path):
    it = await client(load_error="There is no model here.")
    assert (await status(it, "failed"))["modelMissing"] is False
    it = await Client.start(SERVE_COMMAND, env=os.environ | {"MIDFILL_CACHE": str(tmp_path / "empty")})
    try:
        await it.initialize()
        assert (await status(it, "failed"))["modelMissing"] is True
    finally:
        await it.close()
