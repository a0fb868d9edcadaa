"""The guard's UDP sockets, one per link, and where its renewals go: the primaries of the file, and those the last answer
named."""

from __future__ import annotations

import errno
import os
import selectors
import socket
from collections.abc import Callable

from ha_core.guard.key import KeyFile, WatchedFile
from ha_core.guard.primaries import FILE_NAME, decode_primaries, split_address
from ha_core.guard.renewal import MAX_PACKET_BYTES, Renewal, RenewalAnswer, RenewalError

_PACKETS_A_TURN = 64
_PRIMARIES_BYTES = 65_536


class Links:
    def __init__(
        self, run_dir: str, links: dict[str, str], key: KeyFile, selector: selectors.BaseSelector,
        receive: Callable[[RenewalAnswer], None], rejoined: Callable[[], None], log: Callable[[str], None],
    ) -> None:  # fmt: skip
        """``receive`` is called with each authentic answer, ``rejoined`` when there is another key: no renewal under the old
        lease is sent with it."""
        self._file = WatchedFile(os.path.join(run_dir, FILE_NAME), _PRIMARIES_BYTES)
        self._links = links
        self._key = key
        self._selector = selector
        self._receive = receive
        self._rejoined = rejoined
        self._log = log
        self._sockets: dict[str, socket.socket] = {}
        self._primaries: set[tuple[str, str]] = set()
        self._complained: set[str] = set()
        self.refused = 0

    def send(self, renewal: Renewal, hints: tuple[tuple[str, str], ...]) -> None:
        """One copy to every primary on every link that we share with it; a link that cannot send is left for the next time.
        Without a key, or without the file of primaries, the host belongs to no cluster: then nobody is asked."""
        member = self._reload()
        try:
            if self._key.reload():
                self._rejoined()
                return
        except ValueError as exc:  # the key was written wrongly: that may be mended
            self._complain(str(exc))
        if self._key.codec is None or not member:
            return
        packet = self._key.codec.encode_renewal(renewal)
        for link in self._links:
            opened = self._sockets.get(link) or self._open(link)
            if opened is None:
                continue
            for name, address in sorted(self._primaries.union(hints)):
                remote = split_address(address) if name == link else None
                if remote is not None:
                    self._send(opened, packet, remote, address)

    def close(self) -> None:
        for opened in self._sockets.values():
            self._selector.unregister(opened)
            opened.close()
        self._sockets.clear()

    def _open(self, link: str) -> socket.socket | None:
        """Bound lazily: a link whose address is not there yet (or not any more) may come later."""
        address = split_address(self._links[link])
        host = address[0] if address is not None else ""
        opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            opened.bind((host, 0))
        except OSError as exc:
            opened.close()
            self._complain(f"link {link}: cannot bind {host}: {exc.strerror}")
            return None
        self._sockets[link] = opened
        self._selector.register(opened, selectors.EVENT_READ, lambda: self._read(opened))
        return opened

    def _send(self, opened: socket.socket, packet: bytes, remote: tuple[str, int], address: str) -> None:
        try:
            opened.sendto(packet, remote)
        except BlockingIOError:
            pass
        except (OSError, UnicodeError) as exc:
            # ECONNREFUSED tells of an earlier packet to somebody who is not up; it is a matter of course.
            if not isinstance(exc, OSError) or exc.errno != errno.ECONNREFUSED:
                self._complain(f"cannot send to {address}: {exc}")

    def _read(self, opened: socket.socket) -> None:
        for _ in range(_PACKETS_A_TURN):
            try:
                packet = opened.recv(MAX_PACKET_BYTES + 1)
            except BlockingIOError:
                return
            except OSError:
                continue
            if self._key.codec is None:
                continue
            try:
                answer = self._key.codec.decode_answer(packet)
            except RenewalError:
                self.refused += 1
                continue
            self._receive(answer)

    def _reload(self) -> bool:
        """False if there is no file of primaries."""
        try:
            data = self._file.read_changed()
            if data is not None:
                primaries = decode_primaries(data)
                self._primaries = {(link, address) for links in primaries.values() for link, address in links.items()}
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as exc:
            self._complain(f"{self._file.path}: {exc}")
        return True

    def _complain(self, text: str) -> None:
        """Each complaint once: renewals come several times a second."""
        if text not in self._complained and len(self._complained) < 100:
            self._complained.add(text)
            self._log(text)
