"""`lsp/protocol.py` uses private and undocumented names of pygls: a release may change each of them."""

import ast
import inspect
from importlib.metadata import version
from pathlib import Path

import cattrs
import pytest
from lsprotocol import types
from pygls.feature_manager import FeatureManager
from pygls.lsp.server import LanguageServer
from pygls.protocol import LanguageServerProtocol

import midfill.lsp.protocol
from midfill.lsp.server import MidfillServer
from midfill.settings import Settings

# Name > (parameters without `self`, what `lsp/protocol.py` needs it for).
METHODS = {
    "_execute_handler": (
        "msg_id, handler, callback, args=None, kwargs=None",
        "to run pygls' own handlers, which are generators",
    ),
    "_send_data": ("data", "to send whatever pygls sends by our own writer"),
    "_serialize_message": ("data", "to turn lsprotocol's types into JSON"),
    "set_writer": ("writer, include_headers=True", "to send by a writer of ours"),
    "lsp_initialize": ("params", "to correct the capabilities that pygls announces"),
    "lsp_shutdown": ("*args", "to cancel the requests that run"),
}
# Name > (type, what `lsp/protocol.py` needs it for).
ATTRIBUTES = {
    "_converter": (cattrs.Converter, "to read params as lsprotocol's types"),
    "_request_futures": (dict, "to find the request that a response of the client answers"),
    "_result_types": (dict, "to forget the type of a response, which is read as it came"),
    "_shutdown": (bool, "to refuse requests after `shutdown`"),
    "fm": (FeatureManager, "to find the handler of a method"),
    "writer": (type(None), "to know that nothing can be sent yet"),
}
REGISTRY = ("builtin_features", "features", "feature_options")


def parameters(function):
    """Parameters without `self`, types and where positional ones end: "a, b=None, *c"."""
    _, *own = inspect.signature(function).parameters.values()
    return ", ".join(str(one.replace(annotation=inspect.Parameter.empty)) for one in own)


def problems(protocol):
    """What is not as `lsp/protocol.py` needs it in a class of pygls, a sentence each."""
    where = f"pygls {version('pygls')}: {protocol.__name__}"
    found = []
    for name, (wanted, why) in METHODS.items():
        method = getattr(protocol, name, None)
        if not inspect.isfunction(method):
            found.append(f"{where} has no method `{name}`, which lsp/protocol.py needs {why}.")
        elif (now := parameters(method)) != wanted:
            found.append(
                f"{where}.{name} takes ({now}) and no longer ({wanted}); lsp/protocol.py needs it {why}."
            )
    made = LanguageServer("test", "1", protocol_cls=protocol).protocol
    for name, (kind, why) in ATTRIBUTES.items():
        if not hasattr(made, name):
            found.append(f"{where} has no attribute `{name}`, which lsp/protocol.py needs {why}.")
        elif not isinstance(value := getattr(made, name), kind):
            found.append(
                f"{where}.{name} is a {type(value).__name__} and no longer a {kind.__name__}; "
                f"lsp/protocol.py needs it {why}."
            )
    registry = getattr(made, "fm", None)
    found += [
        f"{where}.fm has no dictionary `{name}`, in which lsp/protocol.py looks for handlers and options."
        for name in REGISTRY
        if not isinstance(getattr(registry, name, None), dict)
    ]
    if not inspect.isgeneratorfunction(getattr(protocol, "lsp_initialize", None)):
        found.append(
            f"{where}.lsp_initialize is no generator, and lsp/protocol.py delegates to it as to one."
        )
    return found


def test_pygls_has_every_private_name_as_it_is_used():
    if found := problems(LanguageServerProtocol):
        pytest.fail("\n".join(found), pytrace=False)


def test_a_changed_name_is_named():
    class Changed(LanguageServerProtocol):
        set_writer = None

        def __init__(self, server, converter):
            super().__init__(server, converter)
            del self._request_futures
            self._shutdown = None

        def _execute_handler(self, msg_id, handler):
            pass

    [signature, method, attribute, kind] = problems(Changed)
    assert "Changed._execute_handler takes (msg_id, handler) and no longer (msg_id, " in signature
    assert "has no method `set_writer`, which lsp/protocol.py needs to send by a writer of ours." in method
    assert "has no attribute `_request_futures`" in attribute
    assert "Changed._shutdown is a NoneType and no longer a bool" in kind


def test_the_lists_above_have_every_name_that_is_used():
    tree = ast.parse(Path(midfill.lsp.protocol.__file__).read_text(encoding="utf-8"))
    [own] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Protocol"]
    nodes = list(ast.walk(own))
    on_self = [
        node for node in nodes if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self"
    ]
    on_super = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value) == "super()"
    }
    methods = {node.name for node in own.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assigned = {node.attr for node in on_self if isinstance(node.ctx, ast.Store)}
    overridden = {name for name in methods | assigned if hasattr(LanguageServerProtocol, name)}
    used = {node.attr for node in on_self} - methods - assigned | overridden | on_super
    # `_shutdown` is pygls' own, and assigned here, too.
    assert (used | {"_shutdown"}) - {"__init__"} == set(METHODS) | set(ATTRIBUTES)


class Frames(list):
    """A writer that keeps what it gets."""

    def write(self, data):
        self.append(data)


def test_whatever_pygls_sends_goes_through_our_writer_and_its_response_comes_back():
    server = MidfillServer(Settings(), None)
    sent = Frames()
    server.protocol.set_writer(sent)
    server.window_log_message(types.LogMessageParams(types.MessageType.Info, "a log"))
    future = server.window_show_document(types.ShowDocumentParams("file:///a"))
    assert b"a log" in sent[0]
    assert b'"window/showDocument"' in sent[1]
    (id_,) = server.protocol._request_futures
    server.protocol.receive(b'{"jsonrpc": "2.0", "id": "%b", "result": {"success": true}}' % id_.encode())
    assert future.result(timeout=0) == {"success": True}
    assert server.protocol._request_futures == server.protocol._result_types == {}


def test_methods_that_pygls_handles_itself_and_that_we_replace_are_its_own():
    """A renamed one would stay in pygls' registry and be called instead of ours."""
    builtin = set(LanguageServer("test", "1").protocol.fm.builtin_features)
    missing = set(midfill.lsp.protocol._REPLACED_BUILTINS) - builtin
    assert not missing, (
        f"pygls {version('pygls')} no longer handles {missing}: drop them from lsp/protocol.py"
    )
