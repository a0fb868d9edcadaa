"""Session channels for applications: exactly once and in order while both processes live, and told when one did not.

What many tasks send in one tick of the scheduler is one run for the endpoint: a send costs an append to a list.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

import trio

from ha_core.errors import HAError, LocalProtocolError, NodeFailedError, SessionResetError
from ha_core.ids import ChannelName, NodeId, SessionId
from ha_core.machines.contract import Event
from ha_core.machines.messages import Consumed, DeliverRun, Priority, SendRun
from ha_core.machines.session import MAX_CHANNEL_NAME, MAX_CHANNELS
from ha_core.machines.wire import MAX_MESSAGE_BYTES

GATHER_COUNT: Final = 4096
GATHER_BYTES: Final = 512 << 10
"""What is gathered before the endpoint has taken it; beyond that a send waits."""
_PREFIX: Final = "app."
"""Before the names of applications' channels on the wire, so that they never meet ours."""
CHANNELS: Final = MAX_CHANNELS - 16
"""Applications' channels to one peer in the life of a session; the rest is for ours."""


class SessionChannel:
    """One end of a session channel to a peer; made by ``Node.open_session``."""

    def __init__(self, sessions: Sessions, to: NodeId, name: ChannelName, priority: Priority, redundant: bool) -> None:
        self._sessions = sessions
        self._to = to
        self._name = name
        self._priority = priority
        self._redundant = redundant
        self._bodies: list[bytes] = []
        self._byte_count = 0
        self._room = trio.Event()
        self._runs: deque[tuple[DeliverRun, SessionId | None] | None] = deque()
        """What arrived, each with its session; None where one ended."""
        self._arrived = trio.Event()
        self._reset = ""

    def send_nowait(self, body: bytes) -> None:
        """Queue ``body``; never waits.

        Raises:
            trio.WouldBlock: there is no session or no room now.
            SessionResetError: the peer restarted; what was sent before was delivered once or not at all. Said once.
            LocalProtocolError: ``body`` is not bytes, or more than 8 MiB.
        """
        if type(body) is not bytes or len(body) > MAX_MESSAGE_BYTES:
            raise LocalProtocolError(f"session channel to {self._to}: a message is bytes, at most {MAX_MESSAGE_BYTES} of them")
        if self._reset:
            self._raise_reset()
        if (
            self._byte_count >= GATHER_BYTES
            or len(self._bodies) >= GATHER_COUNT
            or not self._sessions.has_room(self._to, self._name)
        ):
            raise trio.WouldBlock
        if not self._bodies:
            self._sessions.gather(self)
        self._bodies.append(body)
        self._byte_count += len(body)

    async def send(self, body: bytes) -> None:
        """Queue ``body``, once there is a session and room; for what it raises see ``send_nowait``."""
        await trio.lowlevel.checkpoint()
        while True:
            try:
                self.send_nowait(body)
            except trio.WouldBlock:
                self._sessions.check()
            else:
                self._sessions.expect_more()
                return
            await self._room.wait()

    async def receive(self) -> Sequence[bytes]:
        """All messages that are there, at least one; taking them gives the sender new credit.

        Raises:
            SessionResetError: the peer restarted: what comes next is of a new session. Said once.
        """
        await trio.lowlevel.checkpoint()
        while not self._runs:
            self._sessions.check()
            await self._arrived.wait()
        first = self._runs[0]
        if first is None:
            self._raise_reset()
        self._runs.popleft()
        run, session = first
        self._sessions.consumed(run, session)
        return run.bodies

    def _raise_reset(self) -> NoReturn:
        reason, self._reset = self._reset, ""
        if self._runs and self._runs[0] is None:
            self._runs.popleft()
        raise SessionResetError(f"the session with {self._to} is over: {reason or 'it restarted'}")

    # -- for Sessions --

    @property
    def key(self) -> tuple[NodeId, ChannelName]:
        return self._to, self._name

    def take(self) -> SendRun:
        bodies, self._bodies = self._bodies, []
        self._byte_count = 0
        self.wake()
        return SendRun(self._to, self._name, bodies, self._priority, self._redundant)

    def take_unread(self, session: SessionId | None) -> list[DeliverRun]:
        """What arrived in this session and was never received."""
        runs, self._runs = self._runs, deque()
        return [item[0] for item in runs if item is not None and item[1] == session]

    def put(self, run: DeliverRun, session: SessionId | None) -> None:
        self._runs.append((run, session))
        self._arrived.set()
        self._arrived = trio.Event()

    def reset(self, reason: str) -> None:
        """What is gathered goes with the session, what was received stays; then the application is told (I15)."""
        self._bodies = []
        self._byte_count = 0
        self._reset = reason
        if not (self._runs and self._runs[-1] is None):
            self._runs.append(None)
        self.wake()

    def wake(self) -> None:
        self._room.set()
        self._room = trio.Event()
        if self._runs or self._sessions.failure is not None:
            self._arrived.set()
            self._arrived = trio.Event()


