"""The database of a node with a replica: Raft, the key-value state machine, and requests from this node and from others.

Way of a write: DatabaseRequest -> DatabaseClient (identity) -> DatabaseServer here, or the leader's over the channel "database"
-> Propose -> Raft -> Apply -> KeyValue -> reply. Reads are served by this replica after a quorum round (ReadIndex).

Everything between the children is synchronous: one ``receive`` carries a batch through all of them, so that what came together
is appended together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from ha_core.config import Profile, ns
from ha_core.errors import DecodeError
from ha_core.ids import ChannelName, NodeId, ReplicaId, SessionId
from ha_core.machines.contract import CheckpointDue, Effect, Event, Rng
from ha_core.machines.database_events import (
    DATABASE,
    RAFT,
    RAFT_SNAPSHOT,
    Applied,
    Arrived,
    CloseWatch,
    DatabaseOutcome,
    DatabaseRequest,
    DatagramArrived,
    LeaderChanged,
    Leading,
    OpenWatch,
    PeerDown,
    PeerUp,
    Send,
    WatchClosed,
    WatchEvents,
    WatchTaken,
)
from ha_core.machines.database_requests import DatabaseClient, consumed, send_requests
from ha_core.machines.database_server import DatabaseServer, Origin
from ha_core.machines.database_watches import ServedWatches
from ha_core.machines.database_wire import (
    Replies,
    Requests,
    WatchClose,
    WatchDeliver,
    WatchEnd,
    WatchOpen,
    WatchTake,
    decode_message,
    encode_replies,
    encode_watch,
)
from ha_core.machines.keyvalue.machine import KeyValue
from ha_core.machines.keyvalue.transaction import Procedure
from ha_core.machines.messages import Priority, SendDatagram, SendRun
from ha_core.machines.raft.configuration import Configuration
from ha_core.machines.raft.raft import Raft
from ha_core.machines.raft.types import (
    Appended,
    Apply,
    Checkpointed,
    ConfigurationChanged,
    Dropped,
    Entry,
    Lane,
    PeerReady,
    PeerReset,
    RaftReceived,
    ReadFailed,
    ReadReady,
    Recovered,
    Restore,
    RoleChanged,
    SendMessage,
)

CHECKPOINT_FACTOR = 4
"""A checkpoint is due once the log since the last one is this many times its size ..."""
CHECKPOINT_MIN_BYTES = 8 << 20
"""... and at least this long."""
BOOKMARK_NS = 5_000_000_000
DEFER_BYTES = 4 << 10
"""A follower applies more than this only after its answers have left."""


@attrs.frozen
class _Peer:
    session: SessionId | None
    life: int


class DatabaseMachine:
    """A machine by the contract; ``state`` may be read by the parent between its steps."""

    def __init__(
        self,
        *,
        node: NodeId,
        replica: ReplicaId,
        profile: Profile,
        rng: Rng,
        recovered: Recovered | None = None,
        bootstrap: Configuration | None = None,
        procedures: Mapping[str, Procedure] | None = None,
        cluster: str = "",
        checkpoint_min_bytes: int = CHECKPOINT_MIN_BYTES,
        mark: bytes = b"",
    ) -> None:
        """``recovered``: what the record store held. ``bootstrap``: the first configuration, read only while that is empty.
        ``mark``: names this process life in the store; checkpoints keep it.

        Raises:
            CorruptRecordError: the store's checkpoint or a record is damaged.
        """
        self.state = KeyValue(procedures)
        self.configuration: Configuration | None = None
        self._node = node
        retry_ns = ns(profile.prevote_retry_min_s)
        self._client = DatabaseClient(node, replica=True, retry_ns=retry_ns, resend_ns=ns(profile.election_max_s))
        self._server = DatabaseServer(node, self.state, retry_ns)
        self._watches = ServedWatches(self.state)
        self._raft = Raft(
            node=node, replica=replica, profile=profile, rng=rng, recovered=recovered, bootstrap=bootstrap, cluster=cluster,
            mark=mark,
        )  # fmt: skip
        self._raft_events: list[Event] = []
        self._effects: list[Effect] = []
        self._up: dict[NodeId, _Peer] = {}
        self._lives = 0
        self._known: dict[NodeId, None] = {}
        self._announced: tuple[NodeId | None, int] = (None, 0)
        self._checkpoint_min_bytes = checkpoint_min_bytes
        self._checkpoint_bytes = 0
        self._log_bytes = 0
        self._bookmark_ns: int | None = None
        self._watch_retry_ns: int | None = None
        self._retry_ns = retry_ns
        self._deferred: list[Entry] = []
        self._deferred_ns: int | None = None
        """When entries that nobody here waits for are applied: once the effects of the step that committed them are out."""
        self._timer_ns: int | None = None
        self._refused_count = 0
        # What the store held is there before the first event: the checkpoint's state, the members.
        self._carry_out(self._raft.take_effects(), 0)
        self._apply_deferred(0)
        self._note_timer()

    # -- the contract --

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        client, watches = self._client, self._watches
        for event in events:
            match event:
                case DatabaseRequest():
                    client.request(event, now_ns)
                case Arrived(peer, channel, _):
                    self._arrived(event, channel, now_ns)
                case DatagramArrived(peer, body):
                    self._raft_events.append(RaftReceived(peer, body))
                case PeerUp(peer, session):
                    self._lives += 1
                    self._up[peer] = _Peer(session, self._lives)
                    self._raft_events.append(PeerReady(peer))
                    client.peer_up(peer, now_ns)
                case PeerDown(peer):
                    self._up.pop(peer, None)
                    self._raft_events.append(PeerReset(peer))
                    client.peer_down(peer, now_ns)
                    self._server.forget(peer)
                    watches.forget(peer)
                case OpenWatch(watch, prefix, after):
                    watches.open((None, watch), prefix, after)
                case WatchTaken(watch, count):
                    watches.taken((None, watch), count)
                case CloseWatch(watch):
                    watches.close((None, watch))
                case CheckpointDue():
                    self._checkpoint()
                case _:
                    self._raft_events.append(event)
        self._settle(now_ns)

    def handle_timer(self, now_ns: int) -> None:
        if self._deferred_ns is not None and now_ns >= self._deferred_ns:
            self._apply_deferred(now_ns)
        for child in (self._client, self._server):
            timer = child.next_timer()
            if timer is not None and timer <= now_ns:
                child.handle_timer(now_ns)
        if self._bookmark_ns is not None and now_ns >= self._bookmark_ns:
            self._bookmark_ns = None
            self._deliver(self._watches.bookmarks())
        if self._watch_retry_ns is not None and now_ns >= self._watch_retry_ns:
            self._watch_retry_ns = None
            self._watches.wants_round = True
        timer = self._raft.next_timer()
        if timer is not None and timer <= now_ns:
            self._raft.handle_timer(now_ns)
        self._settle(now_ns)

    def next_timer(self) -> int | None:
        return self._timer_ns

    def _note_timer(self) -> None:
        """Asked for several times a step, and changed only within one."""
        earliest = self._raft.next_timer()
        for time in (
            self._client.next_timer(), self._server.next_timer(), self._bookmark_ns, self._watch_retry_ns, self._deferred_ns,
        ):  # fmt: skip
            if time is not None and (earliest is None or time < earliest):
                earliest = time
        self._timer_ns = earliest

    def take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def persisted(self, number: int, now_ns: int) -> None:
        self._raft.persisted(number, now_ns)
        self._settle(now_ns)

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        self._raft.persist_failed(number, error, now_ns)
        self._settle(now_ns)

    # -- for the parent --

    @property
    def leader(self) -> NodeId | None:
        return self._server.leader

    @property
    def term(self) -> int:
        return self._server.term

    @property
    def is_leading(self) -> bool:
        """This replica leads and has applied its own first entry."""
        return self._server.ready

    @property
    def raft(self) -> Raft:
        """For checkers and status."""
        return self._raft

    # -- the network --

    def _arrived(self, event: Arrived, channel: ChannelName, now_ns: int) -> None:
        if channel == DATABASE:
            for body in event.bodies:
                self._message(event.peer, body, now_ns)
        else:
            self._raft_events.extend([RaftReceived(event.peer, body) for body in event.bodies])
        known = self._up.get(event.peer)
        self._effects.append(consumed(event.peer, None if known is None else known.session, event))

    def _message(self, peer: NodeId, body: bytes, now_ns: int) -> None:
        try:
            message = decode_message(body)
        except DecodeError:
            self._refused_count += 1
            return
        server, watches = self._server, self._watches
        origin = self._origin(peer)
        match message:
            case Requests(requests):
                for number, request in requests:
                    server.submit(origin, number, request, now_ns)
            case Replies(replies):
                for number, outcome in replies:
                    self._client.replied(peer, number, outcome, now_ns)
            case WatchOpen(watch, prefix, after):
                watches.open((origin, watch), prefix, after)
            case WatchTake(watch, count):
                watches.taken((origin, watch), count)
            case WatchClose(watch):
                watches.close((origin, watch))

    def _origin(self, peer: NodeId) -> Origin:
        known = self._up.get(peer)
        return peer, 0 if known is None else known.life

    def _send_run(self, to: NodeId, channel: ChannelName, bodies: Sequence[bytes], priority: Priority) -> None:
        session = self._up[to].session
        self._effects.append(Send(SendRun(to, channel, bodies, priority, session=session)))

    # -- between the children --

    def _settle(self, now_ns: int) -> None:
        """Carry everything on until nothing moves any more."""
        server, raft = self._server, self._raft
        while True:
            if server.answers:
                self._answer(now_ns)
            if self._client.out:
                self._route(now_ns)
                continue
            if self._watches.wants_round:
                server.begin_watches(self._watches.take_opening())
            server.flush()
            events = self._raft_events
            if server.raft_events:
                events = events + server.raft_events
                server.raft_events = []
            self._raft_events = []
            if events:
                raft.receive(events, now_ns)
            effects = raft.take_effects()
            if effects:
                self._carry_out(effects, now_ns)
            elif not events and not server.answers:
                break
        self._serve_watches(now_ns)
        if self._client.effects:
            self._effects.extend(self._client.effects)
            self._client.effects = []
        self._note_timer()

    def _route(self, now_ns: int) -> None:
        """The client's requests to the server here or to other nodes'."""
        for target, requests in self._client.take_out().items():
            if target == self._node:
                for number, request in requests:
                    self._server.submit(None, number, request, now_ns)
            else:
                self._effects.append(send_requests(target, self._up[target].session, requests))

    def _answer(self, now_ns: int) -> None:
        answers, self._server.answers = self._server.answers, []
        remote: dict[tuple[NodeId, int], list[tuple[int, DatabaseOutcome]]] = {}
        for origin, number, outcome in answers:
            if origin is None:
                self._client.replied(self._node, number, outcome, now_ns)
            else:
                remote.setdefault(origin, []).append((number, outcome))
        for origin, replies in remote.items():
            if self._is_present(origin):
                self._send_run(origin[0], DATABASE, encode_replies(replies), Priority.URGENT)

    def _is_present(self, origin: tuple[NodeId, int]) -> bool:
        """It still is the session in which it asked; in a new one our answer would be taken for another's."""
        known = self._up.get(origin[0])
        return known is not None and known.life == origin[1]

    def _carry_out(self, effects: Sequence[Effect], now_ns: int) -> None:
        runs: dict[tuple[NodeId, Lane], list[bytes]] = {}
        for effect in effects:
            match effect:
                case SendMessage(to, body, lane):
                    if lane is Lane.DATAGRAM:
                        self._effects.append(Send(SendDatagram(to, RAFT, body)))
                    elif to in self._up:
                        runs.setdefault((to, lane), []).append(body)
                case Apply(entries):
                    self._deferred.extend(entries)
                    if self._server.leading or sum([len(entry.data) for entry in entries]) < DEFER_BYTES:
                        self._apply_deferred(now_ns)
                    else:
                        self._deferred_ns = now_ns + 1
                case Appended():
                    self._server.appended(effect)
                case Dropped():
                    self._server.dropped(effect, now_ns)
                case ReadReady():
                    self._apply_deferred(now_ns)
                    self._watches.opened(self._server.read_ready(effect))
                case ReadFailed():
                    if self._server.read_failed(effect) and self._watch_retry_ns is None:
                        self._watch_retry_ns = now_ns + self._retry_ns
                case RoleChanged():
                    self._apply_deferred(now_ns)
                    self._role_changed(effect, now_ns)
                case Restore(_, _, state):
                    self._apply_deferred(now_ns)
                    self._restore(state)
                case ConfigurationChanged(configuration):
                    self._configured(configuration)
                    self._effects.append(effect)
                case _:
                    self._effects.append(effect)
        for (to, lane), bodies in runs.items():
            channel, priority = (RAFT, Priority.URGENT) if lane is Lane.APPEND else (RAFT_SNAPSHOT, Priority.BACKGROUND)
            self._send_run(to, channel, bodies, priority)

    def _apply_deferred(self, now_ns: int) -> None:
        self._deferred_ns = None
        if not self._deferred:
            return
        entries, self._deferred = self._deferred, []
        if self._server.apply(entries, now_ns):
            self._effects.append(Leading(self._server.term, self._server.counted_from_ns))
        self._log_bytes += sum([len(entry.data) for entry in entries])
        self._after_apply()

    def _restore(self, state: bytes) -> None:
        self.state.restore(state)
        self._checkpoint_bytes = len(state)
        self._log_bytes = 0
        self._effects.append(Applied(self.state.index, self.state.revision, (), True))

    def _after_apply(self) -> None:
        state = self.state
        changes = state.take_changes()
        self._effects.append(Applied(state.index, state.revision, changes))
        if self._log_bytes >= max(self._checkpoint_min_bytes, CHECKPOINT_FACTOR * self._checkpoint_bytes):
            self._checkpoint()

    def _checkpoint(self) -> None:
        snapshot = self.state.snapshot()
        self._checkpoint_bytes = len(snapshot)
        self._log_bytes = 0
        self._raft_events.append(Checkpointed(self.state.index, snapshot))

    def _role_changed(self, effect: RoleChanged, now_ns: int) -> None:
        self._server.role_changed(effect, now_ns)
        self._client.leader_changed(effect.leader, now_ns)
        if self._announced != (effect.leader, effect.term):
            self._announced = (effect.leader, effect.term)
            self._effects.append(LeaderChanged(effect.leader, effect.term))

    def _configured(self, configuration: Configuration) -> None:
        """Raft takes new members for reachable; those without a session are not."""
        self.configuration = configuration
        for node in configuration.nodes:
            if node not in self._known and node not in self._up and node != self._node:
                self._raft_events.append(PeerReset(node))
        self._known = dict.fromkeys(configuration.nodes)

    # -- watches --

    def _serve_watches(self, now_ns: int) -> None:
        if len(self._watches):
            self._deliver(self._watches.run())
            if self._bookmark_ns is None:
                self._bookmark_ns = now_ns + BOOKMARK_NS

    def _deliver(self, messages: Sequence[tuple[Origin, WatchDeliver | WatchEnd]]) -> None:
        for origin, message in messages:
            if origin is not None:
                if self._is_present(origin):
                    self._send_run(origin[0], DATABASE, [encode_watch(message)], Priority.URGENT)
            elif isinstance(message, WatchDeliver):
                self._effects.append(WatchEvents(message.watch, message.revision, message.changes))
            else:
                self._effects.append(WatchClosed(message.watch, message.resume, message.compacted))
