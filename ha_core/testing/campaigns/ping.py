"""The worked example of a campaign: machines that ping each other and remember on disk how often they were answered.

Play it with ``ha-core simulate --campaign ping --seeds 1..50``; copy it to begin your own.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from ha_core.machines.contract import Effect, Event, Gate
from ha_core.testing.simulator import (
    SECOND,
    Chaos,
    SimDisk,
    SimMessages,
    SimNetwork,
    SimProcess,
    Simulation,
    disk_faults,
    network_faults,
    process_faults,
)


@attrs.frozen
class Send(Effect):
    to: str
    body: bytes


@attrs.frozen
class Got(Event):
    sender: str
    body: bytes


class Ping:
    """A machine as in machines/contract.py: asks every second, and answers a ping only once it is on disk."""

    def __init__(self, peer: str, records: Sequence[bytes]) -> None:
        self.peer = peer
        self.pings = len(records)
        self.answered = 0
        self._next_ns = 0
        self._gate = Gate()

    def receive(self, events: Sequence[Event], now_ns: int) -> None:
        for event in events:
            assert isinstance(event, Got)
            if event.body == b"ping":
                self.pings += 1
                number = self._gate.persist(b"ping")
                self._gate.put(Send(event.sender, b"%d" % self.pings), number)
            else:
                self.answered = max(self.answered, int(event.body))

    def handle_timer(self, now_ns: int) -> None:
        self._next_ns = now_ns + SECOND
        self._gate.put(Send(self.peer, b"ping"))

    def next_timer(self) -> int | None:
        return self._next_ns

    def take_effects(self) -> list[Effect]:
        return self._gate.take()

    def persisted(self, number: int, now_ns: int) -> None:
        self._gate.persisted(number)

    def persist_failed(self, number: int, error: str, now_ns: int) -> None:
        self._gate.fail()


class PingCampaign:
    """What one node was told (``answered``) is on the other's disk, whatever crashes (I52)."""

    name = "ping"
    invariants = ("I26", "I52")
    faults = ("loss", "delay", "partition", "crash", "disk-crash", "disk-error", "freeze")

    def play(self, sim: Simulation) -> None:
        network = SimNetwork(sim, ["n1", "n2"], links=("a", "b"))
        messages = SimMessages(network)
        disks = {name: SimDisk(sim, name) for name in ("n1", "n2")}
        machines: dict[str, Ping] = {}
        processes: dict[str, SimProcess] = {}
        other = {"n1": "n2", "n2": "n1"}

        def build(process: SimProcess) -> Ping:
            # at start and again after each crash, from what the disk holds then
            machines[process.name] = Ping(other[process.name], disks[process.name].recover().records)
            return machines[process.name]

        for name in other:
            process = processes[name] = SimProcess(sim, name, build, disk=disks[name], start=False)

            def on_datagram(sender: str, topic: str, body: object, process: SimProcess = process) -> None:
                assert isinstance(body, bytes)
                process.post(Got(sender, body))

            def send(effect: Send, name: str = name) -> None:
                messages.send_datagram(name, effect.to, effect.body)

            process.on(Send, send)
            messages.attach(process, on_datagram=on_datagram)
        for process in processes.values():
            process.start()

        def check(name: str) -> None:
            # called after every step of every process
            sim.checked("I52")
            on_disk = len(disks[other[name]].recover().records)
            if machines[name].answered > on_disk:
                sim.violate("I52", f"{name} was told of {machines[name].answered} pings, the disk has {on_disk}")

        sim.watch(check)

        # the safety phase: anything may happen, nothing may go wrong
        faults = [
            *network_faults(network),
            *disk_faults([disk.device for disk in disks.values()]),
            *process_faults(list(processes.values())),
        ]
        chaos = Chaos(sim, faults, sim.swarm(self.faults))
        chaos.start()
        sim.run_for(20 * SECOND)

        # the liveness phase: with everything healed, work must get done
        chaos.stop()
        network.heal_all()
        for process in processes.values():
            process.start()
        goal = {name: machine.answered + 3 for name, machine in machines.items()}
        sim.checked("I26")
        if not sim.run_for(30 * SECOND, stop=lambda: all(machines[name].answered >= goal[name] for name in goal)):
            sim.violate("I26", "no answers although everything is healed")
