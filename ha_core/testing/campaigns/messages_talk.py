"""What the application of a messages node says on session channels and in datagrams, and what it checks of what it hears.

One channel of each priority, so that frames of some go before frames of others, on every path and over every switch; each
message names its sender, the life of the sender's process, its channel and its number there (I13 to I16).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from struct import Struct

import attrs

from ha_core.ids import ChannelName, NodeId, SessionId
from ha_core.machines import messages as m
from ha_core.machines.contract import Event
from ha_core.machines.endpoint import EndpointMachine
from ha_core.testing.simulator import SimProcess, Simulation

COMMANDS = ChannelName("commands")
TALK = ChannelName("talk")
FILES = ChannelName("files")
ARCHIVE = ChannelName("archive")
SESSION_CHANNELS = {
    COMMANDS: m.Priority.URGENT,
    TALK: m.Priority.NORMAL,
    FILES: m.Priority.BULK,
    ARCHIVE: m.Priority.BACKGROUND,
}
TOPIC = ChannelName("beat")
LONG_BYTES = 70_000
"""A message that no frame holds: it goes in fragments."""
_NAMES = tuple(SESSION_CHANNELS)
_TALK_TAG = Struct(">QQB")
_BEAT_TAG = Struct(">QQ")


@attrs.define
class _Heard:
    """What a process has heard of one peer on one channel in the present session."""

    next_seq: int = 1
    last: int = 0


class Talker:
    """The part of an application that lives on sessions; one for all lives of its process."""

    def __init__(self, sim: Simulation, name: str, rng: random.Random, after: Callable[..., None]) -> None:
        """``after(longest_ns, call)`` calls later, if the process still lives."""
        self._sim = sim
        self._name = name
        self._rng = rng
        self._after = after
        self._process: SimProcess | None = None
        self.sessions: dict[NodeId, SessionId] = {}
        self.on_session_up: Callable[[m.SessionUp], None] = lambda effect: None
        self.stalled = False
        """The application takes nothing from its session channels."""
        self._heard: dict[tuple[NodeId, ChannelName], _Heard] = {}
        self._talked: dict[tuple[NodeId, ChannelName], int] = {}
        self._beats: dict[NodeId, int] = {}
        self._newest_talk: dict[tuple[NodeId, str, ChannelName], tuple[int, int]] = {}
        """(peer, its process, channel) -> (life, number) of what was delivered last, in any session."""
        self._newest_beat: dict[tuple[NodeId, str], tuple[int, int]] = {}
        self._unconsumed: list[Event] = []

    def listen(self, process: SimProcess) -> None:
        self._process = process
        process.on(m.SessionUp, self._session_up)
        process.on(m.SessionDown, self._session_down)
        process.on(m.DeliverRun, self._deliver)
        process.on(m.DeliverDatagram, self._deliver_datagram)

    def begin(self) -> None:
        """A new life of the process: nothing of the sessions before is known to it."""
        self.sessions.clear()
        self._heard.clear()
        self._talked.clear()
        self._beats.clear()
        self._unconsumed.clear()

    @property
    def process(self) -> SimProcess:
        assert self._process is not None
        return self._process

    # -- what it says --

    def talk(self, endpoint: EndpointMachine, to: NodeId, channel: ChannelName, count: int, size: int) -> None:
        """Send ``count`` session messages, if there is a session and its channel has room."""
        if to not in self.sessions or not endpoint.has_room(to, channel):
            return
        first = self._talked.get((to, channel), 0) + 1
        self._talked[to, channel] = first + count - 1
        tail = self._name.encode().ljust(max(size, 16), b".")
        life, number = self.process.lives, _NAMES.index(channel)
        bodies = [_TALK_TAG.pack(life, at, number) + tail for at in range(first, first + count)]
        redundant = channel == TALK and self._rng.random() < 0.1
        self.process.post(m.SendRun(to, channel, bodies, SESSION_CHANNELS[channel], redundant))

    def talk_anything(self, endpoint: EndpointMachine, to: NodeId, count: int, size: int) -> None:
        """On a channel drawn at random; commands are few and short, an archive's messages few and sometimes long."""
        draw = self._rng.random()
        if draw < 0.5:
            self.talk(endpoint, to, TALK, count, size)
        elif draw < 0.7:
            self.talk(endpoint, to, COMMANDS, min(count, 4), 40)
        elif draw < 0.9:
            self.talk(endpoint, to, FILES, count, size)
        else:
            self.talk(endpoint, to, ARCHIVE, min(count, 20), LONG_BYTES if draw > 0.995 else size)

    def beat(self, to: NodeId) -> None:
        number = self._beats[to] = self._beats.get(to, 0) + 1
        body = _BEAT_TAG.pack(self.process.lives, number) + self._name.encode()
        self.process.post(m.SendDatagram(to, TOPIC, body))

    def consume(self) -> None:
        """Take what was delivered, unless the application is stalled."""
        if not self.stalled and self._unconsumed and self.process.alive:
            taken, self._unconsumed = self._unconsumed, []
            self.process.post(*taken)

    # -- what it hears --

    def _session_up(self, effect: m.SessionUp) -> None:
        self._sim.checked("I28")  # every HELLO and WELCOME carries a key that nobody knows
        self.on_session_up(effect)
        self.sessions[effect.peer] = effect.session
        self._forget(effect.peer)

    def _session_down(self, effect: m.SessionDown) -> None:
        if self.sessions.get(effect.peer) == effect.session:
            del self.sessions[effect.peer]
            self._forget(effect.peer)

    def _forget(self, peer: NodeId) -> None:
        for name in SESSION_CHANNELS:
            self._heard.pop((peer, name), None)

    def _deliver(self, effect: m.DeliverRun) -> None:
        sim, peer, channel = self._sim, effect.peer, effect.channel
        where = f"{self._name} from {peer} on {channel!r}"
        session = self.sessions.get(peer)
        sim.checked("I15")
        if session is None:
            sim.violate("I15", f"{where}: a session message without a session")
            return
        heard = self._heard.get((peer, channel))
        if heard is None:
            heard = self._heard[peer, channel] = _Heard()
        sim.checked("I13")
        if effect.first_seq != heard.next_seq:
            sim.violate("I13", f"{where}: seq {effect.first_seq} is delivered, expected {heard.next_seq}")
        heard.next_seq = effect.first_seq + len(effect.bodies)
        size = 0
        for body in effect.bodies:
            size += len(body)
            self._judge(heard, where, peer, channel, body)
        self._unconsumed.append(m.Consumed(peer, channel, len(effect.bodies), size, session))
        self._after(5_000_000, self.consume)

    def _judge(self, heard: _Heard, where: str, peer: NodeId, channel: ChannelName, body: bytes) -> None:
        sim = self._sim
        life, number, said_on = _TALK_TAG.unpack_from(body)
        if _NAMES[said_on] != channel:
            sim.violate("I13", f"{where}: a message that was sent on {_NAMES[said_on]!r}")
        if heard.last and number != heard.last + 1:
            sim.violate("I13", f"{where}: message {number} after {heard.last}")
        heard.last = number
        sender = body[_TALK_TAG.size :].rstrip(b".").decode()
        newest = self._newest_talk.get((peer, sender, channel), (0, 0))
        sim.checked("I14")
        if (life, number) <= newest:
            sim.violate("I14", f"{where}: message {(life, number)} again, {newest} was delivered")
        self._newest_talk[peer, sender, channel] = (life, number)

    def _deliver_datagram(self, effect: m.DeliverDatagram) -> None:
        life, number = _BEAT_TAG.unpack_from(effect.body)
        sender = effect.body[_BEAT_TAG.size :].decode()
        newest = self._newest_beat.get((effect.peer, sender), (0, 0))
        self._sim.checked("I16")
        if (life, number) <= newest:
            self._sim.violate("I16", f"{self._name}: datagram {(life, number)} of {sender} after {newest}")
        self._newest_beat[effect.peer, sender] = (life, number)
