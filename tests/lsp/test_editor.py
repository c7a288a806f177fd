"""A session as a standard client has it, by pytest-lsp: every message is checked against the types."""

import sys
from pathlib import Path

import pytest_lsp
from lsprotocol import types
from pytest_lsp import ClientServerConfig, LanguageClient, client_capabilities

URI = "file:///work/main.py"


SCRIPT = Path(__file__).with_name("editor_script.json")
COMMAND = [sys.executable, "-P", "-m", "midfill", "serve", "--engine", f"scripted:{SCRIPT}"]


@pytest_lsp.fixture(
    config=ClientServerConfig(server_command=COMMAND), params=["visual_studio_code", "neovim", "emacs"]
)
async def editor(request, lsp_client: LanguageClient):
    # These editors announce that files can be watched for the server, and here is nobody to do so.
    lsp_client.feature(types.CLIENT_REGISTER_CAPABILITY)(lambda _params: None)
    params = types.InitializeParams(capabilities=client_capabilities(request.param), root_uri="file:///work")
    result = await lsp_client.initialize_session(params)
    assert result.server_info.name == "midfill"
    yield
    await lsp_client.shutdown_session()


async def test_a_standard_client_is_served(editor: LanguageClient):
    item = types.TextDocumentItem(uri=URI, language_id="python", version=1, text="print(add(1, ))\n")
    editor.text_document_did_open(types.DidOpenTextDocumentParams(item))
    params = types.InlineCompletionParams(
        text_document=types.TextDocumentIdentifier(URI),
        position=types.Position(0, 13),
        context=types.InlineCompletionContext(types.InlineCompletionTriggerKind.Automatic),
    )
    # Asked before the model has been loaded, the answer may be empty, but it is one.
    while not (ghost := await editor.text_document_inline_completion_async(params)).items:
        pass
    assert ghost.items[0].insert_text == "2"
    popup = await editor.text_document_completion_async(
        types.CompletionParams(types.TextDocumentIdentifier(URI), types.Position(0, 13))
    )
    assert popup.items[0].text_edit.new_text == "2"
