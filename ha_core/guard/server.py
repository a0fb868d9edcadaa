"""``guard.sock``: a bounded number of clients, each with a bounded input line and output queue; one that does not read is
dropped."""

from __future__ import annotations

import os
import selectors
import socket
import struct
from collections.abc import Callable
from dataclasses import replace

from ha_core.guard.control import (
    SOCKET_NAME,
    ControlError,
    LineDecoder,
    Reply,
    Request,
    RunReport,
    SubscribeRequest,
    decode_request,
    encode_reply,
    encode_report,
    request_id,
)

_MAX_CLIENTS = 64
_MAX_QUEUED_BYTES = 8 << 20
_CHUNK = 65_536


class _Client:
    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.decoder = LineDecoder()
        self.queued = bytearray()
        self.subscribed = False
        self.writing = False


class ControlServer:
    def __init__(
        self, run_dir: str, selector: selectors.BaseSelector, answer: Callable[[Request], Reply],
        reports: Callable[[], tuple[RunReport, ...]],
    ) -> None:  # fmt: skip
        """``answer`` carries a request out and returns the reply (its id is set here); ``reports``: the present state of
        all."""
        self._selector = selector
        self._answer = answer
        self._reports = reports
        self._clients: list[_Client] = []
        path = os.path.join(run_dir, SOCKET_NAME)
        # Under another name first: whoever finds the socket can connect.
        fresh = path + ".new"
        if os.path.exists(fresh):
            os.unlink(fresh)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(fresh)
        os.chmod(fresh, 0o600)
        self._listener.listen(16)
        os.rename(fresh, path)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def report(self, report: RunReport) -> None:
        line = encode_report(report)
        for client in list(self._clients):
            if client.subscribed:
                self._send(client, line)

    def close(self) -> None:
        for client in list(self._clients):
            self._drop(client)
        self._selector.unregister(self._listener)
        self._listener.close()

    def _accept(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError:
            return
        _, uid, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.geteuid()) or len(self._clients) >= _MAX_CLIENTS:
            connected.close()
            return
        connected.setblocking(False)
        client = _Client(connected)
        self._clients.append(client)
        self._selector.register(connected, selectors.EVENT_READ, lambda: self._serve(client))

    def _serve(self, client: _Client) -> None:
        if client.writing:
            self._flush(client)
        if client not in self._clients:
            return
        try:
            data = client.socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        try:
            lines = client.decoder.receive(data)
        except ControlError as exc:
            self._send(client, encode_reply(Reply(0, exc.code, str(exc))))
            self._drop(client)
            return
        for line in lines:
            if client in self._clients:
                self._handle(client, line)

    def _handle(self, client: _Client, line: bytes) -> None:
        try:
            number, request = decode_request(line)
        except ControlError as exc:
            self._send(client, encode_reply(Reply(request_id(line), exc.code, str(exc))))
            return
        reply = self._answer(request)
        self._send(client, encode_reply(replace(reply, id=number)))
        if isinstance(request, SubscribeRequest) and client in self._clients:
            for report in self._reports():
                self._send(client, encode_report(report))
            client.subscribed = True

    def _send(self, client: _Client, data: bytes) -> None:
        if client not in self._clients:
            return
        client.queued += data
        if len(client.queued) > _MAX_QUEUED_BYTES:
            self._drop(client)
        elif not client.writing:
            self._flush(client)

    def _flush(self, client: _Client) -> None:
        try:
            while client.queued:
                sent = client.socket.send(client.queued[:_CHUNK])
                del client.queued[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if bool(client.queued) != client.writing:
            client.writing = bool(client.queued)
            mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.writing else 0)
            self._selector.modify(client.socket, mask, lambda: self._serve(client))

    def _drop(self, client: _Client) -> None:
        if client in self._clients:
            self._clients.remove(client)
            self._selector.unregister(client.socket)
            client.socket.close()
