"""The node's machine: what reaches which child, what reaches the shell, and that all settles in one step."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import pytest

from ha_core.errors import InvariantError
from ha_core.ids import Boot, ChannelName, NodeId, SessionId, StoreId
from ha_core.machines.contract import CheckpointDue, Effect, Event, Persist
from ha_core.machines.database_events import RAFT, DatabaseRequest, PeerUp, Range, Send
from ha_core.machines.durable import REPORTS_CHANNEL, RUNS_CHANNEL, DurableMachine
from ha_core.machines.durable_events import HandlerOpened, RunsCommitted
from ha_core.machines.messages import (
    Consumed,
    DeliverDatagram,
    DeliverRun,
    PathChanged,
    PathKey,
    PathState,
    RoomChanged,
    SendDatagram,
    SendRun,
    SessionDown,
    SessionUp,
    SetPeer,
)
from ha_core.machines.node import Child, NodeMachine, database_child, durable_child

PEER = NodeId("b@h2.example")
UP = SessionUp(PEER, SessionId(b"s"), StoreId(b"s" * 16), Boot(0, 1))


@attrs.define
class Script:
    """A machine that keeps what it is told and says what the test lays out: one list of effects each time it is asked."""

    say: list[list[Effect | Event]] = attrs.field(factory=list)
    told: list[Event | Effect] = attrs.field(factory=list)
    timer_ns: int | None = None
    fired: int = 0
    durable: int = 0
    failed: str = ""

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        self.told.extend(events)

    def handle_timer(self, now_ns: int) -> None:
        self.fired += 1

    def next_timer(self) -> int | None:
        return self.timer_ns

    def take_effects(self) -> list[Effect]:
        return self.say.pop(0) if self.say else []  # type: ignore[return-value]  # children may say events

    def persisted(self, number: int, now_ns: int) -> None:
        self.durable = number

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        self.failed = error


def build(*, endpoint: Script | None = None, database: Script | None = None) -> tuple[NodeMachine, Script, Script]:
    endpoint, database = endpoint or Script(), database or Script()
    durable = DurableMachine(outgoing=[], incoming=[])
    return NodeMachine(endpoint, [durable_child(durable), database_child(database)]), endpoint, database


def test_events_reach_their_owner_and_the_rest_the_endpoint() -> None:
    node, endpoint, database = build()
    request = DatabaseRequest(1, Range(b""))

    node.receive([SetPeer(PEER, {}), request, RunsCommitted([]), SendRun(PEER, ChannelName("app.x"), [b"1"])], 0)

    assert [type(event) for event in endpoint.told] == [SetPeer, SendRun]
    assert database.told == [request]


def test_session_reaches_all_children_and_the_shell() -> None:
    node, endpoint, database = build(endpoint=Script(say=[[UP]]))

    node.receive([], 0)

    assert [(type(event), event.peer) for event in database.told if isinstance(event, PeerUp)] == [(PeerUp, PEER)]
    assert [event.channel for event in endpoint.told if isinstance(event, SendRun)] == [REPORTS_CHANNEL]
    assert node.take_effects() == [UP]


def test_claimed_channels_stay_inside_and_others_go_to_the_shell() -> None:
    ours = DeliverRun(PEER, ChannelName("app.chat"), 1, [b"x"])
    topic = DeliverDatagram(PEER, ChannelName("app.beat"), b"x")
    path = PathChanged(PathKey(PEER, "a", "127.0.0.1:1"), PathState.UP, "")  # type: ignore[arg-type]
    said: list[Effect | Event] = [
        UP,
        DeliverRun(PEER, RAFT, 1, [b"append"]),
        DeliverDatagram(PEER, RAFT, b"vote"),
        DeliverRun(PEER, RUNS_CHANNEL, 1, [b"\xc1"]),
        RoomChanged(PEER, RUNS_CHANNEL),
        ours,
        topic,
        path,
    ]
    node, endpoint, database = build(endpoint=Script(say=[said]))

    node.receive([], 0)

    assert [type(event).__name__ for event in database.told] == ["PeerUp", "Arrived", "DatagramArrived"]
    assert [event.channel for event in endpoint.told if isinstance(event, Consumed)] == [RUNS_CHANNEL]
    effects = node.take_effects()
    assert [effect for effect in effects if effect in (ours, topic, path, UP)] == [UP, ours, topic, path]
    assert [type(effect).__name__ for effect in effects if effect not in (ours, topic, path, UP)] == ["PeerRefused"]


def test_what_children_send_reaches_the_endpoint_in_the_same_step() -> None:
    vote = SendDatagram(PEER, RAFT, b"vote")
    node, endpoint, database = build(database=Script(say=[[Send(vote), Persist(1, b"term")]]))

    node.receive([], 0)

    assert endpoint.told == [vote]
    assert node.take_effects() == [Persist(1, b"term")]


def test_writes_are_confirmed_to_the_child_that_persists() -> None:
    node, _, database = build()

    node.persisted(3, 0)
    node.persist_failed(4, "disk", 0)

    assert (database.durable, database.failed) == (3, "disk")


def test_a_store_that_wants_a_checkpoint_is_heard_by_the_child_that_persists() -> None:
    node, endpoint, database = build()

    node.receive([CheckpointDue()], 0)

    assert database.told == [CheckpointDue()]
    assert endpoint.told == []


def test_earliest_timer_is_the_nodes_and_only_due_ones_fire() -> None:
    endpoint, database = Script(timer_ns=50), Script(timer_ns=20)
    node, _, _ = build(endpoint=endpoint, database=database)

    assert node.next_timer() == 20
    node.handle_timer(30)
    assert (endpoint.fired, database.fired) == (0, 1)
    node.handle_timer(60)
    assert (endpoint.fired, database.fired) == (1, 2)


def test_old_session_down_is_told_before_the_new_one_up() -> None:
    down = SessionDown(PEER, SessionId(b"s"), "restarted")
    node, endpoint, database = build(endpoint=Script(say=[[UP, down, UP]]))

    node.receive([HandlerOpened(ChannelName("c"), 1)], 0)

    assert [type(event).__name__ for event in database.told] == ["PeerUp", "PeerDown", "PeerUp"]
    assert [type(effect).__name__ for effect in node.take_effects()] == ["SessionUp", "SessionDown", "SessionUp"]


@pytest.mark.parametrize("what", ["event", "channel", "store"])
def test_nothing_has_two_owners(what: str) -> None:
    def nothing(effect: Effect) -> Event | None:
        return None

    channels = (RUNS_CHANNEL,) if what == "channel" else ()
    handles = (HandlerOpened,) if what == "event" else ()
    other = Child(Script(), handles, nothing, channels, persists=True)
    children = [durable_child(DurableMachine(outgoing=[], incoming=[])), other]
    if what == "store":
        children.append(Child(Script(), (), nothing, (), persists=True))

    with pytest.raises(InvariantError, match="one owner|at most one"):
        NodeMachine(Script(), children)
