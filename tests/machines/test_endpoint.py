"""Two and more endpoint machines in a small world of virtual time: each test is one story."""

from __future__ import annotations

import random

import attrs
import pytest

from ha_core.config import LAN
from ha_core.errors import LocalProtocolError
from ha_core.ids import ChannelName, LinkName
from ha_core.machines import messages as m
from ha_core.machines import wire
from ha_core.machines.handshake import extend_boots_digest
from tests.machines.endpoint_world import LINKS, MS, Process, World, address, node_id

UP, SUSPECT, DOWN = m.PathState.UP, m.PathState.SUSPECT, m.PathState.DOWN


def joined(world: World) -> tuple[Process, Process]:
    a, b = world.start("h1"), world.start("h2")
    world.meet(a, b)
    assert world.run(500, until=lambda: set(a.path_states().values()) == set(b.path_states().values()) == {UP})
    world.run(500)
    return a, b


def active_link(process: Process, peer: Process) -> str:
    session = process.machine.session_with(peer.node)
    assert session is not None
    assert session.active is not None
    return session.active.link


def stream(world: World, a: Process, b: Process, ms: int, channel: str = "c", **options: object) -> list[bytes]:
    """One message each millisecond, from now on for so long."""
    bodies = [b"%s %d" % (channel.encode(), n) for n in range(ms)]
    for n, body in enumerate(bodies):
        world.at(world.now_ns + n * MS, lambda body=body: a.send(b, body, channel=channel, **options))  # type: ignore[misc]
    return bodies


def reset(world: World, process: Process, link: str) -> None:
    """Both ends of the process's connection on the link break; what was under way is lost."""
    wire = next(wire for wire, _ in process.wires.values() if wire.link == link)
    wire.open = False
    for end, number in wire.ends:
        end.wires.pop(number, None)
        end.post(m.Disconnected(number, "reset"))


def worst_gap_ms(process: Process) -> float:
    times = process.delivered_at
    return max(later - earlier for earlier, later in zip(times, times[1:], strict=False)) / MS


# -- sessions --


def test_two_endpoints_agree_on_one_session_over_both_links() -> None:
    world = World()
    a, b = joined(world)

    (up_a,), (up_b,) = a.of(m.SessionUp), b.of(m.SessionUp)

    assert up_a.session == up_b.session  # type: ignore[attr-defined]
    assert a.of(m.PeerReachable) == [m.PeerReachable(b.node, True)]


def test_of_two_connections_on_a_link_both_ends_keep_the_same_one() -> None:
    world = World()
    a, b = joined(world)

    kept_a = {wire for wire, _ in a.wires.values()}
    kept_b = {wire for wire, _ in b.wires.values()}

    assert len(kept_a) == 2
    assert kept_a == kept_b
    assert all(wire.ends[0][0] is a for wire in kept_a), "the lower node id dialled it"


def test_messages_arrive_once_and_in_order_in_both_directions() -> None:
    world = World()
    a, b = joined(world)
    there = [b"%d" % n for n in range(10_000)]
    back = [b"x%d" % n for n in range(3_000)]

    a.send(b, *there)
    b.send(a, *back)
    world.run(200)

    assert b.delivered["c"] == there
    assert a.delivered["c"] == back


