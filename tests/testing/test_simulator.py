"""The simulator keeps its own promises: one seed one trace, and faults that do what they say."""

from __future__ import annotations

import random
from collections.abc import Sequence

import attrs
import pytest

from ha_core.ids import LinkName, NodeId
from ha_core.machines.contract import Effect, Event, Gate, Persist, Persisted, PersistFailed
from ha_core.machines.messages import (
    Accepted,
    Connected,
    DatagramReceived,
    Dial,
    Disconnect,
    Disconnected,
    Flushed,
    PathKey,
    Received,
    Transmit,
    TransmitDatagram,
)
from ha_core.testing.campaigns import play_seed
from ha_core.testing.campaigns.ping import Ping, PingCampaign
from ha_core.testing.simulator import (
    MILLISECOND,
    SECOND,
    Chaos,
    Fault,
    SimClock,
    SimConnections,
    SimDisk,
    SimHost,
    SimMessages,
    SimNetwork,
    SimProcess,
    Simulation,
    TooManyViolationsError,
)


@attrs.frozen
class Do(Event):
    """Makes a Puppet hand out effects."""

    effects: Sequence[Effect]


class Puppet:
    """A machine that does what it is told and remembers what it is told."""

    def __init__(self, timers: Sequence[int] = ()) -> None:
        self.seen: list[tuple[int, Event]] = []
        self.rang: list[int] = []
        self.timers = list(timers)
        self.gate = Gate()

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        for event in events:
            if isinstance(event, Do):
                for effect in event.effects:
                    self.gate.put(effect)
            else:
                self.seen.append((now_ns, event))

    def handle_timer(self, now_ns: int) -> None:
        self.rang.append(now_ns)
        self.timers.pop(0)

    def next_timer(self) -> int | None:
        return self.timers[0] if self.timers else None

    def take_effects(self) -> list[Effect]:
        return self.gate.take()

    def persisted(self, number: int, now_ns: int) -> None:
        self.seen.append((now_ns, Persisted(number)))

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        self.seen.append((now_ns, PersistFailed(number, error)))

    @property
    def events(self) -> list[Event]:
        return [event for _, event in self.seen]


def puppet_process(sim: Simulation, name: str = "n1", **options: object) -> tuple[SimProcess, list[Puppet]]:
    lives: list[Puppet] = []

    def build(process: SimProcess) -> Puppet:
        lives.append(Puppet())
        return lives[-1]

    return SimProcess(sim, name, build, **options), lives  # type: ignore[arg-type]


# -- core --


def test_same_seed_gives_same_trace_and_another_seed_another() -> None:
    results = [play_seed(PingCampaign(), seed) for seed in (5, 5, 6)]

    assert results[0] == results[1]
    assert results[0].trace_hash != results[2].trace_hash


def test_a_new_stream_does_not_change_what_others_draw() -> None:
    alone, beside = Simulation(3), Simulation(3)
    beside.stream("newcomer").random()

    assert alone.stream("disk").random() == beside.stream("disk").random()


def test_events_at_one_instant_run_in_the_order_they_were_scheduled() -> None:
    sim = Simulation(1)
    order: list[int] = []
    for number in range(5):
        sim.at(10, order.append, number)
    sim.at(10, order.append, 99).cancel()

    sim.run_until(10)

    assert order == [0, 1, 2, 3, 4]
    assert sim.now_ns == 10


def test_what_was_traced_decides_the_hash() -> None:
    one, same, other = Simulation(1), Simulation(1), Simulation(1)
    for sim, text in ((one, "x"), (same, "x"), (other, "y")):
        sim.trace("line", text, 7, b"\0", None)

    assert one.trace_hash == same.trace_hash != other.trace_hash


def test_a_livelock_is_a_violation() -> None:
    sim = Simulation(1, max_steps=100)

    class Restless(Puppet):
        def next_timer(self) -> int | None:
            return 0

        def handle_timer(self, now_ns: int) -> None:
            pass

    SimProcess(sim, "n1", lambda process: Restless())
    with pytest.raises(TooManyViolationsError):
        sim.run_for(SECOND)

    assert [found.invariant for found in sim.violations] == ["error"]


def test_an_exception_out_of_a_machine_is_a_violation_and_kills_the_process() -> None:
    sim = Simulation(1)
    process, _ = puppet_process(sim)

    process.post(Do([Transmit(2, b"nobody carries this out")]))
    sim.run_for(SECOND)

    assert [found.invariant for found in sim.violations] == ["error"]
    assert not process.alive