class Sessions:
    """All session channels that applications opened, and runs that came before their channel was opened."""

    def __init__(
        self, post: Callable[..., None], has_room: Callable[[NodeId, ChannelName], bool]
    ) -> None:  # fmt: skip
        self._post = post
        self._has_room = has_room
        self._live: dict[NodeId, SessionId] = {}
        self._channels: dict[tuple[NodeId, ChannelName], SessionChannel] = {}
        self._early: dict[tuple[NodeId, ChannelName], list[DeliverRun]] = {}
        """Bounded by the credit that nobody renews."""
        self._gathered: dict[SessionChannel, None] = {}
        self._names: dict[NodeId, set[ChannelName]] = {}
        """Channels that were opened since the session with a peer began: the endpoint keeps a handle of each."""
        self.failure: HAError | None = None

    def open(self, to: NodeId, channel: str, priority: Priority, redundant: bool) -> SessionChannel:
        name = ChannelName(_PREFIX + channel)
        if (to, name) in self._channels:
            raise LocalProtocolError(f"session channel {channel!r} to {to} is open already")
        names = self._names.setdefault(to, set())
        if len(name) > MAX_CHANNEL_NAME or not name.isprintable() or (name not in names and len(names) >= CHANNELS):
            raise LocalProtocolError(
                f"session channel {channel[:40]!r} to {to}: expected at most {MAX_CHANNEL_NAME - len(_PREFIX)} printable "
                f"characters, and at most {CHANNELS} names to a peer"
            )
        names.add(name)
        one = self._channels[to, name] = SessionChannel(self, to, name, priority, redundant)
        for run in self._early.pop((to, name), []):
            one.put(run, self._live.get(to))
        return one

    def close(self, channel: SessionChannel) -> None:
        """What was sent goes out, what was not read waits for the next who opens the channel."""
        key = channel.key
        del self._channels[key]
        if channel in self._gathered:
            del self._gathered[channel]
            self._post(channel.take())
        session = self._live.get(key[0])
        if session is None:
            self._names[key[0]].discard(key[1])
        elif unread := channel.take_unread(session):
            self._early[key] = unread

    def collect(self) -> list[Event]:
        """What was gathered since the last feeding, a run a channel."""
        gathered, self._gathered = self._gathered, {}
        return [channel.take() for channel in gathered]

    # -- for channels --

    def check(self) -> None:
        if self.failure is not None:
            raise NodeFailedError(str(self.failure)) from self.failure

    def has_room(self, to: NodeId, name: ChannelName) -> bool:
        return to in self._live and self.failure is None and self._has_room(to, name)

    def gather(self, channel: SessionChannel) -> None:
        self._gathered[channel] = None
        self._post()

    def expect_more(self) -> None:
        """A task sends one message after the other: what follows at once shares the feeding."""
        self._post()

    def consumed(self, run: DeliverRun, session: SessionId | None) -> None:
        if session is not None and session == self._live.get(run.peer):
            self._post(Consumed(run.peer, run.channel, len(run.bodies), sum(map(len, run.bodies)), session))

    # -- what the machine says --

    def up(self, peer: NodeId, session: SessionId) -> None:
        self._live[peer] = session
        self._wake(peer)

    def down(self, peer: NodeId, reason: str) -> None:
        if self._live.pop(peer, None) is None:
            return
        self._names[peer] = {name for to, name in self._channels if to == peer}
        for key in [key for key in self._early if key[0] == peer]:
            del self._early[key]
        for (to, _), channel in self._channels.items():
            if to == peer:
                self._gathered.pop(channel, None)
                channel.reset(reason)

    def deliver(self, run: DeliverRun) -> None:
        channel = self._channels.get((run.peer, run.channel))
        if channel is None:
            self._early.setdefault((run.peer, run.channel), []).append(run)
        else:
            channel.put(run, self._live.get(run.peer))

    def room(self, peer: NodeId, name: ChannelName) -> None:
        channel = self._channels.get((peer, name))
        if channel is not None:
            channel.wake()

    def fail(self, error: HAError) -> None:
        self.failure = error
        for channel in self._channels.values():
            channel.wake()

    def _wake(self, peer: NodeId) -> None:
        for (to, _), channel in self._channels.items():
            if to == peer:
                channel.wake()
