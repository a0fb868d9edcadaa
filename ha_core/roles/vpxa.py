"""The vpxa process: VM drivers, the VMAP plug-in, and the API that center and command line speak to.

It keeps nothing that cannot be rebuilt: what shall run comes from the database, what runs from the guard.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import trio

from ha_core import registry
from ha_core.config import Config
from ha_core.errors import ConfigError, NotJoinedError, OperationFailedError, RemoteProtocolError
from ha_core.guard.primaries import FILE_NAME as PRIMARIES
from ha_core.hypervisors.process import ProcessHypervisor
from ha_core.ids import HostName, LinkName, NodeId, host_of
from ha_core.interfaces import Hypervisor
from ha_core.roles.membership_file import Addresses, MembershipFile, is_member
from ha_core.roles.names_keeper import FILE_NAME as FT_HOSTS
from ha_core.roles.rundir import JOIN_TOKEN, VPXA_SOCKET, make_directories
from ha_core.roles.vm_driver import VmDriver
from ha_core.roles.vmap import Vmap
from ha_core.runtime.entropy import fresh_id
from ha_core.runtime.parts import records_path
from ha_core.runtime.rpc import Call, serve_tcp, serve_unix
from ha_core.runtime.watchdog import Watchdog
from ha_core.security.join import make_token, unseal
from ha_core.security.key import load_key, write_key

logger = logging.getLogger(__name__)

JOIN_POLL_S = 0.2
_FORWARDED = {
    "cluster.status": "cluster.status",
    "cluster.call": "records.call",
    "cluster.read": "records.read",
}
"""Methods of ours that the aam answers, through VMAP."""


async def run_vpxa(config: Config) -> None:
    """Run until cancelled."""
    run_dir = make_directories(config)
    watchdog = Watchdog("vpxa", run_dir, config.profile)
    async with trio.open_nursery() as nursery:
        await nursery.start(watchdog.run)
        await Vpxa(config).run()


class Vpxa:
    """The drivers and the API of one host."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._run_dir = make_directories(config)
        self._host = HostName(host_of(config.node))
        self._process = ProcessHypervisor(self._run_dir)
        drivers: dict[str, Hypervisor] = {"process": self._process}
        environment = {"HA_CORE_HOST": self._host, "HA_CORE_RUN_DIR": str(self._run_dir)}
        self._vms = VmDriver(self._host, drivers, environment)
        self._vmap: Vmap | None = None
        self._joined = trio.Event()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._vms.run)
            await nursery.start(self._serve_unix)
            nursery.start_soon(self._serve_management)
            while True:
                membership = await self._until_member()
                # The plug-in is found by its name and loaded only now that there is a cluster to talk to.
                plug_in = registry.find("roles", "vmap")
                assert callable(plug_in)
                async with plug_in(self._run_dir, self._vms.records) as vmap:
                    self._vmap = self._vms.vmap = vmap
                    logger.info("joined: VMAP is loaded")
                    while is_member(self._config.data_dir, membership):
                        await trio.sleep(JOIN_POLL_S)
                self._vmap = self._vms.vmap = None
                logger.info("left the cluster: VMAP is unloaded")

    async def _until_member(self) -> MembershipFile:
        while (membership := MembershipFile.load(self._config.data_dir)) is None:
            with trio.move_on_after(JOIN_POLL_S):
                await self._joined.wait()
        self._joined = trio.Event()
        return membership

    # -- the API --

    async def _serve_unix(self, *, task_status: trio.TaskStatus[None]) -> None:
        await serve_unix(self._run_dir / VPXA_SOCKET, self.handle, task_status=task_status)

    async def _serve_management(self) -> None:
        """Over TCP: to holders of the cluster key while the host is a member, to who holds its join token while it is not."""
        if not self._config.management:
            return
        while True:
            member = self._is_member()
            key = load_key(self._config.key_path) if member else make_token(self._config.data_dir / JOIN_TOKEN)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_tcp, key)
                while self._is_member() == member:
                    await trio.sleep(JOIN_POLL_S)
                await trio.sleep(JOIN_POLL_S)  # the answer to host.join or host.leave is on its way
                nursery.cancel_scope.cancel()

    async def _serve_tcp(self, key: bytes) -> None:
        await serve_tcp(self._management, self.handle, key=key)

    def _is_member(self) -> bool:
        return MembershipFile.load(self._config.data_dir) is not None

    @property
    def _management(self) -> str:
        return self._config.bind.get(LinkName("management"), self._config.management)

    async def handle(self, call: Call) -> object:
        if call.method == "host.info":
            return await self._info()
        if call.method == "host.join":
            return self._join(call)
        if call.method == "host.leave":
            return await self._leave(call)
        if call.method in _FORWARDED:
            if self._vmap is None:
                raise NotJoinedError(f"{self._host} belongs to no cluster yet")
            return await self._vmap.call(_FORWARDED[call.method], **call.params)
        raise RemoteProtocolError(f"vpxa has no method {call.method[:40]!r}", code="method")

    async def _info(self) -> dict[str, object]:
        status = await self._process.status()
        membership = MembershipFile.load(self._config.data_dir)
        return {
            "host": self._host,
            "node": self._config.node,
            "cluster": membership.cluster if membership else "",
            "links": dict(self._config.links),
            "cpu_mhz": self._config.cpu_mhz,
            "memory_mib": self._config.memory_mib,
            "containment": status.containment,
            "lease": status.lease_token,
            "agents": {agent.name: agent.pid for agent in status.agents},
        }

    def _join(self, call: Call) -> dict[str, object]:
        """Take the cluster key and the primaries' addresses; the aam does the rest."""
        if MembershipFile.load(self._config.data_dir) is not None:
            raise ConfigError(f"{self._host} belongs to a cluster already", field="cluster")
        sealed, primaries = call.params.get("sealed"), call.params.get("primaries")
        if not isinstance(sealed, bytes) or not isinstance(primaries, Mapping):
            raise RemoteProtocolError("host.join: expected sealed and primaries", code="params")
        if call.text("cluster") != self._config.cluster:
            raise ConfigError(
                f"{self._host} is configured for cluster {self._config.cluster!r}, not {call.text('cluster')!r}",
                field="cluster",
            )
        token_path = self._config.data_dir / JOIN_TOKEN
        key = unseal(make_token(token_path), sealed)
        # A join that was interrupted is repeated: its key is there already.
        if not self._config.key_path.exists() or load_key(self._config.key_path) != key:
            write_key(self._config.key_path, key)
        self._put_aside()
        addresses: Addresses = {
            NodeId(str(node)): {LinkName(str(link)): str(address) for link, address in links.items()}
            for node, links in cast(Mapping[str, Mapping[str, str]], primaries).items()
        }
        MembershipFile(self._config.cluster, {}, addresses, fresh_id().hex()).save(self._config.data_dir)
        token_path.unlink()
        self._joined.set()
        return {"host": self._host}

    def _put_aside(self) -> None:
        """What an earlier membership left: its replica was retired when the host was removed, and its peers are not ours."""
        store = records_path(self._config)
        for path in (store, *(Path(f"{store}{end}") for end in ("-wal", "-shm")), self._config.data_dir / FT_HOSTS):
            if path.exists():
                path.replace(f"{path}.left")
                logger.warning("%s is from an earlier membership: kept as %s.left", path, path.name)

    async def _leave(self, call: Call) -> dict[str, object]:
        """Forget the cluster: its file and its key; aam and VMAP follow the file, and a new join token is made.

        ``removed``: the center or an administrator says that the host is removed; else our own replica must not show it as
        registered. A host that was away when it was removed never hears of it: the members speak to it no more.
        """
        if not self._is_member():
            raise NotJoinedError(f"{self._host} belongs to no cluster")
        if call.params.get("removed") is not True and self._host in self._vms.agent.inventory.hosts:
            raise OperationFailedError(
                f"{self._host} is registered, as far as it has heard: 'ha-core host remove {self._host}' does it all; "
                "if that was done while this host could not be reached, say --force"
            )
        alive = sorted(run.name for run in await self._process.list() if run.state not in ("stopped", "failed"))
        if alive:
            raise OperationFailedError(f"{self._host}: {', '.join(alive)} still runs here: stop it, or wait for its deadline")
        (self._run_dir / PRIMARIES).unlink(missing_ok=True)  # the guard asks nobody any more
        MembershipFile.remove(self._config.data_dir)
        self._config.key_path.unlink(missing_ok=True)
        logger.warning("left the cluster; %s has the token to join again", self._config.data_dir / JOIN_TOKEN)
        return {"host": self._host}
