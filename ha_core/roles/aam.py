"""The aam process: the host machine over its store and its networks, and the Unix socket that VMAP speaks to.

It decides nothing: what arrives becomes events of ``HostMachine``, what that asks for is carried out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import attrs
import trio

from ha_core.config import Config
from ha_core.errors import HAError, StorageError
from ha_core.guard.primaries import write_primaries
from ha_core.guard.renewal import RenewalCodec
from ha_core.hypervisors.process import ProcessHypervisor
from ha_core.ids import HostName, LinkName, NodeId, ReplicaId, StoreId, host_of
from ha_core.interfaces import RecordStore
from ha_core.machines.aam import AamMachine, AnswerGuard, GuardDatagram, Ping, PingAnswered, RecordsChanged, VerdictChanged
from ha_core.machines.contract import Effect, Persist, PersistFailed, WriteCheckpoint
from ha_core.machines.database import DatabaseMachine
from ha_core.machines.endpoint import EndpointMachine
from ha_core.machines.failover.procedures import PROCEDURES
from ha_core.machines.failover.records import Host
from ha_core.machines.host import HostMachine, host_child
from ha_core.machines.messages import PeerRefused, SessionUp
from ha_core.machines.node import NodeMachine
from ha_core.machines.raft.configuration import Configuration, Member
from ha_core.machines.raft.types import ConfigurationChanged, MessageRefused, Reason
from ha_core.roles.aam_service import AamService
from ha_core.roles.boots import FILE_NAME, next_boot, vouch
from ha_core.roles.membership_file import MembershipFile, is_member
from ha_core.roles.names_keeper import NamesKeeper, known_peers
from ha_core.roles.rundir import AAM_SOCKET, make_directories, own_boot_id
from ha_core.roles.seen_boots import SeenBoots
from ha_core.runtime.database_calls import DatabaseCalls
from ha_core.runtime.driver import Driver
from ha_core.runtime.entropy import fresh_rng
from ha_core.runtime.parts import endpoint_shell, open_records
from ha_core.runtime.ping import ping
from ha_core.runtime.records import RecordShell, mark_boot
from ha_core.runtime.rpc import serve_unix
from ha_core.runtime.watchdog import Watchdog
from ha_core.security.key import load_key

logger = logging.getLogger(__name__)

JOIN_POLL_S = 0.1
GUARD_ANSWER_S = 0.5
PING_S = 0.5


async def run_aam(config: Config) -> None:
    """Run until cancelled; while the host belongs to no cluster only the watchdog runs."""
    run_dir = make_directories(config)
    watchdog = Watchdog("aam", run_dir, config.profile)
    async with trio.open_nursery() as nursery:
        await nursery.start(watchdog.run)
        while True:
            while (membership := MembershipFile.load(config.data_dir)) is None:
                await trio.sleep(JOIN_POLL_S)
            async with open_records(config) as store, trio.open_nursery() as member:
                member.start_soon(Aam(config, run_dir, membership, store).run)
                while is_member(config.data_dir, membership):
                    await trio.sleep(JOIN_POLL_S)
                member.cancel_scope.cancel()
            logger.warning("this host has left cluster %s", membership.cluster)


class Aam:
    """Everything that one aam has open."""

    def __init__(self, config: Config, run_dir: Path, membership: MembershipFile, store: RecordStore) -> None:
        self._config = config
        self._run_dir = run_dir
        self._membership = membership
        self._store = store
        self._key = load_key(config.key_path)
        self._host = host_of(config.node)
        self._failure: str | None = None
        self._failed = trio.Event()
        self._primaries_changed = trio.Event()
        self._nursery: trio.Nursery

    async def run(self) -> None:
        self._seen = SeenBoots(self._config.data_dir)
        self._host_machine, endpoint = await self._build()
        self._driver = Driver(NodeMachine(endpoint, [host_child(self._host_machine)]), self._perform)
        self._calls = DatabaseCalls(self._driver.post, self._driver.call)
        self._records = RecordShell(self._store, self._driver.step)
        self._endpoint = endpoint_shell(self._config, self._driver, self._guard_datagram)
        self._service = AamService(self._config, self._host_machine, endpoint, self._calls)
        self._names = NamesKeeper(self._config)
        await self._endpoint.open()
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self._endpoint.run)
            self._nursery.start_soon(self._records.run)
            self._nursery.start_soon(self._names.run)
            self._nursery.start_soon(self._seen.run)
            self._nursery.start_soon(self._keep_membership)
            await self._nursery.start(self._driver.run)
            await self._nursery.start(_serve, self._run_dir / AAM_SOCKET, self._service)
            await self._failed.wait()
            raise StorageError(
                f"{self._config.data_dir}: the store failed: {self._failure}; mend the disk, the aam starts anew"
            )

    async def _build(self) -> tuple[HostMachine, EndpointMachine]:
        config, membership = self._config, self._membership
        recovered = await self._store.recover()
        line = next_boot(config.data_dir, self._store.incarnation)
        where = f"{config.data_dir}: the record store and {FILE_NAME}"
        await mark_boot(self._store, recovered, line.boot.mark, line.marks, where)
        vouch(config.data_dir, self._store.incarnation, line)
        record = self._own_record(await self._containment())
        founder = config.node in membership.voters
        bootstrap = None
        if founder:
            members = {config.node: Member(self._store.incarnation, dict(config.links))}
            bootstrap = Configuration(incoming=(config.node,), members=members)
        database = DatabaseMachine(
            node=config.node, replica=ReplicaId(self._store.incarnation), profile=config.profile, rng=fresh_rng("database"),
            recovered=recovered, bootstrap=bootstrap, procedures=PROCEDURES, cluster=membership.cluster,
            mark=line.boot.mark,
        )  # fmt: skip
        aam = AamMachine(
            node=config.node, host=record, database=database, codec=RenewalCodec(membership.cluster, self._key),
            profile=config.profile, isolation_addresses=config.isolation_addresses,
        )  # fmt: skip
        endpoint = EndpointMachine(
            node=config.node, cluster=membership.cluster, key=self._key, store=StoreId(self._store.incarnation), boot=line.boot,
            boots_digest=line.digest, links=config.links, profile=config.profile, rng=fresh_rng("endpoint"), accept_unknown=False,
            seen=self._seen.known,
        )  # fmt: skip
        host = HostMachine(
            node=config.node, replica=ReplicaId(self._store.incarnation), addresses=config.links, aam=aam,
            primaries={**known_peers(config.data_dir), **membership.primaries}, founds=record if founder else None,
        )  # fmt: skip
        return host, endpoint

    def _own_record(self, containment: str) -> Host:
        config = self._config
        return Host(
            HostName(self._host), tuple(sorted(config.links.items())), config.cpu_mhz, config.memory_mib, boot=own_boot_id(),
            management=config.management, containment=containment,
        )  # fmt: skip

    async def _containment(self) -> str:
        """The guard knows it; empty if that is just away, then what the database has of this host stays."""
        with trio.move_on_after(GUARD_ANSWER_S):
            try:
                return (await ProcessHypervisor(self._run_dir).status()).containment
            except HAError as exc:
                logger.warning("the guard does not say how it contains VMs: %s", exc)
        return ""

    # -- effects --

    def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Persist | WriteCheckpoint):
                self._records.perform(effect)
            elif not self._endpoint.perform(effect) and not self._calls.handle(effect):
                self._perform_rare(effect)

    def _perform_rare(self, effect: Effect) -> None:
        match effect:
            case SessionUp():
                self._seen.note(effect)
            case AnswerGuard(source, data):
                assert isinstance(source, tuple)
                self._endpoint.send_raw(source[0], source[1], data)
            case RecordsChanged():
                self._service.records_changed(effect)
                self._names.follow(self._host_machine.aam.inventory)
                self._follow_primaries()
            case ConfigurationChanged():
                self._follow_primaries()
            case Ping(address):
                self._nursery.start_soon(self._ping, address)
            case VerdictChanged(verdict, reason):
                logger.warning("this host is %s: %s", verdict.value, reason)
            case MessageRefused(sender, Reason.REMOVED):
                logger.error("%s, says %s", Reason.REMOVED.value, sender)
            case PeerRefused(peer, code, text):
                logger.warning("refused %s (%s): %s", peer, code, text)
            case PersistFailed(_, error):
                self._failure = error
                self._failed.set()

    def _guard_datagram(self, link: LinkName, remote: str, data: bytes) -> None:
        self._driver.step(GuardDatagram((link, remote), data))

    async def _ping(self, address: str) -> None:
        if await ping(address, PING_S):
            self._driver.post(PingAnswered(address))

    def _follow_primaries(self) -> None:
        """Keep what the guard and the next start read equal to the voters."""
        configuration = self._host_machine.aam.database.configuration
        if configuration is None:
            return
        hosts = self._host_machine.aam.inventory.hosts
        primaries: dict[NodeId, dict[LinkName, str]] = {}
        for node in configuration.voters:
            known = hosts.get(host_of(node))
            addresses = dict(known.addresses) if known is not None else dict(configuration.members[node].addresses)
            primaries[node] = {LinkName(link): address for link, address in addresses.items()}
        # Founding ends with the first host's registration: a store that is lost later must join anew, never found a second time.
        voters = {} if host_of(self._config.node) in hosts else self._membership.voters
        if primaries == self._service.primaries and voters == self._membership.voters:
            return
        self._service.primaries = primaries
        write_primaries(
            str(self._run_dir),
            {str(node): {str(link): one for link, one in links.items()} for node, links in primaries.items()},
        )
        self._membership = attrs.evolve(self._membership, voters=voters, primaries=primaries)
        self._primaries_changed.set()

    async def _keep_membership(self) -> None:
        """One write at a time, the newest last."""
        while True:
            await self._primaries_changed.wait()
            self._primaries_changed = trio.Event()
            try:
                await trio.to_thread.run_sync(self._membership.update, self._config.data_dir)
            except StorageError as exc:
                logger.warning("%s", exc)


async def _serve(path: Path, service: AamService, *, task_status: trio.TaskStatus[None]) -> None:
    await serve_unix(path, service.handle, task_status=task_status)
