"""What is meant for a session never reaches the next one, however a parent machine orders a batch (corpus: messages 11, 54, 108)."""

from __future__ import annotations

from ha_core.ids import Boot, ChannelName, NodeId, SessionId, StoreId
from ha_core.machines import messages as m
from ha_core.machines.durable import DurableMachine
from ha_core.machines.durable_wire import Report, encode_report
from tests.machines.endpoint_world import Process, World

TALK = ChannelName("talk")


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
