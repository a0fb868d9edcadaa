"""Database nodes in one process under trio: real drivers, record shells and stores; between them a bus instead of a network."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import trio

from ha_core.config import FAST, Profile
from ha_core.errors import HAError, NodeFailedError
from ha_core.ids import NodeId, ReplicaId
from ha_core.interfaces import RecordStoreEngine
from ha_core.machines.contract import Effect, Persist, WriteCheckpoint
from ha_core.machines.database import DatabaseMachine
from ha_core.machines.database_client import DatabaseClientMachine
from ha_core.machines.database_events import Arrived, DatagramArrived, PeerDown, PeerUp, Send
from ha_core.machines.messages import SendDatagram, SendRun
from ha_core.machines.raft.configuration import Configuration, Member
from ha_core.runtime.database import Database
from ha_core.runtime.database_calls import DatabaseCalls
from ha_core.runtime.driver import Driver
from ha_core.runtime.records import RecordShell
from ha_core.storage.memory import MemoryEngine

SINGLE = Profile(
    name="single", renewal_s=0.01, election_min_s=0.02, election_max_s=0.03, prevote_retry_min_s=0.01, prevote_retry_max_s=0.02,
    lease_s=0.7, margin_s=0.1,
)  # fmt: skip
"""For one voter, which elects itself."""
NODES = [NodeId(f"aam@h{number}.example") for number in (1, 2, 3)]
CLIENT = NodeId("app@c1.example")


class TrioNode:
    def __init__(self, bus: Bus, node: NodeId, machine: DatabaseMachine | DatabaseClientMachine) -> None:
        self.node = node
        self.machine = machine
        self.driver = Driver(machine, self._perform)
        self.calls = DatabaseCalls(self.driver.post, self.driver.call)
        self.records: RecordShell | None = None
        self.failure: HAError | None = None
        self.scope = trio.CancelScope()
        self.stopped = trio.Event()
        self._bus = bus

    def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Persist | WriteCheckpoint):
                assert self.records is not None
                self.records.perform(effect)
            elif isinstance(effect, Send):
                self._bus.carry(self.node, effect)
            else:
                self.calls.handle(effect)

    def open_database(self, nursery: trio.Nursery, lock_ttl_s: float) -> Database:
        return Database(self.calls, nursery, lock_ttl_s=lock_ttl_s)


class Bus:
    def __init__(self, nursery: trio.Nursery, engine: RecordStoreEngine, folder: Path) -> None:
        self.nodes: dict[NodeId, TrioNode] = {}
        self.voters = NODES
        self.lock_ttl_s = 1.0
        self._nursery = nursery
        self._engine = engine
        self._folder = folder
        self._cut: set[NodeId] = set()

    async def start(self, node: NodeId) -> Database:
        """Start a node; its database lives until ``stop``."""
        started: trio.Event = trio.Event()
        result: list[Database] = []

        async def run() -> None:
            async with AsyncExitStack() as stack:
                host = await self._build(node, stack)
                with host.scope:
                    async with trio.open_nursery() as nursery:
                        if host.records is not None:
                            nursery.start_soon(self._keep_records, host, host.records)
                        await nursery.start(host.driver.run)
                        result.append(host.open_database(nursery, self.lock_ttl_s))
                        self._join(host)
                        started.set()
                        await trio.sleep_forever()
                host.calls.fail(host.failure or NodeFailedError(f"{node} was closed"))
            host.stopped.set()

        self._nursery.start_soon(run)
        await started.wait()
        return result[0]

    async def _keep_records(self, host: TrioNode, records: RecordShell) -> None:
        """A node whose store fails stops."""
        await records.run()
        assert records.failure is not None
        host.failure = records.failure
        for other in self.nodes.values():
            if other is not host:
                other.driver.post(PeerDown(host.node))
        del self.nodes[host.node]
        host.scope.cancel()

    async def _build(self, node: NodeId, stack: AsyncExitStack) -> TrioNode:
        if node == CLIENT:
            client = DatabaseClientMachine(node, self.voters, retry_ns=20_000_000, resend_ns=220_000_000)
            return TrioNode(self, node, client)
        store = await stack.enter_async_context(self._engine.open(str(self._folder / node), {}))
        members = {voter: Member(b"") for voter in self.voters}
        machine = DatabaseMachine(
            node=node,
            replica=ReplicaId(store.incarnation),
            profile=FAST if len(self.voters) > 1 else SINGLE,
            rng=random.Random(node),
            recovered=await store.recover(),
            bootstrap=Configuration(tuple(self.voters), members=members),
        )
        host = TrioNode(self, node, machine)
        host.records = RecordShell(store, host.driver.step)
        return host

    def _join(self, host: TrioNode) -> None:
        for other in self.nodes.values():
            other.driver.post(PeerUp(host.node))
            host.driver.post(PeerUp(other.node))
        self.nodes[host.node] = host

    async def stop(self, node: NodeId) -> None:
        host = self.nodes.pop(node)
        for other in self.nodes.values():
            other.driver.post(PeerDown(node))
        host.scope.cancel()
        await host.stopped.wait()

    def cut(self, node: NodeId) -> None:
        """Nothing reaches it or leaves it any more."""
        self._cut.add(node)
        host = self.nodes[node]
        for other in self.nodes.values():
            if other is not host:
                other.driver.post(PeerDown(node))
                host.driver.post(PeerDown(other.node))

    def heal(self) -> None:
        for node in sorted(self._cut):
            for other in self.nodes.values():
                if other.node != node:
                    other.driver.post(PeerUp(node))
                    self.nodes[node].driver.post(PeerUp(other.node))
        self._cut.clear()

    def carry(self, sender: NodeId, send: Send) -> None:
        event = send.event
        if not isinstance(event, SendRun | SendDatagram):
            return
        receiver = self.nodes.get(event.to)
        if receiver is None or sender in self._cut or event.to in self._cut:
            return
        if isinstance(event, SendRun):
            receiver.driver.post(Arrived(sender, event.channel, list(event.bodies)))
        else:
            receiver.driver.post(DatagramArrived(sender, event.body))

    async def leader(self) -> NodeId:
        with trio.fail_after(10):
            while True:
                for node, host in self.nodes.items():
                    if isinstance(host.machine, DatabaseMachine) and host.machine.is_leading and node not in self._cut:
                        return node
                await trio.sleep(0.01)


@asynccontextmanager
async def open_bus(folder: Path, engine: RecordStoreEngine | None = None) -> AsyncIterator[Bus]:
    async with trio.open_nursery() as nursery:
        bus = Bus(nursery, engine or MemoryEngine(), folder)
        yield bus
        for node in list(bus.nodes):
            await bus.stop(node)
        nursery.cancel_scope.cancel()