def test_in_a_conversation_acknowledgements_go_with_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of their own after each ACK_DELAY_NS would be a fifth more system calls at both ends."""
    world = World()
    a, b = joined(world)
    kinds: list[set[int]] = []
    transmit = world.transmit

    def spy(process: Process, effect: m.Transmit) -> None:
        kinds.append({frame.kind for frame in wire.FrameDecoder().feed(effect.data)})
        transmit(process, effect)

    monkeypatch.setattr(world, "transmit", spy)
    stream(world, a, b, 400)
    stream(world, b, a, 400)
    world.run(400)

    assert sum(wire.FrameType.ACK in one and wire.FrameType.DATA in one for one in kinds) > 100
    assert sum(one == {wire.FrameType.ACK} for one in kinds) < 20


def test_streams_may_arrive_in_pieces_of_any_size() -> None:
    world = World()
    world.chunk = 7
    a, b = joined(world)
    bodies = [bytes(n) for n in range(300)]

    a.send(b, *bodies)
    world.run(200)

    assert b.delivered["c"] == bodies


def test_numbers_of_delivered_runs_have_no_gap() -> None:
    world = World()
    a, b = joined(world)

    for n in range(100):
        a.send(b, *[b"x"] * (n % 7), bytes(40_000))
    world.run(300)

    runs = [effect for effect in b.log if isinstance(effect, m.DeliverRun)]
    expected = 1
    for run in runs:
        assert run.first_seq == expected
        expected += len(run.bodies)
    assert expected == 1 + sum(n % 7 + 1 for n in range(100))


def test_a_message_of_8_mib_travels_in_fragments() -> None:
    world = World()
    a, b = joined(world)
    big = random.Random(1).randbytes(8 << 20)

    a.send(b, b"before", big, b"after")
    world.run(2_000)

    assert b.delivered["c"] == [b"before", big, b"after"]


def test_a_longer_message_is_refused_to_the_caller() -> None:
    world = World()
    a, b = joined(world)

    with pytest.raises(LocalProtocolError, match="at most 8388608 bytes"):
        a.send(b, bytes((8 << 20) + 1))


def test_a_restart_ends_the_old_session_before_the_new_one_and_delivers_nothing_twice() -> None:
    world = World()
    a, b = joined(world)
    first = [b"first %d" % n for n in range(500)]
    a.send(b, *first)
    world.run(1)

    world.kill(b)
    b2 = world.restart(b)
    world.meet(a, b2)
    world.run(1_000)
    second = [b"second %d" % n for n in range(10)]
    a.send(b2, *second)
    world.run(100)

    kinds = [type(e).__name__ for e in a.log if isinstance(e, m.SessionUp | m.SessionDown)]
    assert kinds == ["SessionUp", "SessionDown", "SessionUp"]
    up, down, again = (e for e in a.log if isinstance(e, m.SessionUp | m.SessionDown))
    assert up.session == down.session != again.session
    assert b2.delivered["c"] == second
    assert first[: len(b.delivered.get("c", []))] == b.delivered.get("c", [])


def test_a_restarted_peer_is_back_within_half_a_second() -> None:
    world = World()
    a, b = joined(world)

    world.kill(b)
    world.run(2_000)
    b2 = world.restart(b)
    began = world.now_ns
    world.know(b2, a)

    assert world.run(500, until=lambda: len(a.of(m.SessionUp)) == 2)
    assert world.now_ns - began < 100 * MS
    assert world.run(500, until=lambda: list(a.path_states().values()) == [UP, UP]), "a restart is no flap of the paths"


def test_a_forgotten_peer_gets_a_new_session_though_both_processes_live() -> None:
    world = World()
    a, b = joined(world)

    a.post(m.ForgetPeer(b.node))
    world.run(300)
    world.know(a, b)
    world.run(2_000)
    a.send(b, b"hello")
    world.run(100)

    assert [type(e).__name__ for e in b.log if isinstance(e, m.SessionUp | m.SessionDown)][-2:] == ["SessionDown", "SessionUp"]
    assert b.delivered["c"] == [b"hello"]
    sessions = [e.session for e in b.of(m.SessionUp)]  # type: ignore[attr-defined]
    assert len(set(sessions)) == len(sessions)


# -- flow control --


def test_without_consumption_the_sender_stops_at_its_credit_and_goes_on_after_it() -> None:
    world = World()
    a, b = joined(world)
    b.consume = False
    bodies = [bytes(1_000)] * 2_000

    a.send(b, *bodies)
    world.run(1_000)
    delivered = len(b.delivered["c"])
    assert 250 <= delivered <= 263, "256 KiB"
    assert not a.machine.has_room(b.node, ChannelName("c"))

    b.consume = True
    b.post(m.Consumed(a.node, ChannelName("c"), delivered, delivered * 1_000))
    world.run(1_000)

    assert b.delivered["c"] == bodies
    assert a.of(m.RoomChanged) == [m.RoomChanged(b.node, ChannelName("c"))]


def test_a_grant_that_a_cut_swallows_is_repeated_on_the_other_path() -> None:
    world = World()
    a, b = joined(world)
    b.consume = False
    bodies = [bytes(1_000)] * 600
    a.send(b, *bodies)
    world.run(100)

    world.cut(a, b, active_link(b, a))
    b.consume = True
    b.post(m.Consumed(a.node, ChannelName("c"), len(b.delivered["c"]), len(b.delivered["c"]) * 1_000))

    assert world.run(150, until=lambda: len(b.delivered["c"]) == 600)


def test_credit_counts_messages_too() -> None:
    world = World()
    a, b = joined(world)
    b.consume = False

    a.send(b, *[b""] * 5_000)
    world.run(300)

    assert len(b.delivered["c"]) == 2_048


def test_more_consumed_than_delivered_is_the_callers_fault() -> None:
    world = World()
    a, b = joined(world)
    b.consume = False
    a.send(b, b"x")
    world.run(10)

    with pytest.raises(LocalProtocolError, match="more was consumed than delivered"):
        b.post(m.Consumed(a.node, ChannelName("c"), 2, 1))


def test_urgent_messages_do_not_wait_behind_bulk() -> None:
    world = World()
    a, b = joined(world)
    a.post(
        m.SendRun(b.node, ChannelName("bulk"), [bytes(1_000)] * 4_000, m.Priority.BULK),
        m.SendRun(b.node, ChannelName("urgent"), [b"now"], m.Priority.URGENT),
    )
    world.run(500)

    order = [e.channel for e in b.log if isinstance(e, m.DeliverRun)]
    assert order[0] == "urgent"


def test_bulk_has_its_tenth_while_others_have_always_something_to_send() -> None:
    world = World()
    a, b = joined(world)
    world.byte_ns = 20
    counts = {"n": 0, "bulk": 0}
    for _ in range(150):
        for channel, priority in (("n", m.Priority.NORMAL), ("bulk", m.Priority.BULK)):
            if a.machine.has_room(b.node, ChannelName(channel)):
                a.send(b, *[bytes(1_000)] * 500, channel=channel, priority=priority)
        world.run(2)
    for effect in b.log:
        if isinstance(effect, m.DeliverRun):
            counts[effect.channel] += len(effect.bodies)

    assert counts["n"] / 15 < counts["bulk"] < counts["n"] / 5
    assert counts["n"] > 10_000


def test_urgent_messages_wait_for_no_more_than_what_is_unflushed_under_saturating_bulk() -> None:
    world = World()
    a, b = joined(world)
    world.byte_ns = 20
    a.post(m.SendRun(b.node, ChannelName("bulk"), [bytes(1_000)] * 8_000, m.Priority.BULK))
    world.run(50)
    sent = world.now_ns

    a.post(m.SendRun(b.node, ChannelName("urgent"), [b"now"], m.Priority.URGENT))
    assert world.run(100, until=lambda: "urgent" in b.delivered)

    assert (world.now_ns - sent) / MS < 4, "160 KiB at 50 MB/s"


# -- paths --


@pytest.mark.parametrize("one_way", [False, True])
def test_a_silent_cut_stalls_a_1_khz_stream_for_less_than_50_ms(one_way: bool) -> None:
    world = World()
    a, b = joined(world)
    bodies = stream(world, a, b, 600)

    world.run(200)
    link = active_link(a, b)
    world.cut(a, b, link, one_way=one_way)
    world.run(1_000)

    assert b.delivered["c"] == bodies
    assert worst_gap_ms(b) < 50
    assert a.path_states()[link] in (SUSPECT, DOWN)
    assert active_link(a, b) != link


def test_a_cut_of_the_answers_alone_is_seen_too() -> None:
    world = World()
    a, b = joined(world)
    bodies = stream(world, a, b, 600)

    world.run(200)
    link = active_link(a, b)
    world.cut(b, a, link, one_way=True)
    world.run(1_000)

    assert b.delivered["c"] == bodies
    assert a.path_states()[link] in (SUSPECT, DOWN)
    assert a.machine.session_with(b.node).channels()[0].segments == {}  # type: ignore[union-attr]


def test_a_lost_connection_moves_its_data_at_once() -> None:
    world = World()
    a, b = joined(world)
    bodies = stream(world, a, b, 400)
    world.run(200)

    reset(world, a, active_link(a, b))
    world.run(500)

    assert b.delivered["c"] == bodies
    assert worst_gap_ms(b) < 5


def test_redundant_messages_do_not_notice_a_cut() -> None:
    world = World()
    a, b = joined(world)
    bodies = stream(world, a, b, 600, redundant=True)

    world.run(200)
    world.cut(a, b, active_link(a, b))
    world.run(1_000)

    assert b.delivered["c"] == bodies
    assert worst_gap_ms(b) < 5


def test_a_healed_path_is_up_only_after_a_hold_down_and_gets_no_data_back() -> None:
    world = World()
    a, b = joined(world)
    stream(world, a, b, 10_000)
    world.run(200)
    link = active_link(a, b)
    world.cut(a, b, link)
    world.run(300)
    other = active_link(a, b)
    assert other != link

    world.heal()
    world.run(500)
    assert a.path_states()[link] is not UP
    world.run(2_000)

    assert a.path_states()[link] is UP
    assert active_link(a, b) == other


def test_flapping_is_held_down_longer_each_time() -> None:
    world = World()
    a, b = joined(world)
    held: list[float] = []
    for _ in range(4):
        link = "l1"
        world.cut(a, b, link)
        assert world.run(10_000, until=lambda: a.path_states()["l1"] in (SUSPECT, DOWN))
        world.heal()
        healed = world.now_ns
        assert world.run(60_000, until=lambda: a.path_states()["l1"] is UP)
        held.append((world.now_ns - healed) / MS)

    assert held[0] < held[1] < held[2] < held[3]
    assert held[3] > 7_000


def test_a_silent_peer_is_unreachable_after_a_slow_verdict_and_the_session_outlives_it() -> None:
    world = World()
    a, b = joined(world)
    for link in LINKS:
        world.cut(a, b, link)
    a.send(b, b"one")

    world.run(1_000)
    assert a.of(m.PeerReachable)[-1] == m.PeerReachable(b.node, True)
    world.run(1_500)
    assert a.of(m.PeerReachable)[-1] == m.PeerReachable(b.node, False)
    a.send(b, b"two")
    world.run(5_000)
    world.heal()
    world.run(20_000)

    assert b.delivered["c"] == [b"one", b"two"]
    assert len(a.of(m.SessionUp)) == 1
    assert a.of(m.SessionDown) == []
    assert a.of(m.PeerReachable)[-1] == m.PeerReachable(b.node, True)


def test_a_slow_peer_is_not_taken_for_a_broken_path() -> None:
    world = World()
    a, b = joined(world)
    bodies = stream(world, a, b, 3_000)
    changes = len(a.of(m.PathChanged)) + len(b.of(m.PathChanged))

    for n in range(10):
        world.at(world.now_ns + 250 * n * MS, lambda: world.freeze(b, 150))
    world.run(4_000)

    assert b.delivered["c"] == bodies
    assert len(a.of(m.PathChanged)) + len(b.of(m.PathChanged)) == changes


def test_our_own_lag_condemns_nobody() -> None:
    world = World()
    a, b = joined(world)
    bodies = stream(world, a, b, 3_000)
    changes = len(a.of(m.PathChanged))

    for n in range(5):
        world.at(world.now_ns + 500 * n * MS, lambda: world.freeze(a, 400))
    world.run(4_000)

    assert b.delivered["c"] == bodies
    assert len(a.of(m.PathChanged)) == changes


def test_a_stall_of_ours_longer_than_the_slow_verdict_condemns_nobody() -> None:
    world = World()
    world.profile = attrs.evolve(LAN, down_s=0.3)
    a = world.start("h1")
    world.profile = LAN
    b = world.start("h2")
    world.meet(a, b)
    world.run(1_000)
    bodies = stream(world, a, b, 1_000)
    world.run(500)
    changes = len(a.of(m.PathChanged))

    world.freeze(a, 800)
    world.run(2_000)

    assert b.delivered["c"] == bodies
    assert len(a.of(m.PathChanged)) == changes


def test_a_cut_is_seen_by_a_node_whose_own_loop_is_late_at_every_step() -> None:
    world = World()
    a, b = joined(world)
    c = world.start("h3")
    world.meet(a, c)
    world.run(1_000)
    stream(world, c, a, 1_000)
    link = active_link(a, b)

    def step() -> None:
        a.frozen = False
        a.post()
        a.frozen = True
        world.at(world.now_ns + 8 * MS, step)

    step()
    world.run(100)
    world.cut(a, b, link)
    a.send(b, b"x")
    world.run(400)

    assert b.delivered["c"] == [b"x"]
    doubted = {(key.peer, key.link) for key, state, _ in a.machine.paths() if state is not UP}
    assert doubted == {(b.node, link)}


def test_a_grant_that_a_reset_swallows_is_repeated_at_once() -> None:
    world = World()
    a, b = joined(world)
    b.consume = False
    a.send(b, *[bytes(1_000)] * 600)
    world.run(100)

    link = active_link(b, a)
    world.cut(b, a, link, one_way=True)
    b.consume = True
    b.post(m.Consumed(a.node, ChannelName("c"), len(b.delivered["c"]), len(b.delivered["c"]) * 1_000))
    reset(world, b, link)

    assert world.run(10, until=lambda: len(b.delivered["c"]) == 600)


@pytest.mark.parametrize("lost", LINKS)
def test_an_acknowledgement_that_a_reset_swallows_is_repeated(lost: LinkName) -> None:
    world = World()
    a, b = joined(world)
    a.send(b, b"the first one widens the window", redundant=True)
    world.run(50)

    world.cut(b, a, lost, one_way=True)
    a.send(b, b"to be acknowledged", redundant=True)
    world.run(2)
    reset(world, b, lost)
    world.run(20)

    session = a.machine.session_with(b.node)
    assert session is not None
    assert session.channels()[0].segments == {}


def test_idle_paths_are_probed_and_their_loss_is_seen() -> None:
    world = World()
    a, b = joined(world)

    world.cut(a, b, "l2")

    assert world.run(3_000, until=lambda: a.path_states()["l2"] in (SUSPECT, DOWN))
    assert a.path_states()["l1"] is UP


def test_dials_to_a_dead_peer_are_few_and_spread() -> None:
    world = World()
    a = world.start("h1")
    b = world.start("h2")
    world.kill(b)
    world.know(a, b)

    world.run(60_000)
    assert 10 < world.dials < 60

    world.dials = 0
    world.run(60_000)
    assert 8 < world.dials < 30


def test_without_permission_to_dial_we_wait_to_be_dialled() -> None:
    world = World()
    a, b = world.start("h1"), world.start("h2")
    world.know(a, b, dial=False)
    world.run(1_000)
    assert world.dials == 0

    world.know(b, a)
    world.run(1_000)
    a.send(b, b"hello")
    world.run(100)

    assert b.delivered["c"] == [b"hello"]


def test_a_changed_address_is_dialled_and_the_session_goes_on() -> None:
    world = World()
    a, b = world.start("h1"), world.start("h2")
    world.know(a, b)
    world.run(1_000)
    world.processes["moved"] = b

    a.post(m.SetPeer(b.node, {link: address("moved", link) for link in LINKS}))
    a.send(b, b"hello")
    world.run(1_000)

    assert len(a.of(m.SessionUp)) == 1
    assert b.delivered["c"] == [b"hello"]
    assert {key.remote for key, _, _ in a.machine.paths()} == {address("moved", link) for link in LINKS}


def test_a_withdrawn_link_is_closed() -> None:
    world = World()
    a, b = joined(world)

    for one, other in ((a, b), (b, a)):
        one.post(m.SetPeer(other.node, {LINKS[0]: address(other.name, LINKS[0])}))
    world.run(500)
    a.send(b, b"hello")
    world.run(100)

    assert a.path_states() == {"l1": UP}
    assert b.delivered["c"] == [b"hello"]


# -- refusals --


def refused(process: Process) -> list[tuple[str, str]]:
    return [(effect.code, effect.text) for effect in process.log if isinstance(effect, m.PeerRefused)]


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [({"key": b"x" * 32}, "key", "compare the key files"), ({"cluster": "other"}, "cluster", "belongs to cluster")],
)
def test_a_stranger_is_refused_with_one_line(options: dict[str, bytes], code: str, text: str) -> None:
    world = World()
    a, b = world.start("h1"), world.start("h2", **options)  # type: ignore[arg-type]

    world.meet(a, b)
    world.run(5_000)

    assert a.of(m.SessionUp) == b.of(m.SessionUp) == []
    assert {found for found, _ in refused(a)} == {found for found, _ in refused(b)} == {code}
    assert any(text in line for _, line in refused(a) + refused(b))
    assert len(refused(a)) <= 2, "not once for each dial"
    assert all("\n" not in line for _, line in refused(a) + refused(b))


def test_a_node_that_answers_at_anothers_address_is_refused() -> None:
    world = World()
    a, b, c = world.start("h1"), world.start("h2"), world.start("h3")

    world.know(a, b, at="h3")
    world.run(1_000)

    assert a.of(m.SessionUp) == []
    assert {code for code, _ in refused(a)} == {"peer"}
    assert {code for code, _ in refused(c)} == {"peer"}
    assert b.log == []


def test_a_node_that_dials_itself_is_told() -> None:
    world = World()
    a = world.start("h1")
    b = world.start("h2")

    world.know(a, b, at="h1")
    world.run(1_000)

    assert "self" in {code for code, _ in refused(a)}


def test_unknown_nodes_are_refused_where_that_is_wanted() -> None:
    world = World()
    a, b = world.start("h1", accept_unknown=False), world.start("h2")

    world.know(b, a)
    world.run(1_000)
    assert {code for code, _ in refused(a)} == {code for code, _ in refused(b)} == {"unknown"}

    world.know(a, b, dial=False)
    world.run(10_000)
    assert len(a.of(m.SessionUp)) == 1


def test_a_clone_of_a_live_node_is_refused_and_the_node_stays() -> None:
    world = World()
    a, b = joined(world)

    clone = world.start("h2/clone", counter=2, digest=extend_boots_digest(b.digest, b.boot))
    world.know(clone, a)
    world.run(1_000)
    a.send(b, b"hello")
    world.run(50)

    assert clone.of(m.SessionUp) == []
    assert "clone" in {code for code, _ in refused(a)}
    assert b.delivered["c"] == [b"hello"]
    assert len(a.of(m.SessionUp)) == 1


def test_a_next_life_that_vanished_before_it_was_let_in_changes_nothing() -> None:
    world = World()
    a, b = joined(world)
    a.send(b, b"1")
    b.send(a, b"1")
    world.run(50)
    for link in LINKS:
        world.cut(a, b, link)

    clone = world.start("h2/clone", counter=2, digest=extend_boots_digest(b.digest, b.boot))
    clone.name = "h2/clone"  # its links are not cut
    world.know(clone, a)
    assert world.run(100, until=lambda: bool(a.machine._lower.peers[b.node].contenders))
    world.kill(clone)
    world.run(300)
    world.heal()
    world.run(1_000)
    a.send(b, b"2")
    b.send(a, b"2")
    world.run(200)

    assert a.delivered["c"] == b.delivered["c"] == [b"1", b"2"]
    assert a.of(m.SessionDown) == b.of(m.SessionDown) == []


@pytest.mark.parametrize(
    ("counter", "digest", "code"), [(1, b"", "clone"), (2, b"another history", "clone"), (0, b"", "stale")]
)
def test_another_history_of_a_dead_node_is_refused(counter: int, digest: bytes, code: str) -> None:
    world = World()
    a, b = joined(world)
    world.kill(b)
    world.run(100)

    ghost = world.start("h2", counter=counter, digest=digest)
    world.know(ghost, a)
    world.run(1_000)

    assert code in {found for found, _ in refused(a)}
    assert len(a.of(m.SessionUp)) == 1


def test_a_node_that_came_back_from_a_power_cut_is_admitted_though_its_old_connections_look_alive() -> None:
    world = World()
    a, b = joined(world)
    b.alive = False  # no FIN, no RST: the power is gone

    b2 = world.restart(b)
    world.know(b2, a)
    assert world.run(400, until=lambda: len(a.of(m.SessionUp)) == 2)
    a.send(b2, b"hello")
    world.run(100)

    assert b2.delivered["c"] == [b"hello"]
    assert refused(a) == []


# -- strangers --


def test_strangers_are_limited_by_number_by_address_and_in_time() -> None:
    world = World()
    a = world.start("h1")
    for n in range(20):
        a.post(m.Accepted(1 + 2 * n, LinkName("l1"), f"9.9.9.9:{n}"))
    assert len(a.of(m.Disconnect)) == 12

    for n in range(100):
        a.post(m.Accepted(1001 + 2 * n, LinkName("l1"), f"10.0.0.{n}:1"))
    assert len(a.of(m.Disconnect)) == 12 + 100 - (64 - 8)

    world.run(6_000)
    assert len(a.of(m.Disconnect)) == 120, "none may stay longer than 5 s without proof"


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n" * 10, bytes(64), b"\xff" * 64, b"\x00\x00\x00\x04\x01\x00\x00\x00\xdd\xff\xff\xff"]
)
def test_garbage_closes_the_connection_and_nothing_else(data: bytes) -> None:
    world = World()
    a, b = joined(world)
    a.post(m.Accepted(901, LinkName("l1"), "9.9.9.9:1"))

    a.post(m.Received(901, data))
    a.send(b, b"hello")
    world.run(50)

    assert [effect.connection for effect in a.log if isinstance(effect, m.Disconnect)][-1] == 901
    assert refused(a)[-1][0] == "protocol"
    assert b.delivered["c"] == [b"hello"]


# -- datagrams --


def datagrams(process: Process) -> list[bytes]:
    return [effect.body for effect in process.log if isinstance(effect, m.DeliverDatagram)]


def test_a_datagram_goes_on_every_link_and_is_delivered_once() -> None:
    world = World()
    a, b = joined(world)

    a.post(m.SendDatagram(b.node, ChannelName("raft"), b"vote"))
    world.run(10)

    assert [entry[2] for entry in world.datagram_tap] == ["l1", "l2"]
    assert datagrams(b) == [b"vote"]


def test_a_datagram_passes_where_one_link_is_cut_without_any_delay() -> None:
    world = World()
    a, b = joined(world)
    world.cut(a, b, "l1")

    a.post(m.SendDatagram(b.node, ChannelName("raft"), b"beat"))
    world.run(1)

    assert datagrams(b) == [b"beat"]


def test_the_newest_datagram_of_a_topic_wins() -> None:
    world = World()
    a, b = joined(world)
    for n in range(3):
        a.post(m.SendDatagram(b.node, ChannelName("t"), b"%d" % n))
    packets = [data for _, _, link, data in world.datagram_tap if link == "l1"]
    world.processes.clear()

    for data in (packets[1], packets[0], packets[1], packets[2]):
        b.post(m.DatagramReceived(LinkName("l1"), "x:1", data))

    assert datagrams(b) == [b"1", b"2"]


def test_forged_old_and_foreign_datagrams_are_dropped() -> None:
    world = World()
    a, b = joined(world)
    a.post(m.SendDatagram(b.node, ChannelName("t"), b"body"))
    data = world.datagram_tap[0][3]
    world.processes.clear()
    forged = bytearray(data)
    forged[-1] ^= 1

    for packet in (bytes(forged), data[:-1], data[:30], b"", b"HAM1" + bytes(60)):
        b.post(m.DatagramReceived(LinkName("l1"), "x:1", packet))
    a.post(m.DatagramReceived(LinkName("l1"), "x:1", data))

    assert datagrams(a) == datagrams(b) == []


def test_a_datagram_that_was_held_back_for_seconds_is_dropped() -> None:
    world = World()
    a, b = joined(world)
    a.post(m.SendDatagram(b.node, ChannelName("t"), b"quick"))
    world.run(10)
    a.post(m.SendDatagram(b.node, ChannelName("t"), b"held"))
    held = world.datagram_tap[-1][3]
    world.heap = [entry for entry in world.heap if entry[0] > world.now_ns + MS]

    world.run(3_000)
    b.post(m.DatagramReceived(LinkName("l1"), "x:1", held))

    assert datagrams(b) == [b"quick"]


def test_a_recorded_datagram_means_nothing_to_a_restarted_receiver() -> None:
    world = World()
    a, b = joined(world)
    a.post(m.SendDatagram(b.node, ChannelName("t"), b"vote"))
    recorded = world.datagram_tap[-1][3]
    world.run(10)
    world.kill(b)
    b2 = world.restart(b)
    world.meet(a, b2)
    world.run(1_000)

    b2.post(m.DatagramReceived(LinkName("l1"), "x:1", recorded))

    assert datagrams(b2) == []


# -- chaos --


@pytest.mark.parametrize("number", range(12))
def test_whatever_happens_to_paths_messages_arrive_once_and_in_order(number: int, rng: random.Random) -> None:
    world = World(seed=rng.getrandbits(32))
    world.chunk = rng.choice([0, 0, 1000])
    a, b = world.start("h1"), world.start("h2")
    world.meet(a, b)
    world.run(300)
    expected: dict[tuple[str, str], list[bytes]] = {}
    for step in range(60):
        for one, other in ((a, b), (b, a)):
            channel = rng.choice(["c", "d", "r"])
            bodies = [b"%d/%d/" % (step, n) + bytes(rng.choice([0, 10, 300, 20_000])) for n in range(rng.randrange(30))]
            expected.setdefault((one.name, channel), []).extend(bodies)
            if bodies and one.machine.session_with(other.node):
                one.send(other, *bodies, channel=channel, redundant=channel == "r")
        match rng.randrange(8):
            case 0:
                world.cut(a, b, rng.choice(LINKS), one_way=rng.random() < 0.5)
            case 1:
                world.cut(b, a, rng.choice(LINKS), one_way=True)
            case 2 | 3:
                world.heal()
            case 4:
                world.freeze(rng.choice([a, b]), rng.randrange(500))
            case 5:
                links = sorted({wire.link for wire, _ in a.wires.values()})
                if links:
                    reset(world, a, rng.choice(links))
        world.run(rng.choice([1, 4, 10, 30, 100, 1_000, 3_000]))

    world.heal()
    world.run(90_000)

    assert len(a.of(m.SessionUp)) == 1
    for one, other in ((a, b), (b, a)):
        for channel in ("c", "d", "r"):
            assert other.delivered.get(channel, []) == expected.get((one.name, channel), [])
        session = one.machine.session_with(other.node)
        assert session is not None
        assert all(channel.base == channel.top for channel in session.channels()), "acknowledgements got lost for ever"
    assert set(a.path_states().values()) == set(b.path_states().values()) == {UP}
    assert node_id("h1") == a.node
