"""What is announced is served, and what is served is announced."""

import pytest
from raw import Raw

from midfill.lsp.handlers.execute_command import COMMANDS
from midfill.lsp.known_clients import KNOWN_CLIENTS
from midfill.lsp.messages import TEST_HOOKS
from midfill.lsp.routes import TEST_ROUTES

pytestmark = pytest.mark.asyncio(loop_scope="module")

URI = "file:///work/main.py"
HERE = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 0}}
RANGE = {"start": {"line": 0, "character": 0}, "end": {"line": 0, "character": 0}}

# Every request that a client may send for a server capability, and params that are good for it.
REQUESTS = {
    "completionProvider": ("textDocument/completion", HERE),
    "inlineCompletionProvider": ("textDocument/inlineCompletion", HERE | {"context": {"triggerKind": 1}}),
    "hoverProvider": ("textDocument/hover", HERE),
    "signatureHelpProvider": ("textDocument/signatureHelp", HERE),
    "declarationProvider": ("textDocument/declaration", HERE),
    "definitionProvider": ("textDocument/definition", HERE),
    "typeDefinitionProvider": ("textDocument/typeDefinition", HERE),
    "implementationProvider": ("textDocument/implementation", HERE),
    "referencesProvider": ("textDocument/references", HERE | {"context": {"includeDeclaration": True}}),
    "documentHighlightProvider": ("textDocument/documentHighlight", HERE),
    "documentSymbolProvider": ("textDocument/documentSymbol", HERE),
    "codeActionProvider": (
        "textDocument/codeAction",
        HERE | {"range": RANGE, "context": {"diagnostics": []}},
    ),
    "codeLensProvider": ("textDocument/codeLens", HERE),
    "documentLinkProvider": ("textDocument/documentLink", HERE),
    "colorProvider": ("textDocument/documentColor", HERE),
    "documentFormattingProvider": ("textDocument/formatting", HERE | {"options": {}}),
    "documentRangeFormattingProvider": (
        "textDocument/rangeFormatting",
        HERE | {"range": RANGE, "options": {}},
    ),
    "documentOnTypeFormattingProvider": ("textDocument/onTypeFormatting", HERE | {"ch": "a", "options": {}}),
    "renameProvider": ("textDocument/rename", HERE | {"newName": "x"}),
    "foldingRangeProvider": ("textDocument/foldingRange", HERE),
    "executeCommandProvider": ("workspace/executeCommand", {"command": "midfill.accepted"}),
    "selectionRangeProvider": ("textDocument/selectionRange", HERE | {"positions": []}),
    "linkedEditingRangeProvider": ("textDocument/linkedEditingRange", HERE),
    "callHierarchyProvider": ("textDocument/prepareCallHierarchy", HERE),
    "semanticTokensProvider": ("textDocument/semanticTokens/full", HERE),
    "monikerProvider": ("textDocument/moniker", HERE),
    "typeHierarchyProvider": ("textDocument/prepareTypeHierarchy", HERE),
    "inlineValueProvider": ("textDocument/inlineValue", HERE | {"range": RANGE, "context": {}}),
    "inlayHintProvider": ("textDocument/inlayHint", HERE | {"range": RANGE}),
    "diagnosticProvider": ("textDocument/diagnostic", HERE),
    "workspaceSymbolProvider": ("workspace/symbol", {"query": ""}),
}
# Announced without a request of their own; the tests named behind them show that they work.
NOTIFIED = {
    "positionEncoding",  # test_the_position_encoding_is_negotiated
    "textDocumentSync",  # test_documents_sync.py
    "notebookDocumentSync",  # test_notebooks_sync.py
    "workspace",  # test_folders_come_and_go
}
EVERYTHING = {
    "textDocument": {
        "inlineCompletion": {},
        "completion": {},
        "synchronization": {"willSave": True, "willSaveWaitUntil": True},
    },
    "notebookDocument": {"synchronization": {}},
    "workspace": {
        "workspaceFolders": True,
        "executeCommand": {},
        "fileOperations": {"willCreate": True, "didCreate": True, "willRename": True, "didDelete": True},
    },
}


@pytest.mark.parametrize(
    "capabilities", [{}, EVERYTHING], ids=["a plain client", "a client that can do everything"]
)
async def test_announced_is_served_and_served_is_announced(scripted, capabilities):
    server = await scripted(initialize=False)
    announced = (await server.initialize(capabilities=capabilities))["capabilities"]
    served = set()
    for name, (method, params) in REQUESTS.items():
        server.request(name, method, params)
        answer = await server.answer(name)
        if "result" in answer:
            served.add(name)
        else:
            assert answer["error"]["code"] == -32601
    assert served == set(announced) - NOTIFIED
    assert served == {"completionProvider", "inlineCompletionProvider", "executeCommandProvider"}


async def test_what_is_announced_in_detail(scripted):
    server = await scripted(initialize=False)
    announced = (await server.initialize(capabilities=EVERYTHING))["capabilities"]
    # 2 is Incremental. Saving is of no interest.
    assert announced["textDocumentSync"] == {
        "openClose": True,
        "change": 2,
        "save": {"includeText": False},
        "willSave": False,
        "willSaveWaitUntil": False,
    }
    assert announced["notebookDocumentSync"] == {"notebookSelector": [{"notebook": "*"}]}
    # Editors share one server between folders only if it says this: one model in memory, not several.
    assert announced["workspace"] == {"workspaceFolders": {"supported": True, "changeNotifications": True}}
    adapters = [f"midfill.adapter.{name}" for name in ("list", "use", "off", "train", "stop")]
    assert announced["executeCommandProvider"] == {
        "commands": ["midfill.accepted", "midfill.explain", *adapters]
    }
    # No item has more to tell when it is asked again.
    assert announced["completionProvider"] == {"resolveProvider": False}


async def test_helix_is_told_of_the_commands_that_a_person_can_use_in_it(scripted):
    server = await scripted(initialize=False)
    info = {"name": "helix", "version": "25.07.1 (a05c151b)"}
    announced = (await server.initialize(capabilities=EVERYTHING, clientInfo=info))["capabilities"]
    adapters = [f"midfill.adapter.{name}" for name in ("off", "train", "stop")]
    assert announced["executeCommandProvider"] == {"commands": ["midfill.explain", *adapters]}


async def test_every_command_of_the_table_of_clients_exists():
    named = {name for row in KNOWN_CLIENTS for name in row.commands or ()}
    assert named <= set(COMMANDS)
    assert named


@pytest.mark.parametrize("method", [route.method for route in TEST_ROUTES])
async def test_hooks_for_tests_exist_only_when_asked_for(script, method):
    params = {"textDocument": {"uri": "file:///a.py"}}
    async with await Raw.start(*script(), env={TEST_HOOKS: ""}) as server:
        await server.initialize()
        server.request(1, method, params)
        assert (await server.answer(1))["error"]["code"] == -32601
    async with await Raw.start(*script(), env={TEST_HOOKS: "1"}) as server:
        await server.initialize()
        server.request(1, method, params)
        assert (await server.answer(1)).get("error", {}).get("code") != -32601
