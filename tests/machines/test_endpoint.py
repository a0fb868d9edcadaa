"""Two and more endpoint machines in a small world of virtual time."""

from __future__ import annotations

from ha_core.machines import messages as m
from tests.machines.endpoint_world import World


def test_two_endpoints_agree_on_one_session_over_both_links() -> None:
    world = World()
    a, b = world.start("h1"), world.start("h2")

    world.meet(a, b)
    world.run(500)

    (up_a,), (up_b,) = a.of(m.SessionUp), b.of(m.SessionUp)
    assert up_a.session == up_b.session
    assert set(a.path_states().values()) == set(b.path_states().values()) == {m.PathState.UP}
    assert len(a.wires) == len(b.wires) == 2


def test_messages_arrive_once_and_in_order_in_both_directions() -> None:
    world = World()
    a, b = world.start("h1"), world.start("h2")
    world.meet(a, b)
    world.run(100)

    there = [b"%d" % n for n in range(10_000)]
    back = [b"x%d" % n for n in range(3_000)]
    a.send(b, *there)
    b.send(a, *back)
    world.run(200)

    assert b.delivered["c"] == there
    assert a.delivered["c"] == back
