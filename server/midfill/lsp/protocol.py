"""JSON-RPC and the LSP life cycle over stdio: pygls' protocol, with its faults corrected.

The only module that uses private names of pygls: `tests/unit/test_pygls.py` lists them and fails when a
release of pygls changes one. pygls gives the registry of features, the server capabilities and lsprotocol's
types. The faults that are corrected here, each with a test (params of documents and cursors: `messages`):

- its reader wants exact header spelling, waits for bodies that never come and dies of bad ones;
  bad messages get no answer or a pop-up; errors carry tracebacks; one table holds the requests of
  both directions (`test_protocol.py`);
- requests before `initialize` and after `shutdown` are not refused, a second `initialize` is served;
  a closed output is noticed at the next answer only (`test_lifecycle.py`);
- one bad client capability refuses the whole `initialize` (`test_protocol.py`);
- messages are logged with their text, by itself and by asyncio (`test_security.py`);
- a coroutine handler starts after later messages were handled, so it would see a newer document
  (`test_server.py`); it keeps a second copy of every document (`test_load.py`);
- writing to a client that does not read blocks the event loop (`test_load.py`);
- it announces commands and file operations that it does not serve (`test_capabilities.py`).

Runs on the event loop, with one thread that reads and one that writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import select
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pygls.lsp.server import LanguageServer
from pygls.protocol import LanguageServerProtocol, lsp_method

from midfill.completion.stats.request_log import REQUEST
from midfill.lsp.framing import FrameReader, FrameWriter, to_frame
from midfill.lsp.known_clients import find
from midfill.lsp.messages import MalformedError, ResponseError
from midfill.system.log_stream import read_some

_LOG = logging.getLogger(__name__)

# Takes the params of one method, raw JSON, and returns what its handler takes.
Reader = Callable[[Any], Any]
# Gets the body of every message and its sender, "client" or "server".
Tap = Callable[[str, bytes], None]

_READ_BYTES = 1 << 18
# pygls would keep a second copy of every document, and runs commands of its own registry only.
_REPLACED_BUILTINS = (
    types.TEXT_DOCUMENT_DID_OPEN,
    types.TEXT_DOCUMENT_DID_CHANGE,
    types.TEXT_DOCUMENT_DID_CLOSE,
    types.NOTEBOOK_DOCUMENT_DID_OPEN,
    types.NOTEBOOK_DOCUMENT_DID_CHANGE,
    types.NOTEBOOK_DOCUMENT_DID_CLOSE,
    types.WORKSPACE_EXECUTE_COMMAND,
)
_CLOSE_S = 2.0


class Protocol(LanguageServerProtocol):
    """pygls' protocol with its faults corrected (see the module).

    Args:
        server, converter: as pygls passes them.
        readers: the reader of a method's params; a method without one gets lsprotocol's type.
        tap: gets every message that is received or sent.
    """

    def __init__(
        self,
        server: LanguageServer,
        converter: Any,
        *,
        readers: Mapping[str, Reader],
        tap: Tap | None = None,
    ) -> None:
        super().__init__(server, converter)
        self._readers = readers
        self._tap = tap
        self._initialized = False
        # The client's requests that are running. pygls keeps them in one table with the server's own
        # requests, whose ids it makes up: a response could then be taken for a request.
        self._running: dict[Any, asyncio.Task[Any]] = {}
        self._exit: asyncio.Future[int] | None = None
        for method in _REPLACED_BUILTINS:
            self.fm.builtin_features.pop(method, None)
        # pygls logs whole messages, which hold source text.
        logging.getLogger("pygls").setLevel(logging.CRITICAL + 1)

    # Receiving

    def receive(self, body: bytes) -> None:
        """Handle one message body: every request gets exactly one response, now or later."""
        if self._tap is not None:
            self._tap("client", body)
        try:
            message = json.loads(body.decode("utf-8"))
        except (UnicodeDecodeError, ValueError, RecursionError):
            error = ResponseError(types.ErrorCodes.ParseError, "The message is not JSON in UTF-8.")
            self._send_error(None, error)
            return
        if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
            self._send_error(None, _invalid('Not JSON-RPC 2.0: `"jsonrpc": "2.0"` is missing.'))
            return
        method = message.get("method")
        id_ = message.get("id")
        if isinstance(id_, (dict, list, bool)) or not isinstance(method, (str, type(None))):
            self._send_error(None, _invalid("`id` must be a number or a string, `method` a string."))
        elif method is None:
            self._receive_response(message)
        elif "id" in message:
            self._receive_request(id_, method, message.get("params"))
        else:
            self._receive_notification(method, message.get("params"))

    def _receive_request(self, id_: Any, method: str, params: Any) -> None:
        try:
            self._check_life_cycle(method)
            handler = self._find_handler(method)
            argument = self._read_params(method, params)
        except ResponseError as error:
            self._send_error(id_, error)
            return
        if method == types.INITIALIZE:
            self._initialized = True
        self._call(id_, handler, argument)

    def _receive_notification(self, method: str, params: Any) -> None:
        if method == types.EXIT:
            self.stop(0 if self._shutdown else 1)
            return
        if not self._initialized or self._shutdown:
            return
        if method == types.CANCEL_REQUEST:
            id_ = params.get("id") if isinstance(params, dict) else None
            if isinstance(id_, (str, int, float)) and (task := self._running.get(id_)) is not None:
                task.cancel()
            return
        try:
            handler = self._find_handler(method)
            argument = self._read_params(method, params)
        except ResponseError as error:
            if error.code != types.ErrorCodes.MethodNotFound:
                _LOG.warning("dropped a %s notification: %s", method, error.message)
            return
        self._call(None, handler, argument, is_request=False)

    def _receive_response(self, message: dict[str, Any]) -> None:
        id_: Any = message.get("id")
        future = self._request_futures.pop(id_, None)
        self._result_types.pop(id_, None)
        if future is None or future.done():
            return
        if "error" in message:
            error = message["error"] if isinstance(message["error"], dict) else {}
            future.set_exception(JsonRpcException(message=str(error.get("message", ""))[:200]))
        else:
            future.set_result(message.get("result"))

    def _check_life_cycle(self, method: str) -> None:
        if self._shutdown:
            raise _invalid("The server is shutting down and accepts no more requests.")
        if method == types.INITIALIZE:
            if self._initialized:
                raise _invalid("The server is already initialized.")
        elif not self._initialized:
            raise ResponseError(types.ErrorCodes.ServerNotInitialized, "Send `initialize` first.")

    def _find_handler(self, method: str) -> Callable[..., Any]:
        builtin: dict[str, Callable[..., Any]] = self.fm.builtin_features
        own: dict[str, Callable[..., Any]] = self.fm.features
        handler = builtin.get(method) or own.get(method)
        if handler is None:
            raise ResponseError(types.ErrorCodes.MethodNotFound, f"Unknown method {method[:80]!r}.")
        return handler

    def _read_params(self, method: str, params: Any) -> Any:
        """Return raw params as the method's handler takes them: our own values, or lsprotocol's types."""
        if (reader := self._readers.get(method)) is not None:
            try:
                return reader(params)
            except MalformedError as error:
                raise _malformed(method, error) from None
        known = types.METHOD_TO_TYPES.get(method)
        if known is None:
            return params
        if known[2] is None:
            return None
        if method == types.INITIALIZE:
            return self._read_initialize_params(params)
        if method == types.INITIALIZED:
            return types.InitializedParams()
        try:
            return self._converter.structure(params, cast("type[Any]", known[2]))
        except Exception:
            raise _malformed(method) from None

    def _read_initialize_params(self, params: Any) -> types.InitializeParams:
        """Read like `_read_params`, but drop a malformed capability instead of refusing the editor."""
        if not isinstance(params, dict) or not isinstance(params.get("capabilities", {}), dict):
            raise _malformed(types.INITIALIZE)
        options = params.get("initializationOptions")
        others = {key: value for key, value in params.items() if key != "initializationOptions"}
        others.setdefault("capabilities", {})
        result = self._try_initialize(others)
        if result is None:
            good: dict[str, Any] = {"capabilities": {}}
            for section, value in others["capabilities"].items():
                if self._try_initialize({"capabilities": {section: value}}) is not None:
                    good["capabilities"][section] = value
            for key, value in others.items():
                if self._try_initialize({"capabilities": {}, key: value}) is not None:
                    good[key] = value if key != "capabilities" else good["capabilities"]
            result = self._try_initialize(good) or types.InitializeParams(types.ClientCapabilities())
        result.initialization_options = options
        return result

    def _try_initialize(self, params: dict[str, Any]) -> types.InitializeParams | None:
        try:
            structured = self._converter.structure(
                {"processId": None, "rootUri": None} | params, types.InitializeParams
            )
        except Exception:
            return None
        return structured

    # Answering

    def _call(self, id_: Any, handler: Callable[..., Any], argument: Any, *, is_request: bool = True) -> None:
        """Run a handler up to its first `await` at once, so that it sees the documents of this moment."""
        done = partial(self._finish, id_, is_request=is_request)
        REQUEST.set(id_)
        if inspect.isgeneratorfunction(handler):
            self._execute_handler(id_, handler, done, args=(argument,))
            return
        try:
            result = handler(argument)
        except Exception as error:
            self._fail(id_, error, is_request=is_request)
            return
        if not inspect.isawaitable(result):
            if is_request:
                self._send_result(id_, result)
            return
        task = asyncio.ensure_future(result)
        if is_request:
            self._running[id_] = task
        task.add_done_callback(done)

    def _finish(self, id_: Any, future: Any, *, is_request: bool) -> None:
        if is_request and self._running.get(id_) is future:
            del self._running[id_]
        if future.cancelled():
            if is_request:
                cancelled = ResponseError(types.LSPErrorCodes.RequestCancelled, "The request was cancelled.")
                self._send_error(id_, cancelled)
        elif (error := future.exception()) is not None:
            self._fail(id_, error, is_request=is_request)
        elif is_request:
            self._send_result(id_, future.result())

    def _fail(self, id_: Any, error: BaseException, *, is_request: bool) -> None:
        if isinstance(error, ResponseError):
            response = error
        else:
            _LOG.error("a request handler failed: %s", _kind_and_location(error))
            why = f"Internal error ({type(error).__name__}). The server's log says where."
            response = ResponseError(types.ErrorCodes.InternalError, why)
        if is_request:
            self._send_error(id_, response)

    def _send_result(self, id_: Any, result: Any) -> None:
        self._send_data({"jsonrpc": "2.0", "id": id_, "result": result})

    def _send_error(self, id_: Any, error: ResponseError) -> None:
        response = {"code": error.code, "message": error.message}
        self._send_data({"jsonrpc": "2.0", "id": id_, "error": response})

    def _send_data(self, data: Any) -> None:
        if self.writer is None:
            return
        body = json.dumps(data, default=self._serialize_message, separators=(",", ":")).encode("ascii")
        if self._tap is not None:
            self._tap("server", body)
        self.writer.write(to_frame(body))

    # Builtin features of pygls that stay

    @lsp_method(types.INITIALIZE)
    def lsp_initialize(self, params: types.InitializeParams) -> Any:
        """Initialize as pygls does, but announce our commands, for this client, and no file operations."""
        result = yield from super().lsp_initialize(params)
        own: types.ExecuteCommandOptions | None = self.fm.feature_options.get(types.WORKSPACE_EXECUTE_COMMAND)
        usable = find(params.client_info).commands
        if own is not None and usable is not None:
            own = types.ExecuteCommandOptions([name for name in own.commands if name in usable])
        result.capabilities.execute_command_provider = own
        if result.capabilities.workspace is not None:
            result.capabilities.workspace.file_operations = None
        return result

    @lsp_method(types.SHUTDOWN)
    def lsp_shutdown(self, *_: Any) -> None:  # type: ignore[override] # a generator there
        """Refuse every later request and cancel the running ones."""
        self._shutdown = True
        for task in list(self._running.values()):
            task.cancel()

    # Running

    def stop(self, status: int) -> None:
        """End `serve` with this exit status; the first call wins. Call on the event loop."""
        if self._exit is not None and not self._exit.done():
            self._exit.set_result(status)

    async def serve(self, stdin: int, stdout: int) -> int:
        """Serve file descriptors until `exit`, end of input, a broken output, SIGTERM or `stop`.

        Returns the exit status.
        """
        loop = asyncio.get_running_loop()
        self._exit = loop.create_future()
        # asyncio's own handler logs the arguments of a callback that failed: a whole message.
        loop.set_exception_handler(_log_failure)

        def stop_soon() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                loop.call_soon_threadsafe(self.stop, 1)

        writer = FrameWriter(stdout, stop_soon)
        self.set_writer(writer)
        if sys.platform != "win32":
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop, 1)
            self._watch_output(loop, stdout)
        threading.Thread(
            target=_read, args=(stdin, loop, self.receive, stop_soon), name="midfill-reader", daemon=True
        ).start()
        try:
            return await self._exit
        finally:
            with contextlib.suppress(OSError, NotImplementedError):
                loop.remove_reader(stdout)
            running = list(self._running.values())
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running, timeout=_CLOSE_S)
                # One turn of the loop, in which they are answered.
                await asyncio.sleep(0)
            await asyncio.to_thread(writer.close)

    def _watch_output(self, loop: asyncio.AbstractEventLoop, stdout: int) -> None:
        """Stop when the other end of the output is closed, even while there is nothing to write."""
        poll = select.poll()
        poll.register(stdout, 0)

        def woken() -> None:
            # A socket also wakes us for incoming data, or when only its other half is closed.
            loop.remove_reader(stdout)
            if poll.poll(0):
                self.stop(1)

        with contextlib.suppress(OSError):  # a regular file cannot be watched, and has no other end
            loop.add_reader(stdout, woken)


def _invalid(message: str) -> ResponseError:
    return ResponseError(types.ErrorCodes.InvalidRequest, message)


def _malformed(method: str, error: MalformedError | None = None) -> ResponseError:
    detail = f" ({error})" if error is not None else ""
    message = f"The params of {method} are missing or malformed{detail}."
    return ResponseError(types.ErrorCodes.InvalidParams, message)


def _read(
    descriptor: int,
    loop: asyncio.AbstractEventLoop,
    receive: Callable[[bytes], None],
    on_end: Callable[[], None],
) -> None:
    """Run the reader thread: bytes to frames, frames to the event loop."""
    frames = FrameReader()
    with contextlib.suppress(OSError, RuntimeError):  # closed under us; the loop has ended
        while data := read_some(descriptor, _READ_BYTES):
            for body in frames.feed(data):
                # Garbage gets the same answer as an empty body: neither is JSON.
                loop.call_soon_threadsafe(receive, body or b"")
    on_end()


def _log_failure(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log a failure in the background by kind and location only."""
    error = context.get("exception")
    _LOG.error("%s", _kind_and_location(error) if error is not None else context.get("message", "?"))


def _kind_and_location(error: BaseException) -> str:
    """Return an exception's type and where it was raised. Its message may quote the document."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    location = f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}" if trace else "?"
    return f"{type(error).__name__} in {location}"
