"""Requests and answers between the local processes of a host, and between center, command line and vpxa.

One connection carries many requests at once, each with a number; a request may stream items before its answer. Over TCP both
ends prove that they hold the cluster key; a Unix socket is guarded by the mode of its folder.

Wire: u32 length, then a msgpack array: [REQUEST, id, method, params], [RESULT, id, value],
[ERROR, id, class, text, attributes], [ITEM, id, value], [CANCEL, id].
"""

from __future__ import annotations

import hmac
import logging
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TypeGuard

import attrs
import msgpack
import trio

from ha_core import errors
from ha_core.config import split_address
from ha_core.errors import DecodeError, HAError, RemoteProtocolError, TransportError
from ha_core.runtime.entropy import fresh_id

logger = logging.getLogger(__name__)

REQUEST, RESULT, ERROR, ITEM, CANCEL = range(5)
MAX_FRAME_BYTES = 1 << 20
MAX_REQUESTS = 256
"""Requests of one connection that may be in the works at once; more are refused."""
MAX_CONNECTIONS = 256
"""Of one TCP server, strangers in their handshake included; more are hung up on."""
HANDSHAKE_S = 5.0
_LENGTH = struct.Struct(">I")

Plain = object
Params = Mapping[str, object]


@attrs.frozen
class Call:
    """A request as its handler sees it."""

    method: str
    params: Params
    send: Callable[[object], Awaitable[None]]
    """Stream one item to the caller."""

    def text(self, name: str, default: str | None = None) -> str:
        """The parameter ``name``, which must be a string."""
        value = self.params.get(name, default)
        if not isinstance(value, str):
            raise RemoteProtocolError(f"{self.method}: {name}: expected a string, found {value!r}", code="params")
        return value


Handler = Callable[[Call], Awaitable[object]]


class _Frames:
    """Whole msgpack frames over a stream; sends are serialised.

    A send that was cancelled half-way has torn its frame: the stream is closed, lest the rest be read as something else.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._buffer = bytearray()
        self._lock = trio.Lock()

    async def send(self, message: list[object]) -> None:
        """Raises LocalProtocolError, with nothing sent, for a message that fits no frame."""
        body = msgpack.packb(message)
        if len(body) > MAX_FRAME_BYTES:
            raise errors.LocalProtocolError(f"a message of {len(body)} bytes, at most {MAX_FRAME_BYTES} fit a frame")
        async with self._lock:
            try:
                await self.stream.send_all(_LENGTH.pack(len(body)) + body)
            except BaseException:
                await trio.aclose_forcefully(self.stream)
                raise

    async def exactly(self, size: int) -> bytes | None:
        """``size`` bytes; None at the end of the stream."""
        while len(self._buffer) < size:
            data = await self.stream.receive_some(65536)
            if not data:
                return None
            self._buffer += data
        found = bytes(self._buffer[:size])
        del self._buffer[:size]
        return found

    async def receive(self) -> list[object] | None:
        head = await self.exactly(_LENGTH.size)
        if head is None:
            return None
        (size,) = _LENGTH.unpack(head)
        if size > MAX_FRAME_BYTES:
            raise errors.FrameTooLargeError(f"a frame of {size} bytes was announced, at most {MAX_FRAME_BYTES} are taken")
        body = await self.exactly(size)
        if body is None:
            return None
        try:
            message = msgpack.unpackb(body, max_array_len=1 << 16, max_map_len=1 << 16, strict_map_key=False)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as exc:
            raise DecodeError(f"a frame that is no msgpack: {exc}") from exc
        if not isinstance(message, list) or len(message) < 2 or not isinstance(message[1], int):
            raise DecodeError("a frame that is no request and no answer")
        return message


def _proof(key: bytes, who: bytes, first: bytes, second: bytes) -> bytes:
    return blake2b(who + first + second, key=key, digest_size=32, person=b"ha-core rpc").digest()


async def _prove_as_server(frames: _Frames, key: bytes) -> None:
    ours = fresh_id()
    await frames.stream.send_all(ours)
    answer = await frames.exactly(48)
    if answer is None or not hmac.compare_digest(answer[16:], _proof(key, b"client", ours, answer[:16])):
        raise RemoteProtocolError("the caller does not hold the cluster key", code="key")
    await frames.stream.send_all(_proof(key, b"server", answer[:16], ours))


async def _prove_as_client(frames: _Frames, key: bytes) -> None:
    theirs = await frames.exactly(16)
    if theirs is not None:
        ours = fresh_id()
        await frames.stream.send_all(ours + _proof(key, b"client", theirs, ours))
        answer = await frames.exactly(32)
        if answer is not None and hmac.compare_digest(answer, _proof(key, b"server", ours, theirs)):
            return
    raise RemoteProtocolError("the server refused our cluster key, or does not hold it", code="key")


async def serve_connection(stream: trio.abc.Stream, handler: Handler, *, key: bytes | None = None) -> None:
    """Answer the requests of one connection until it ends; a caller's mistakes end that connection only."""
    frames = _Frames(stream)
    try:
        if key is not None:
            with trio.fail_after(HANDSHAKE_S):
                await _prove_as_server(frames, key)
        async with trio.open_nursery() as nursery:
            await _read_requests(frames, handler, nursery)
            nursery.cancel_scope.cancel()
    except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, RemoteProtocolError):
        pass
    finally:
        await trio.aclose_forcefully(stream)


