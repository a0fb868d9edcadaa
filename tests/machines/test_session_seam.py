"""What is meant for a session never reaches the next one, however a parent machine orders a batch (corpus: messages 11, 54, 108)."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from ha_core.config import LAN
from ha_core.guard.renewal import RenewalCodec
from ha_core.ids import Boot, ChannelName, HostName, NodeId, ReplicaId, SessionId, StoreId
from ha_core.machines import messages as m
from ha_core.machines.aam import AamMachine
from ha_core.machines.contract import Event
from ha_core.machines.database import DatabaseMachine
from ha_core.machines.database_client import DatabaseClientMachine
from ha_core.machines.database_events import DATABASE, Arrived, PeerDown, PeerUp, Send
from ha_core.machines.durable import DurableMachine
from ha_core.machines.durable_wire import Report, encode_report
from ha_core.machines.failover.records import Host
from ha_core.machines.host import INTRODUCTION, HostMachine, Introduced
from ha_core.machines.node import ChildMachine
from tests.machines.endpoint_world import Process, World

TALK = ChannelName("talk")
PEER = NodeId("b@h2.example")


def joined_twice() -> tuple[World, Process, Process, SessionId]:
    """Two nodes, of which the second has restarted; and the id of their first session."""
    world = World()
    a, b = world.start("h1"), world.start("h2")
    world.meet(a, b)
    world.run(500)
    (first,) = a.of(m.SessionUp)
    assert isinstance(first, m.SessionUp)
    world.kill(b)
    b = world.restart(b)
    world.meet(a, b)
    world.run(2000)
    assert len(a.of(m.SessionUp)) == 2
    return world, a, b, first.session


def test_run_for_the_session_before_is_dropped_and_one_for_the_present_is_delivered() -> None:
    world, a, b, old = joined_twice()
    present = a.of(m.SessionUp)[-1]
    assert isinstance(present, m.SessionUp)

    a.post(m.SendRun(b.node, TALK, [b"old"], session=old), m.SendRun(b.node, TALK, [b"new"], session=present.session))
    world.run(500)

    delivered = [body for run in b.of(m.DeliverRun) if isinstance(run, m.DeliverRun) for body in run.bodies]
    assert delivered == [b"new"]


def test_consumption_of_the_session_before_grants_nothing_in_the_present_one() -> None:
    world, a, b, old = joined_twice()

    a.post(m.Consumed(b.node, TALK, 1000, 1000, session=old))
    world.run(100)

    assert a.machine.session_with(b.node) is not None


def test_durable_machine_names_the_session_of_all_that_it_sends_and_consumes() -> None:
    machine = DurableMachine(outgoing=[], incoming=[])
    peer, session = NodeId("b@h2.example"), SessionId(b"s" * 16)

    machine.receive([m.SessionUp(peer, session, StoreId(bytes(16)), Boot(1, 1))], 0)
    machine.receive([m.DeliverRun(peer, ChannelName("ha.durable-reports"), 1, [encode_report(Report(True, []))])], 0)
    effects = machine.take_effects()

    named = [effect.session for effect in effects if isinstance(effect, m.SendRun | m.Consumed)]
    assert named == [session, session]


def client() -> DatabaseClientMachine:
    return DatabaseClientMachine(NodeId("c@h3.example"), [PEER], retry_ns=1, resend_ns=1)


def replica() -> DatabaseMachine:
    return DatabaseMachine(node=NodeId("r@h3.example"), replica=ReplicaId(bytes(16)), profile=LAN, rng=random.Random(1))


def host() -> HostMachine:
    record = Host(HostName("h3.example"), (("a", "127.0.0.1:7400"),), 1000, 1000)
    aam = AamMachine(
        node=NodeId("aam@h3.example"), host=record, database=replica(), codec=RenewalCodec("c", bytes(32)), profile=LAN
    )
    return HostMachine(
        node=NodeId("aam@h3.example"), replica=ReplicaId(bytes(16)), addresses={}, aam=aam, primaries={}
    )  # fmt: skip


ARRIVED = Arrived(PEER, DATABASE, [b"?"])
INTRODUCED = Introduced(m.DeliverRun(PEER, INTRODUCTION, 1, [b"?"]))


@pytest.mark.parametrize(
    ("build", "arrived"),
    [(client, ARRIVED), (replica, ARRIVED), (host, ARRIVED), (host, INTRODUCED)],
    ids=["client", "replica", "host", "introduction"],
)
def test_what_is_consumed_belongs_to_the_session_that_delivered_it(build: Callable[[], ChildMachine], arrived: Event) -> None:
    """Its end, and the beginning of the next, may be in the same batch: the next one delivered nothing."""
    machine = build()
    old, new = SessionId(b"old"), SessionId(b"new")

    machine.receive([PeerUp(PEER, old), arrived, PeerDown(PEER), PeerUp(PEER, new)], 0)

    events = [effect.event if isinstance(effect, Send) else effect for effect in machine.take_effects()]
    assert [event.session for event in events if isinstance(event, m.Consumed)] == [old]
