"""The wire: frames over stdio, JSON-RPC's rules and the LSP life cycle, kept where pygls breaks them.

pygls gives the registry of features, the capabilities and lsprotocol's types. What it gets wrong is
mended here and nowhere else (params of documents and cursors: in `messages`), each with a test:

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
- it announces commands and file operations that nobody serves (`test_capabilities.py`).

Runs on the event loop, with one thread that reads and one that writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import os
import queue
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import psutil
from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pygls.lsp.server import LanguageServer
from pygls.protocol import LanguageServerProtocol, lsp_method

from midfill.completion.stats.request_log import REQUEST
from midfill.lsp.messages import READERS, MalformedError
from midfill.system.log_stream import read_some, write_all

_LOG = logging.getLogger(__name__)

# Nothing an editor sends is larger; a length beyond it is garbage, not a message.
_MAX_BODY_BYTES = 1 << 30
_MAX_HEADER_BYTES = 1 << 16
_READ_BYTES = 1 << 18
_CONTENT_LENGTH = re.compile(rb"content-length[ \t]*:[ \t]*(\d{1,20})[ \t]*\Z", re.IGNORECASE)
# pygls would keep a second copy of every document, and serves commands of its own registry only.
_NOT_BUILTIN = (
    types.TEXT_DOCUMENT_DID_OPEN,
    types.TEXT_DOCUMENT_DID_CHANGE,
    types.TEXT_DOCUMENT_DID_CLOSE,
    types.NOTEBOOK_DOCUMENT_DID_OPEN,
    types.NOTEBOOK_DOCUMENT_DID_CHANGE,
    types.NOTEBOOK_DOCUMENT_DID_CLOSE,
    types.WORKSPACE_EXECUTE_COMMAND,
)
_PARENT_CHECK_S = 5.0
_CLOSE_S = 2.0


class FrameReader:
    """Cuts a byte stream into message bodies. Pure; survives anything.

    Garbage is skipped up to the next header that makes sense, and reported once.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._length: int | None = None
        self._in_body = False
        self._in_garbage = False

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """Take bytes; yield each body that is complete, and None where garbage began."""
        self._buffer += data
        while True:
            if self._in_body:
                length = self._length or 0
                if len(self._buffer) < length:
                    return
                body = bytes(self._buffer[:length])
                del self._buffer[:length]
                self._in_body, self._length = False, None
                yield body
                continue
            end = self._buffer.find(b"\n")
            if end < 0:
                if len(self._buffer) > _MAX_HEADER_BYTES:
                    # The tail may hold the beginning of a real header.
                    del self._buffer[: -_MAX_HEADER_BYTES // 2]
                    yield from self._garbage()
                return
            line = bytes(self._buffer[:end]).rstrip(b"\r")
            del self._buffer[: end + 1]
            yield from self._header(line)

    def _header(self, line: bytes) -> Iterator[None]:
        # A header may follow garbage that had no line end of its own, so it is looked for at the end.
        if match := _CONTENT_LENGTH.search(line[-_MAX_HEADER_BYTES:]):
            length = int(match[1])
            if length > _MAX_BODY_BYTES:
                self._length = None
                yield from self._garbage()
            else:
                self._length = length
                self._in_garbage = False
        elif not line:
            self._in_body = self._length is not None
        elif not re.match(rb"[!-9;-~]+[ \t]*:", line):
            yield from self._garbage()

    def _garbage(self) -> Iterator[None]:
        if not self._in_garbage:
            self._in_garbage = True
            yield None


class Writer:
    """Writes frames from a thread of its own, so that a client that does not read stops nobody."""

    def __init__(self, descriptor: int, on_broken: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._on_broken = on_broken
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="midfill-writer", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Queue one frame."""
        self._queue.put(data)

    def close(self) -> None:
        """Let what is queued go out, for a short while at most."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            try:
                write_all(self._descriptor, data)
            except OSError:
                self._on_broken()
                return


class Refusal(Exception):  # noqa: N818 - it is an answer, not a fault
    """An error response. The message is a sentence without paths, text or traceback."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = int(code)
        self.message = message


class Protocol(LanguageServerProtocol):
    """pygls' protocol with its faults mended; see the module.

    Attributes:
        tap: is given every body with its sender, "client" or "server".
    """

    def __init__(self, server: LanguageServer, converter: Any) -> None:
        super().__init__(server, converter)
        self.tap: Callable[[str, bytes], None] | None = None
        self._initialized = False
        # The client's requests that run. pygls keeps them in one table with the server's own, whose
        # ids it makes up: an answer could then meet a request.
        self._running: dict[Any, asyncio.Task[Any]] = {}
        self._exit: asyncio.Future[int] | None = None
        for method in _NOT_BUILTIN:
            self.fm.builtin_features.pop(method, None)
        # pygls logs whole messages, which hold source text.
        logging.getLogger("pygls").setLevel(logging.CRITICAL + 1)

    # Receiving

    def receive(self, body: bytes) -> None:
        """Handle one message body: every request gets exactly one answer, now or later."""
        if self.tap is not None:
            self.tap("client", body)
        try:
            message = json.loads(body.decode("utf-8"))
        except (UnicodeDecodeError, ValueError, RecursionError):
            self._refuse(None, Refusal(types.ErrorCodes.ParseError, "The message is not JSON in UTF-8."))
            return
        if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
            self._refuse(None, Refusal(types.ErrorCodes.InvalidRequest, "Not a JSON-RPC 2.0 message."))
            return
        method = message.get("method")
        id_ = message.get("id")
        if isinstance(id_, (dict, list, bool)) or not isinstance(method, (str, type(None))):
            self._refuse(None, Refusal(types.ErrorCodes.InvalidRequest, "The id or the method is malformed."))
        elif method is None:
            self._receive_response(message)
        elif "id" in message:
            self._receive_request(id_, method, message.get("params"))
        else:
            self._receive_notification(method, message.get("params"))

    def _receive_request(self, id_: Any, method: str, params: Any) -> None:
        try:
            self._check_life_cycle(method)
            handler = self._find(method)
            argument = self._structure(method, params)
        except Refusal as refusal:
            self._refuse(id_, refusal)
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
            handler = self._find(method)
            argument = self._structure(method, params)
        except Refusal as refusal:
            if refusal.code != types.ErrorCodes.MethodNotFound:
                _LOG.warning("dropped a %s notification: %s", method, refusal.message)
            return
        self._call(None, handler, argument, answer=False)

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
            raise Refusal(types.ErrorCodes.InvalidRequest, "The server is shutting down.")
        if method == types.INITIALIZE:
            if self._initialized:
                raise Refusal(types.ErrorCodes.InvalidRequest, "The server is initialized already.")
        elif not self._initialized:
            raise Refusal(types.ErrorCodes.ServerNotInitialized, "Send `initialize` first.")

    def _find(self, method: str) -> Callable[..., Any]:
        builtin: dict[str, Callable[..., Any]] = self.fm.builtin_features
        own: dict[str, Callable[..., Any]] = self.fm.features
        handler = builtin.get(method) or own.get(method)
        if handler is None:
            raise Refusal(types.ErrorCodes.MethodNotFound, f"Unknown method {method[:80]!r}.")
        return handler

    def _structure(self, method: str, params: Any) -> Any:
        """Raw params to what the method's handler takes: our own values, or lsprotocol's types."""
        if (reader := READERS.get(method)) is not None:
            try:
                return reader(params)
            except MalformedError:
                raise _malformed(method) from None
        known = types.METHOD_TO_TYPES.get(method)
        if known is None:
            return params
        if known[2] is None:
            return None
        if method == types.INITIALIZE:
            return self._structure_initialize(params)
        if method == types.INITIALIZED:
            return types.InitializedParams()
        try:
            return self._converter.structure(params, cast("type[Any]", known[2]))
        except Exception:  # noqa: BLE001 - cattrs raises many kinds; all mean the same
            raise _malformed(method) from None

    def _structure_initialize(self, params: Any) -> types.InitializeParams:
        """Like `_structure`, but one bad capability does not lock its editor out: it is left away."""
        if not isinstance(params, dict) or not isinstance(params.get("capabilities", {}), dict):
            raise Refusal(types.ErrorCodes.InvalidParams, "The params of initialize are malformed.")
        options = params.get("initializationOptions")
        rest = {key: value for key, value in params.items() if key != "initializationOptions"}
        rest.setdefault("capabilities", {})
        result = self._try_initialize(rest)
        if result is None:
            good: dict[str, Any] = {"capabilities": {}}
            for section, value in rest["capabilities"].items():
                if self._try_initialize({"capabilities": {section: value}}) is not None:
                    good["capabilities"][section] = value
            for key, value in rest.items():
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
        except Exception:  # noqa: BLE001 - as in `_structure`
            return None
        return structured

    # Answering

    def _call(self, id_: Any, handler: Callable[..., Any], argument: Any, *, answer: bool = True) -> None:
        """Run a handler up to its first `await` at once, so that it sees the documents of this moment."""
        done = partial(self._finish, id_, answer=answer)
        REQUEST.set(id_)
        if inspect.isgeneratorfunction(handler):
            self._execute_handler(id_, handler, done, args=(argument,))
            return
        try:
            result = handler(argument)
        except Exception as error:  # noqa: BLE001 - one request fails, never the server
            self._fail(id_, error, answer=answer)
            return
        if not inspect.isawaitable(result):
            if answer:
                self._reply(id_, result)
            return
        task = asyncio.ensure_future(result)
        if answer:
            self._running[id_] = task
        task.add_done_callback(done)

    def _finish(self, id_: Any, future: Any, *, answer: bool) -> None:
        if answer and self._running.get(id_) is future:
            del self._running[id_]
        if future.cancelled():
            if answer:
                self._refuse(id_, Refusal(types.LSPErrorCodes.RequestCancelled, "The request was cancelled."))
        elif (error := future.exception()) is not None:
            self._fail(id_, error, answer=answer)
        elif answer:
            self._reply(id_, future.result())

    def _fail(self, id_: Any, error: BaseException, *, answer: bool) -> None:
        if isinstance(error, Refusal):
            refusal = error
        else:
            _LOG.error("a handler failed: %s", _describe(error))
            refusal = Refusal(types.ErrorCodes.InternalError, f"Internal error ({type(error).__name__}).")
        if answer:
            self._refuse(id_, refusal)

    def _reply(self, id_: Any, result: Any) -> None:
        self._send_data({"jsonrpc": "2.0", "id": id_, "result": result})

    def _refuse(self, id_: Any, refusal: Refusal) -> None:
        error = {"code": refusal.code, "message": refusal.message}
        self._send_data({"jsonrpc": "2.0", "id": id_, "error": error})

    def _send_data(self, data: Any) -> None:
        if self.writer is None:
            return
        body = json.dumps(data, default=self._serialize_message, separators=(",", ":")).encode("ascii")
        if self.tap is not None:
            self.tap("server", body)
        self.writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))

    # Builtin features of pygls that we keep

    @lsp_method(types.INITIALIZE)
    def lsp_initialize(self, params: types.InitializeParams) -> Any:
        """Like pygls', less what it announces for every server: commands of its own and file operations."""
        result = yield from super().lsp_initialize(params)
        result.capabilities.execute_command_provider = self.fm.feature_options.get(
            types.WORKSPACE_EXECUTE_COMMAND
        )
        if result.capabilities.workspace is not None:
            result.capabilities.workspace.file_operations = None
        return result

    @lsp_method(types.SHUTDOWN)
    def lsp_shutdown(self, *_: Any) -> None:  # type: ignore[override] # a generator there
        """Refuse what comes from now on, and cancel what still runs."""
        self._shutdown = True
        for task in list(self._running.values()):
            task.cancel()

    # Running

    def stop(self, status: int) -> None:
        """End `serve` with this exit status; the first one wins. Call on the event loop."""
        if self._exit is not None and not self._exit.done():
            self._exit.set_result(status)

    async def serve(self, stdin: int, stdout: int) -> int:
        """Serve file descriptors until `exit`, end of input, a broken output, SIGTERM or a dead parent."""
        loop = asyncio.get_running_loop()
        self._exit = loop.create_future()
        # asyncio's own handler logs the arguments of a callback that failed: a whole message.
        loop.set_exception_handler(_report_failure)

        def stop_soon() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                loop.call_soon_threadsafe(self.stop, 1)

        writer = Writer(stdout, stop_soon)
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
        """Stop when the other end of the output is closed, though there is nothing to write."""
        poll = select.poll()
        poll.register(stdout, 0)

        def woken() -> None:
            # A socket also wakes us for what comes in, or for its other half; that is no end.
            loop.remove_reader(stdout)
            if poll.poll(0):
                self.stop(1)

        with contextlib.suppress(OSError):  # a regular file cannot be watched, and has no other end
            loop.add_reader(stdout, woken)

    async def watch_editor(self, process_id: int) -> None:
        """Stop when the editor is gone, even if it left our input open.

        `process_id` is what the editor says of itself, and says nothing here if the two run in different
        containers. It is believed if it is the process that started this one, or one further up.
        """
        process = _ancestor(process_id)
        if process is None:
            _LOG.info(
                "the editor's process %d is not watched, since it did not start this one; "
                "the server ends when its input does",
                process_id,
            )
            return
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # an old kernel, or it has just ended
                await _end_of(os.pidfd_open(process_id), process)
        # By its time of birth: another process may get the number.
        while _is_alive(process):  # noqa: ASYNC110 - no event exists for this elsewhere
            await asyncio.sleep(_PARENT_CHECK_S)
        self.stop(1)


def _ancestor(process_id: int) -> psutil.Process | None:
    """The process of this number among those that started this one, directly or not."""
    try:
        return next((one for one in psutil.Process().parents() if one.pid == process_id), None)
    except psutil.Error:
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


async def _end_of(descriptor: int, process: psutil.Process) -> None:
    """Wait until the process of a pidfd has ended; no longer if it is not `process`, whose number it was."""
    loop = asyncio.get_running_loop()
    gone = loop.create_future()
    loop.add_reader(descriptor, partial(_settle, gone))
    try:
        if _is_alive(process):
            await gone
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _malformed(method: str) -> Refusal:
    return Refusal(types.ErrorCodes.InvalidParams, f"The params of {method} are missing or malformed.")


def _read(
    descriptor: int,
    loop: asyncio.AbstractEventLoop,
    receive: Callable[[bytes], None],
    on_end: Callable[[], None],
) -> None:
    """The reader thread: bytes to frames, frames to the event loop."""
    frames = FrameReader()
    with contextlib.suppress(OSError, RuntimeError):  # closed under us; the loop has ended
        while data := read_some(descriptor, _READ_BYTES):
            for body in frames.feed(data):
                # An empty body is not JSON either: the client hears of both in the same way.
                loop.call_soon_threadsafe(receive, body or b"")
    on_end()


def _report_failure(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what failed in the background, by kind and place only."""
    error = context.get("exception")
    _LOG.error("%s", _describe(error) if error is not None else context.get("message", "?"))


def _describe(error: BaseException) -> str:
    """The kind and the place of an exception: its message may quote the document."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}" if trace else "?"
    return f"{type(error).__name__} in {place}"


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