async def _read_requests(frames: _Frames, handler: Handler, nursery: trio.Nursery) -> None:
    scopes: dict[int, trio.CancelScope] = {}

    async def answer(number: int, call: Call) -> None:
        with scopes[number]:
            try:
                await frames.send([RESULT, number, await handler(call)])
            except HAError as exc:
                await frames.send([ERROR, number, type(exc).__name__, str(exc), _attributes(exc)])
            except (TypeError, ValueError, AttributeError, LookupError, OSError) as exc:
                # Parameters of a form that the handler did not look for, or a disk that is full: one request's, not the server's.
                logger.exception("%s failed", call.method[:40])
                text = f"{call.method[:40]}: failed: {type(exc).__name__}: {' '.join(str(exc).split())}"
                await frames.send([ERROR, number, "HAError", text, {}])
        del scopes[number]

    while (message := await frames.receive()) is not None:
        kind, number = message[0], message[1]
        assert isinstance(number, int)
        if kind == CANCEL and number in scopes:
            scopes[number].cancel()
        elif kind == REQUEST and len(message) == 4 and isinstance(message[2], str) and _is_params(message[3]):
            if number in scopes or len(scopes) >= MAX_REQUESTS:
                text = f"request {number} is in the works already, or {MAX_REQUESTS} others are"
                await frames.send([ERROR, number, "RemoteProtocolError", text, {"code": "requests"}])
                continue
            scopes[number] = trio.CancelScope()

            async def send(value: object, number: int = number) -> None:
                await frames.send([ITEM, number, value])

            nursery.start_soon(answer, number, Call(message[2], message[3], send))
        elif kind != CANCEL:
            raise DecodeError("a frame that is no request")


def _is_params(value: object) -> TypeGuard[dict[str, object]]:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _attributes(error: HAError) -> dict[str, object]:
    """Those that travel: numbers and texts."""
    return {name: value for name, value in vars(error).items() if isinstance(value, str | int | float)}


class RpcClient:
    """The calling end of a connection; made by ``open_rpc``."""

    def __init__(self, frames: _Frames) -> None:
        self._frames = frames
        self._next = 1
        self._answers: dict[int, trio.MemorySendChannel[tuple[int, object]]] = {}
        self._error: Exception | None = None

    async def call(self, method: str, /, **params: object) -> object:
        """Send a request and wait for its answer.

        Raises:
            HAError: of the class that the handler raised.
            TransportError: the connection ended first; whether it was carried out is unknown.
        """
        async with self.stream(method, **params) as items:
            async for kind, value in items:
                if kind == RESULT:
                    return value
        raise TransportError(f"{method}: the connection ended before the answer")

    @asynccontextmanager
    async def stream(self, method: str, /, **params: object) -> AsyncIterator[trio.MemoryReceiveChannel[tuple[int, object]]]:
        """Send a request and receive (ITEM, value) pairs, then (RESULT, value); leaving early cancels the request."""
        if self._error is not None:
            raise TransportError(f"{method}: the connection has ended: {self._error}") from self._error
        number, self._next = self._next, self._next + 1
        send, receive = trio.open_memory_channel[tuple[int, object]](1024)
        self._answers[number] = send
        try:
            try:
                await self._frames.send([REQUEST, number, method, dict(params)])
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise TransportError(f"{method}: the connection broke") from exc
            yield _Raising(receive)  # type: ignore[misc]
        finally:
            if self._answers.pop(number, None) is not None and self._error is None:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    try:
                        await self._frames.send([CANCEL, number])
                    except (trio.BrokenResourceError, trio.ClosedResourceError):
                        pass

    async def run(self) -> None:
        """Read answers until the connection ends."""
        try:
            while (message := await self._frames.receive()) is not None:
                await self._take(message)
            self._error = TransportError("closed by the other end")
        except (trio.BrokenResourceError, trio.ClosedResourceError, RemoteProtocolError) as exc:
            self._error = exc
        finally:
            self._error = self._error or TransportError("closed")
            for queue in self._answers.values():
                queue.close()

    async def _take(self, message: list[object]) -> None:
        kind, number = message[0], message[1]
        assert isinstance(number, int)
        queue = self._answers.get(number)
        if queue is None:
            return
        if len(message) < (4 if kind == ERROR else 3):
            raise DecodeError("a frame that is no answer")
        try:
            if kind == ERROR:
                attributes = message[4] if len(message) > 4 and _is_params(message[4]) else {}
                await queue.send((ERROR, (message[2], message[3], attributes)))
            elif kind in (ITEM, RESULT):
                await queue.send((kind, message[2]))
        except trio.BrokenResourceError:
            return
        if kind != ITEM:
            self._answers.pop(number, None)
            queue.close()