# -- processes and clocks --


def test_posts_within_the_wake_up_delay_are_one_batch() -> None:
    sim = Simulation(1)
    process, lives = puppet_process(sim)
    sim.run_for(SECOND)

    process.post(Connected(2))
    process.post(Connected(4))
    sim.run_for(SECOND)

    assert len({when for when, _ in lives[0].seen}) == 1
    assert lives[0].events == [Connected(2), Connected(4)]


@pytest.mark.parametrize("rate_ppm", [-5000, 0, 5000])
def test_timers_ring_at_the_instant_of_the_hosts_own_clock(rate_ppm: int) -> None:
    sim = Simulation(1)
    clock = SimClock(sim, start_ns=7 * SECOND, rate_ppm=rate_ppm)
    puppet = Puppet([8 * SECOND, 9 * SECOND])
    SimProcess(sim, "n1", lambda process: puppet, clock=clock, wake_ns=0)

    sim.run_for(1900 * MILLISECOND)
    assert puppet.rang == [8 * SECOND]
    sim.run_for(150 * MILLISECOND)

    assert puppet.rang[1] == 9 * SECOND
    assert clock.virtual(9 * SECOND) == -(-2 * SECOND * 1_000_000 // (1_000_000 + rate_ppm))


def test_a_frozen_process_sees_nothing_until_it_thaws() -> None:
    sim = Simulation(1)
    process, lives = puppet_process(sim)
    sim.run_for(MILLISECOND)
    process.freeze(SECOND)
    process.post(Connected(2))

    sim.run_for(900 * MILLISECOND)
    assert lives[0].seen == []
    sim.run_for(200 * MILLISECOND)

    assert lives[0].events == [Connected(2)]
    assert sim.faults == {"freeze": 1}


def test_crash_between_two_effects_drops_the_second() -> None:
    sim = Simulation(1)
    process, lives = puppet_process(sim)
    carried: list[Effect] = []
    process.on(Transmit, carried.append)
    process.crash_within(1)

    process.post(Do([Transmit(2, b"one"), Transmit(2, b"two")]))
    sim.run_for(SECOND)

    assert carried == [Transmit(2, b"one")]
    assert not process.alive
    process.start()
    assert len(lives) == 2
    assert sim.violations == []


def test_power_loss_takes_all_processes_of_a_host_and_resets_its_clock() -> None:
    sim = Simulation(1)
    host = SimHost(sim, "h1", boot_ns=5 * SECOND)
    pair = [host.add(puppet_process(sim, name, clock=host.clock)[0]) for name in ("guard", "aam")]
    sim.run_for(SECOND)

    host.power_off()
    assert [process.alive for process in pair] == [False, False]
    host.power_on()
    sim.run_for(4 * SECOND)
    assert [process.alive for process in pair] == [False, False]
    sim.run_for(2 * SECOND)

    assert [process.alive for process in pair] == [True, True]
    assert host.clock.now_ns() == SECOND


def test_a_process_that_stopped_by_itself_does_not_come_back_before_its_host() -> None:
    """Its disk failed, then the power did; the restart that was due meanwhile must not bring it to life on a dark host."""
    sim = Simulation(1)
    host = SimHost(sim, "h1", boot_ns=5 * SECOND)
    disk = SimDisk(sim, "aam")
    process, _ = puppet_process(sim, "aam", clock=host.clock, disk=disk)
    host.add(process)
    sim.run_for(SECOND)
    disk.device.fail_next()
    process.post(Do([Persist(1, b"record")]))
    sim.run_for(40 * MILLISECOND, stop=lambda: not process.alive)
    assert not process.alive

    host.power_off()
    sim.run_for(2 * SECOND)
    assert not process.alive
    host.start()
    sim.run_for(4 * SECOND)
    assert not process.alive, "it boots"
    sim.run_for(2 * SECOND)

    assert process.alive
    assert process.lives == 2


def test_two_chaoses_of_one_simulation_draw_differently() -> None:
    sim = Simulation(1)
    struck: list[list[int]] = [[], []]

    def fault(log: list[int]) -> Fault:
        def begin(rng: random.Random, amount: float) -> None:
            log.append(sim.now_ns)

        return Fault("knock", begin)

    for log in struck:
        Chaos(sim, [fault(log)], {"knock": 1.0}).start()
    sim.run_for(20 * SECOND)

    assert len(struck[0]) > 10
    assert len(struck[1]) > 10
    assert not set(struck[0]) & set(struck[1])


# -- disks --


def test_confirmed_writes_survive_a_crash_and_unsynced_ones_are_lost_from_the_end() -> None:
    kept_counts = set()
    for seed in range(40):
        sim = Simulation(seed)
        disk = SimDisk(sim, "n1")
        confirmed: list[str | None] = []
        disk.append(b"first", confirmed.append)
        sim.run_for(SECOND)
        for record in (b"second", b"third", b"fourth"):
            disk.append(record, confirmed.append)

        disk.crash()
        sim.run_for(SECOND)

        records = list(disk.recover().records)
        assert confirmed == [None]
        assert records == [b"first", b"second", b"third", b"fourth"][: len(records)]
        assert sim.faults.get("disk-crash", 0) == 4 - len(records)
        kept_counts.add(len(records))

    assert kept_counts == {1, 2, 3, 4}


def test_a_failed_flush_poisons_the_disk_until_it_is_opened_again() -> None:
    sim = Simulation(1)
    disk = SimDisk(sim, "n1")
    answers: list[str | None] = []
    disk.device.fail_next()

    disk.append(b"one", answers.append)
    sim.run_for(SECOND)
    disk.append(b"two", answers.append)
    sim.run_for(SECOND)
    assert answers == ["input/output error"] * 2
    disk.crash()
    disk.append(b"three", answers.append)
    sim.run_for(SECOND)

    assert answers[2] is None
    assert b"two" not in disk.recover().records


def test_a_full_disk_keeps_nothing_of_what_it_refused() -> None:
    sim = Simulation(1)
    process, lives = puppet_process(sim, disk=SimDisk(sim, "n1"))
    assert process.disk is not None
    process.disk.device.set_full(True)

    process.post(Do([Persist(1, b"record")]))
    sim.run_for(10 * MILLISECOND)

    assert lives[0].events == [PersistFailed(1, "no space left on device")]
    assert process.disk.recover().records == ()
    assert not process.alive
    sim.run_for(SECOND)
    assert process.alive


def test_checkpoint_replaces_everything_and_an_old_image_can_be_put_back() -> None:
    sim = Simulation(1)
    disk = SimDisk(sim, "n1")
    disk.append(b"one", lambda error: None)
    sim.run_for(SECOND)
    image, incarnation = disk.image(), disk.incarnation

    disk.checkpoint(b"state", [b"two"], lambda error: None)
    sim.run_for(SECOND)
    assert (disk.recover().checkpoint, disk.recover().records) == (b"state", (b"two",))
    disk.restore(image)
    assert (disk.recover().checkpoint, disk.recover().records) == (None, (b"one",))
    assert disk.incarnation == incarnation
    disk.lose()

    assert disk.recover().records == ()
    assert disk.incarnation != incarnation


# -- networks --


class Mailboxes:
    """Two or three processes on a message-level network, and what each got."""

    def __init__(self, seed: int = 1, names: Sequence[str] = ("n1", "n2")) -> None:
        self.sim = Simulation(seed)
        self.network = SimNetwork(self.sim, names)
        self.messages = SimMessages(self.network)
        self.got: dict[str, list[object]] = {name: [] for name in names}
        self.processes: dict[str, SimProcess] = {}
        for name in names:
            self.processes[name] = puppet_process(self.sim, name, start=False)[0]
            self._attach(name)
        for process in self.processes.values():
            process.start()
        self.sim.run_for(SECOND)

    def _attach(self, name: str) -> None:
        box = self.got[name]
        self.messages.attach(
            self.processes[name],
            on_datagram=lambda sender, topic, body: box.append(body),
            on_message=lambda sender, channel, body: box.append(body),
            on_session=lambda peer, up: box.append((peer, up)),
        )


def test_a_session_is_told_to_both_ends_and_datagrams_go_over_every_link() -> None:
    boxes = Mailboxes()

    boxes.messages.send_datagram("n1", "n2", b"hello")
    boxes.sim.run_for(SECOND)

    assert boxes.got == {"n1": [("n2", True)], "n2": [("n1", True), b"hello", b"hello"]}


def test_a_channel_delivers_in_order_and_without_a_gap_through_cuts_and_loss() -> None:
    for seed in range(20):
        boxes = Mailboxes(seed)
        boxes.network.flow("n1", "n2", "a").loss = 0.3
        sent: list[object] = []
        for number in range(50):
            if number == 20:
                cut = boxes.network.isolate("n1")
            if number == 40:
                cut.heal()
            assert boxes.messages.send("n1", "n2", "c", number)
            sent.append(number)
            boxes.sim.run_for(MILLISECOND)
        boxes.sim.run_for(SECOND)

        assert boxes.got["n2"][1:] == sent


def test_a_restarted_process_resets_the_session_and_is_told_down_before_up() -> None:
    boxes = Mailboxes()
    boxes.messages.send("n1", "n2", "c", b"lost with the session")

    boxes.processes["n2"].restart()
    boxes.sim.run_for(SECOND)

    assert boxes.got["n1"] == [("n2", True), ("n2", False), ("n2", True)]
    assert b"lost with the session" not in boxes.got["n2"]
    assert boxes.messages.send("n1", "n2", "c", b"next")
    boxes.sim.run_for(SECOND)
    assert boxes.got["n2"][-1] == b"next"


def test_one_way_cut_stops_one_direction_only() -> None:
    boxes = Mailboxes()
    cut = boxes.network.cut_one_way("n1", "n2")

    boxes.messages.send_datagram("n1", "n2", b"there")
    boxes.messages.send_datagram("n2", "n1", b"back")
    boxes.sim.run_for(SECOND)

    assert b"there" not in boxes.got["n2"]
    assert b"back" in boxes.got["n1"]
    cut.heal()
    boxes.messages.send_datagram("n1", "n2", b"again")
    boxes.sim.run_for(SECOND)
    assert b"again" in boxes.got["n2"]


def test_partition_separates_groups_and_leaves_each_whole() -> None:
    boxes = Mailboxes(names=("n1", "n2", "n3"))

    boxes.network.partition(["n1", "n2"])
    for sender in ("n1", "n3"):
        boxes.messages.send_datagram(sender, "n2", sender)
    boxes.sim.run_for(SECOND)

    assert "n1" in boxes.got["n2"]
    assert "n3" not in boxes.got["n2"]


@pytest.mark.parametrize("fault", ["loss", "duplicate", "reorder", "replay", "corrupt"])
def test_packet_faults_take_effect_and_are_counted(fault: str) -> None:
    sim = Simulation(1)
    network = SimNetwork(sim, ["n1", "n2"], links=("a",))
    flow = network.flow("n1", "n2", "a")
    setattr(flow, fault, 0.5)
    got: list[bytes] = []
    sent = [b"%03d" % number * 2 for number in range(40)]

    for body in sent:
        network.packet(flow, got.append, body)
        sim.run_for(MILLISECOND)
    sim.run_for(10 * SECOND)

    count = sim.faults[fault]
    assert 5 < count < 35
    if fault == "loss":
        assert len(got) == 40 - count
    elif fault in ("duplicate", "replay"):
        assert len(got) == 40 + count
    elif fault == "reorder":
        assert got != sent
        assert sorted(got) == sent
    else:
        assert len(set(sent) - set(got)) == count


def test_a_clog_holds_back_and_then_lets_go() -> None:
    sim = Simulation(1)
    network = SimNetwork(sim, ["n1", "n2"], links=("a",))
    network.clog(network.flows("n1", "n2"), SECOND)
    got: list[int] = []

    network.packet(network.flow("n1", "n2", "a"), lambda: got.append(sim.now_ns))
    sim.run_for(2 * SECOND)

    assert got[0] >= SECOND


class Wires:
    """Two puppets with addresses on a connection-level network."""

    def __init__(self, seed: int = 1) -> None:
        self.sim = Simulation(seed)
        self.network = SimNetwork(self.sim, ["n1", "n2"])
        self.connections = SimConnections(self.network, chop=1.0)
        self.processes: dict[str, SimProcess] = {}
        self.lives: dict[str, list[Puppet]] = {}
        for number, name in enumerate(("n1", "n2"), start=1):
            process, lives = puppet_process(self.sim, name)
            self.processes[name], self.lives[name] = process, lives
            self.connections.attach(process, {LinkName("a"): f"10.0.1.{number}:7400", LinkName("b"): f"10.0.2.{number}:7400"})
        self.dial()

    def dial(self, connection: int = 2) -> None:
        path = PathKey(NodeId("n2"), LinkName("a"), "10.0.1.2:7400")
        self.processes["n1"].post(Do([Dial(connection, path)]))
        self.sim.run_for(100 * MILLISECOND)

    def last(self, name: str) -> Event:
        return self.lives[name][0].events[-1]

    def bytes_of(self, name: str) -> bytes:
        return b"".join(event.data for event in self.lives[name][-1].events if isinstance(event, Received))


def test_a_dialled_connection_carries_bytes_in_order_and_in_other_pieces() -> None:
    wires = Wires()
    assert wires.lives["n2"][0].events == [Accepted(1, LinkName("a"), "10.0.1.1:32770")]

    sent = bytes(range(200)) * 3
    wires.processes["n1"].post(Do([Transmit(2, sent[:300]), Transmit(2, sent[300:])]))
    wires.sim.run_for(SECOND)

    received = [event for event in wires.lives["n2"][0].events if isinstance(event, Received)]
    assert wires.bytes_of("n2") == sent
    assert len(received) > 2


def test_a_cut_path_delays_bytes_until_it_heals() -> None:
    wires = Wires()
    cut = wires.network.cut_path("n1", "n2", "a")
    for number in range(10):
        wires.processes["n1"].post(Do([Transmit(2, b"%d" % number)]))
        wires.sim.run_for(10 * MILLISECOND)
    assert wires.bytes_of("n2") == b""

    cut.heal()
    wires.sim.run_for(5 * SECOND)

    assert wires.bytes_of("n2") == b"0123456789"


def test_a_connection_over_a_path_that_stays_cut_times_out() -> None:
    wires = Wires()
    wires.network.cut_path("n1", "n2", "a")
    wires.processes["n1"].post(Do([Transmit(2, b"x")]))

    wires.sim.run_for(20 * SECOND)

    assert wires.last("n1") == Disconnected(2, "timed out")


def test_a_close_arrives_after_what_was_sent_or_cuts_it_short() -> None:
    endings = set()
    for seed in range(20):
        wires = Wires(seed)
        wires.processes["n1"].post(Do([Transmit(2, b"last words"), Disconnect(2, "done")]))
        wires.sim.run_for(SECOND)
        assert wires.last("n2") == Disconnected(1, "closed by peer")
        assert b"last words".startswith(wires.bytes_of("n2"))
        endings.add(wires.bytes_of("n2"))

    assert b"last words" in endings
    assert b"" in endings


def test_a_killed_process_resets_its_connections_and_one_without_power_answers_only_when_it_is_back() -> None:
    wires = Wires()
    wires.processes["n2"].crash()
    wires.sim.run_for(SECOND)
    assert wires.last("n1") == Disconnected(2, "closed by peer")
    wires.processes["n2"].start()
    wires.dial(4)

    wires.processes["n2"].crash(silent=True)
    wires.processes["n1"].post(Do([Transmit(4, b"anybody?")]))
    wires.sim.run_for(SECOND)
    assert wires.last("n1") == Flushed(4, 8)
    wires.processes["n2"].start()
    wires.sim.run_for(5 * SECOND)

    assert wires.last("n1") == Disconnected(4, "connection reset by peer")


def test_a_dial_to_nobody_is_refused_and_over_a_cut_path_times_out() -> None:
    wires = Wires()
    wires.processes["n2"].crash()
    wires.dial(4)
    assert wires.last("n1") == Disconnected(4, "connection refused")
    wires.network.cut_path("n1", "n2", "a")
    wires.dial(6)
    wires.sim.run_for(10 * SECOND)

    assert wires.last("n1") == Disconnected(6, "timed out")


def test_udp_comes_from_the_senders_address_and_the_guard_takes_its_own() -> None:
    wires = Wires()
    taken: list[bytes] = []

    def on_datagram(link: str, remote: str, data: bytes) -> bool:
        if data.startswith(b"HAG1"):
            taken.append(data)
            return True
        return False

    wires.connections.attach(wires.processes["n2"], {LinkName("a"): "10.0.1.2:7400"}, on_datagram=on_datagram)
    packets = [TransmitDatagram(LinkName("a"), "10.0.1.2:7400", data) for data in (b"HAG1 renewal", b"other")]
    wires.processes["n1"].post(Do(packets))
    wires.sim.run_for(SECOND)

    assert taken == [b"HAG1 renewal"]
    assert wires.last("n2") == DatagramReceived(LinkName("a"), "10.0.1.1:7400", b"other")


def test_ping_would_notice_an_answer_before_the_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def eager(self: Gate, effect: Effect, after: int = 0) -> None:
        self._ready.append(effect)

    monkeypatch.setattr(Gate, "put", eager)
    found = {violation.invariant for seed in range(1, 30) for violation in play_seed(PingCampaign(), seed).violations}

    assert found == {"I52"}
    assert Ping.__doc__
