"""Connection level: byte streams and UDP packets for the endpoint machine (Dial, Transmit, Disconnect, TransmitDatagram).

A stream behaves as TCP does: bytes arrive in order, in pieces of other sizes than they were sent in; loss only delays; a cut
path is silence, bytes wait and flow again some time after it heals, unless the kernel gave up meanwhile (``give_up_ns``); a
killed process resets its connections if the path carries the packet; a host without power answers nothing until it is back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from ha_core.ids import LinkName
from ha_core.machines.messages import (
    Accepted,
    Connected,
    DatagramReceived,
    Dial,
    Disconnect,
    Disconnected,
    Flushed,
    Received,
    Transmit,
    TransmitDatagram,
)
from ha_core.testing.simulator.core import MICROSECOND, MILLISECOND, SECOND
from ha_core.testing.simulator.network import Flow, SimNetwork, digest
from ha_core.testing.simulator.process import SimProcess

_SEND_BUFFER = 256 << 10
_SYN_TRIES = 3


class _Host:
    __slots__ = ("addresses", "host", "next_accept", "on_datagram", "process")

    def __init__(
        self,
        process: SimProcess,
        host: str,
        addresses: dict[LinkName, str],
        on_datagram: Callable[[str, str, bytes], bool] | None,
    ) -> None:
        self.process = process
        self.host = host
        self.addresses = addresses
        self.next_accept = 1
        self.on_datagram = on_datagram


class _End:
    """One end of a connection: what it has sent and the other has not got yet (``wire``; None is the end of the stream)."""

    __slots__ = (
        "end_sent", "flow", "flush_due", "in_kernel", "last_ns", "number", "open", "owner", "peer", "remote", "stalled",
        "stalled_at_ns", "unflushed", "wire",
    )  # fmt: skip

    def __init__(self, owner: _Host, number: int, flow: Flow, remote: str) -> None:
        self.owner = owner
        self.number = number
        self.flow = flow
        self.remote = remote
        self.peer: _End | None = None
        self.open = True
        self.end_sent = False
        self.wire: deque[bytes | None] = deque()
        self.stalled = 0
        """How many entries of ``wire`` were lost on a cut path and wait for a retransmission; the others are under way."""
        self.stalled_at_ns = 0
        self.last_ns = 0
        self.in_kernel = 0
        self.unflushed = 0
        self.flush_due = False


class SimConnections:
    """The transports of all endpoint machines; ``attach`` joins a process with its addresses, one per link."""

    def __init__(self, network: SimNetwork, *, give_up_ns: int = 8 * SECOND, chop: float = 0.15) -> None:
        """``give_up_ns``: a sender's connection breaks after so long without an answer. ``chop``: the share of writes that
        arrive in small random pieces."""
        self.network = network
        self.sim = network.sim
        self._rng = self.sim.stream("connections")
        self._give_up_ns = give_up_ns
        self._chop = chop
        self._by_name: dict[str, _Host] = {}
        self._by_address: dict[str, _Host] = {}
        self._ends: dict[tuple[str, int], _End] = {}
        self._dark: set[str] = set()
        """Processes that went down without a packet (no power)."""
        self.tap: Callable[[str, int, bytes], None] | None = None
        """Called as ``tap(process, connection, data)`` for everything that is transmitted on a stream."""
        self.dial_tap: Callable[[str, Dial], None] | None = None
        """Called as ``dial_tap(process, effect)`` for every dial."""

    def attach(
        self,
        process: SimProcess,
        addresses: Mapping[LinkName, str],
        *,
        host: str = "",
        on_datagram: Callable[[str, str, bytes], bool] | None = None,
    ) -> None:
        """``on_datagram(link, remote, data)`` sees UDP packets first and answers whether it took one (the guard's)."""
        entry = _Host(process, host or process.name, dict(addresses), on_datagram)
        self._by_name[process.name] = entry
        for address in addresses.values():
            self._by_address[address] = entry
        process.on(Dial, lambda effect: self._dial(entry, effect))
        process.on(Transmit, lambda effect: self._transmit(entry, effect))
        process.on(Disconnect, lambda effect: self._disconnect(entry, effect))
        process.on(TransmitDatagram, lambda effect: self.send_datagram(process.name, effect.link, effect.remote, effect.data))
        process.observe(self)

    # -- faults --

    def reset(self, one: str, other: str, link: str | None = None) -> int:
        """Break the connections between two processes; bytes under way are lost.

        Returns:
            How many broke.
        """
        count = 0
        for end in list(self._ends.values()):
            peer = end.peer
            if peer is None or end.owner.process.name != one or peer.owner.process.name != other:
                continue
            if link is None or end.flow.link == link:
                self.sim.fault("reset")
                self._break(end, "connection reset")
                self._break(peer, "connection reset")
                count += 1
        return count

    # -- datagrams --

    def send_datagram(self, sender: str, link: str, remote: str, data: bytes) -> None:
        source, target = self._by_name[sender], self._by_address.get(remote)
        if target is None or target.host == source.host:
            return
        self.sim.trace("udp", sender, remote, len(data), digest(data))
        flow = self.network.flow(source.host, target.host, link)
        self.network.packet(flow, self._datagram, target, link, source.addresses[LinkName(link)], data)

    def _datagram(self, target: _Host, link: str, remote: str, data: bytes) -> None:
        if target.process.alive and not (target.on_datagram is not None and target.on_datagram(link, remote, data)):
            target.process.post(DatagramReceived(LinkName(link), remote, data))

    # -- dialling --

    def _dial(self, entry: _Host, effect: Dial) -> None:
        self.sim.trace("dial", entry.process.name, effect.connection, effect.path.remote)
        if self.dial_tap is not None:
            self.dial_tap(entry.process.name, effect)
        target = self._by_address.get(effect.path.remote)
        key = entry.process.name, effect.connection
        if target is None or target.host == entry.host:
            self.sim.after(MILLISECOND, self._refuse, entry.process, entry.process.lives, effect.connection, "no route to host")
            return
        flow = self.network.flow(entry.host, target.host, effect.path.link)
        end = _End(entry, effect.connection, flow, effect.path.remote)
        self._ends[key] = end
        self.sim.after(self.network.transit_ns(flow), self._syn, end, target, 1)

    def _refuse(self, process: SimProcess, lives: int, number: int, error: str) -> None:
        if process.lives == lives:
            process.post(Disconnected(number, error))

    def _syn(self, end: _End, target: _Host, attempt: int) -> None:
        if not end.open:
            return
        network, owner = self.network, end.owner
        back = network.flow(target.host, owner.host, end.flow.link)
        dark = target.process.name in self._dark
        if end.flow.cuts or back.cuts or dark or network.lost(end.flow):
            if attempt >= _SYN_TRIES:
                self._break(end, "timed out")
            else:
                self.sim.after(attempt * SECOND, self._syn, end, target, attempt + 1)
            return
        if not target.process.alive:
            self.sim.after(network.transit_ns(back), self._break, end, "connection refused")
            return
        number, target.next_accept = target.next_accept, target.next_accept + 2
        source = owner.addresses[LinkName(end.flow.link)].rpartition(":")[0]
        peer = _End(target, number, back, f"{source}:{32768 + end.number % 28000}")
        peer.peer, end.peer = end, peer
        self._ends[target.process.name, number] = peer
        accepted_ns = self.sim.now_ns + int(self._rng.random() * 200 * MICROSECOND)
        connected_ns = self.sim.now_ns + network.transit_ns(back)
        end.last_ns, peer.last_ns = accepted_ns, connected_ns
        link = LinkName(end.flow.link)
        self.sim.at(accepted_ns, self._tell, peer, Accepted(number, link, peer.remote))
        self.sim.at(connected_ns, self._tell, end, Connected(end.number))

    def _tell(self, end: _End, event: Accepted | Connected) -> None:
        if end.open:
            end.owner.process.post(event)

    # -- streams --

    def _transmit(self, entry: _Host, effect: Transmit) -> None:
        end = self._ends.get((entry.process.name, effect.connection))
        if end is None or not end.open or end.peer is None:
            return
        data = effect.data
        self.sim.trace("tcp", entry.process.name, effect.connection, len(data), digest(data))
        if self.tap is not None:
            self.tap(entry.process.name, effect.connection, data)
        end.unflushed += len(data)
        self._flush_soon(end)
        if len(data) > 1 and self._rng.random() < self._chop:
            pieces = self._rng.randrange(2, 6)
            marks = sorted(self._rng.randrange(1, len(data)) for _ in range(pieces - 1))
            start = 0
            for mark in [*marks, len(data)]:
                if mark > start:
                    self._put(end, data[start:mark])
                start = mark
        else:
            self._put(end, data)

    def _put(self, end: _End, piece: bytes | None) -> None:
        end.wire.append(piece)
        if end.stalled:
            end.stalled += 1
        else:
            self._launch(end, 0)

    def _launch(self, end: _End, extra_ns: int) -> None:
        delay = self.network.transit_ns(end.flow) + extra_ns
        while self.network.lost(end.flow):
            delay += self._rng.randrange(10, 250) * MILLISECOND
        end.last_ns = max(end.last_ns, self.sim.now_ns + delay)
        self.sim.at(end.last_ns, self._arrive, end)

    def _arrive(self, end: _End) -> None:
        """The oldest piece reaches the other end, if the path carries it."""
        peer = end.peer
        if peer is None or not end.wire:
            return
        if end.stalled or end.flow.cuts or peer.owner.process.name in self._dark:
            end.stalled += 1
            if end.stalled == 1:
                self._stall(end, peer)
            return
        piece = end.wire.popleft()
        if piece is not None:
            end.in_kernel = max(0, end.in_kernel - len(piece))
            if end.unflushed:
                self._flush_soon(end)
        if not peer.open:
            if piece is not None and end.open and not peer.flow.cuts:
                self.sim.after(self.network.transit_ns(peer.flow), self._break, end, "connection reset by peer")
            return
        if piece is None:
            self._break(peer, "closed by peer")
        else:
            peer.owner.process.post(Received(peer.number, piece))

    def _stall(self, end: _End, peer: _End) -> None:
        end.stalled_at_ns = self.sim.now_ns
        self.sim.after(self._give_up_ns, self._give_up, end, self.sim.now_ns)
        if end.flow.cuts:
            end.flow.when_up(lambda: self._resume_later(end))
        else:
            self.sim.after(200 * MILLISECOND, self._poll_dark, end, peer)

    def _poll_dark(self, end: _End, peer: _End) -> None:
        """The other host has no power: once it has, it knows nothing of the connection."""
        if end.stalled and end.open:
            if peer.owner.process.name in self._dark:
                self.sim.after(200 * MILLISECOND, self._poll_dark, end, peer)
            else:
                self._resume_later(end)

    def _resume_later(self, end: _End) -> None:
        """TCP notices a healed path at its next retransmission, the later the longer the silence was."""
        silence = self.sim.now_ns - end.stalled_at_ns
        self.sim.after(5 * MILLISECOND + int(self._rng.random() * min(silence, 3 * SECOND)), self._resume, end)

    def _resume(self, end: _End) -> None:
        count, end.stalled = end.stalled, 0
        for _ in range(count):
            self._launch(end, 0)

    def _give_up(self, end: _End, since_ns: int) -> None:
        if end.stalled and end.stalled_at_ns == since_ns and end.open:
            self._break(end, "timed out")

    def _flush_soon(self, end: _End) -> None:
        if not end.flush_due and end.in_kernel < _SEND_BUFFER:
            end.flush_due = True
            self.sim.after(300 * MICROSECOND, self._flush, end)

    def _flush(self, end: _End) -> None:
        end.flush_due = False
        count = min(end.unflushed, _SEND_BUFFER - end.in_kernel)
        if count > 0 and end.open:
            end.unflushed -= count
            end.in_kernel += count
            end.owner.process.post(Flushed(end.number, count))

    # -- endings --

    def _disconnect(self, entry: _Host, effect: Disconnect) -> None:
        end = self._ends.pop((entry.process.name, effect.connection), None)
        if end is not None and end.open:
            self.sim.trace("close", entry.process.name, effect.connection)
            self._hang_up(end)

    def _hang_up(self, end: _End) -> None:
        """The end stops receiving; the other one learns it after what was sent, or (a reset) at once."""
        end.open = False
        if end.peer is None or end.end_sent:
            return
        end.end_sent = True
        if self._rng.random() < 0.3 and not end.stalled:
            end.wire.clear()
        self._put(end, None)

    def _break(self, end: _End, error: str) -> None:
        """Tell this end that its connection is gone."""
        if end.open:
            end.open = False
            self._ends.pop((end.owner.process.name, end.number), None)
            end.owner.process.post(Disconnected(end.number, error))

    def process_down(self, process: SimProcess, *, silent: bool) -> None:
        entry = self._by_name[process.name]
        if silent:
            self._dark.add(process.name)
        for key in [key for key in self._ends if key[0] == process.name]:
            end = self._ends.pop(key)
            if silent:
                end.open = False
                end.wire.clear()
            else:
                self._hang_up(end)
        entry.next_accept = 1

    def process_up(self, process: SimProcess) -> None:
        self._dark.discard(process.name)