@attrs.frozen
class _Raising:
    """The receive side of a request: an ERROR frame comes out as the exception that it names."""

    queue: trio.MemoryReceiveChannel[tuple[int, object]]

    def __aiter__(self) -> _Raising:
        return self

    async def __anext__(self) -> tuple[int, object]:
        kind, value = await self.queue.__anext__()
        if kind == ERROR:
            assert isinstance(value, tuple)
            name, text, attributes = value
            raise _error(str(name), str(text), attributes)
        return kind, value


def _error(name: str, text: str, attributes: Params) -> HAError:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, HAError):
        for known in (attributes, {}):
            try:
                return kind(text, **known)
            except TypeError:  # a class that has other attributes, or one that wants some which do not travel
                continue
    return HAError(text)


@asynccontextmanager
async def open_rpc(stream: trio.abc.Stream, *, key: bytes | None = None) -> AsyncIterator[RpcClient]:
    """Speak to the server at the other end of ``stream``, which is closed on the way out.

    Raises:
        RemoteProtocolError: the other end does not hold the same key.
        TransportError: the connection ended during the handshake.
    """
    frames = _Frames(stream)
    try:
        if key is not None:
            try:
                with trio.fail_after(HANDSHAKE_S):
                    await _prove_as_client(frames, key)
            except (trio.TooSlowError, trio.BrokenResourceError) as exc:
                raise TransportError("the connection ended during the handshake") from exc
        client = RpcClient(frames)
        error: BaseException | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            try:
                yield client
            except BaseException as exc:  # noqa: ASYNC103 - raised below, outside the nursery, so that it leaves unwrapped
                error = exc
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error
    finally:
        await trio.aclose_forcefully(stream)


@asynccontextmanager
async def dial_rpc(address: str | Path, *, key: bytes | None = None) -> AsyncIterator[RpcClient]:
    """Connect to a Unix socket (a path) or to ``host:port`` and speak.

    Raises:
        ConfigError: ``address`` is none.
        TransportError: nobody listens there.
    """
    try:
        if isinstance(address, Path):
            stream: trio.SocketStream = await trio.open_unix_socket(str(address))
        else:
            host, port = split_address(address, "address")
            with trio.fail_after(HANDSHAKE_S):
                stream = await trio.open_tcp_stream(host, port)
    except (OSError, trio.TooSlowError) as exc:
        raise TransportError(f"{address}: nobody answers ({_why(exc)}); is the process running?") from exc
    async with open_rpc(stream, key=key) as client:
        yield client


def _why(error: OSError | trio.TooSlowError) -> str:
    """In a word or two: trio tries every address of a name and raises what it met with them as a group."""
    cause = error.__cause__
    if isinstance(cause, ExceptionGroup):
        cause = cause.exceptions[0]
    found = cause if isinstance(cause, OSError) else error
    if isinstance(found, OSError) and found.errno is not None and found.errno > 0:
        return os.strerror(found.errno)
    return str(found) or "no answer in time"


async def serve_unix(path: Path, handler: Handler, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve requests on a Unix socket until cancelled. A socket file that is there is replaced; ours stays: whoever serves next
    replaces it, and removing it could only ever hit a successor's."""
    socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    path.unlink(missing_ok=True)
    try:
        await socket.bind(str(path))
        path.chmod(0o600)
        socket.listen(64)
    except OSError as exc:
        socket.close()
        raise TransportError(f"{path}: cannot listen: {exc.strerror}") from exc
    listener = trio.SocketListener(socket)
    task_status.started()

    async def serve(stream: trio.SocketStream) -> None:
        await serve_connection(stream, handler)

    await trio.serve_listeners(serve, [listener])


async def serve_tcp(
    address: str, handler: Handler, *, key: bytes, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve requests on ``host:port`` to holders of ``key`` until cancelled; starts with the bound address."""
    host, port = split_address(address, "address")
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as exc:
        raise TransportError(f"{address}: cannot listen: {exc.strerror or exc}") from exc
    bound = listeners[0].socket.getsockname()
    task_status.started(f"{bound[0]}:{bound[1]}")

    connections = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal connections
        if connections >= MAX_CONNECTIONS:
            await trio.aclose_forcefully(stream)
            return
        connections += 1
        try:
            await serve_connection(stream, handler, key=key)
        finally:
            connections -= 1

    await trio.serve_listeners(serve, listeners)
