"""What the center answers: the command line asks it, it asks the vpxa of some host, and the database decides."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TypeVar, cast

import attrs
import trio

from ha_core.center.hosts import Hosts, call_host
from ha_core.errors import CompactedError, HAError, OperationFailedError, RemoteProtocolError
from ha_core.ids import HostName, VmName
from ha_core.machines.failover import commands
from ha_core.machines.failover.commands import Command, Outcome
from ha_core.machines.failover.records import (
    Decision,
    Host,
    HostState,
    Lease,
    Mode,
    Priority,
    Record,
    Run,
    Settings,
    Vm,
    Wanted,
    plain,
)
from ha_core.machines.keyvalue.model import Plain
from ha_core.runtime.rpc import Call
from ha_core.security.join import read_token, seal

R = TypeVar("R", bound=Record)
E = TypeVar("E", bound=Enum)
Answer = dict[str, object]

GONE_S = 12.0
"""How long a removed host may take to stop being a member: a change of leader and two changes of the configuration."""
LOOK_S = 0.2


class Center:
    """The handler of the center's requests; ``handle`` is what ``serve_tcp`` calls."""

    def __init__(self, *, key: bytes, vpxas: Sequence[str | Path]) -> None:
        self._key = key
        self._hosts = Hosts(vpxas, key)
        self._methods: Mapping[str, Callable[[Call], Awaitable[object]]] = {
            "cluster.status": self._status,
            "cluster.mode": self._mode,
            "host.add": self._add_host,
            "host.list": self._list_hosts,
            "host.paths": self._list_paths,
            "host.remove": self._remove_host,
            "host.maintenance": self._maintenance,
            "vm.add": self._add_vm,
            "vm.remove": self._remove_vm,
            "vm.want": self._want_vm,
            "vm.move": self._move_vm,
            "vm.list": self._list_vms,
            "explain": self._explain,
        }

    async def handle(self, call: Call) -> object:
        method = self._methods.get(call.method)
        if method is None:
            raise RemoteProtocolError(f"the center has no method {call.method[:40]!r}", code="method")
        return await method(call)

    # -- asking the cluster --

    async def _command(self, command: Command) -> Outcome:
        """Raises OperationFailedError with the database's reason."""
        answer = await self._hosts.call("cluster.call", name=command.name, args=list(command.args()))
        outcome = Outcome.decode(tuple(cast(Sequence[Plain], answer)))
        if not outcome.done:
            raise OperationFailedError(outcome.reason)
        return outcome

    async def _records(self, kind: type[R]) -> list[R]:
        """All of a kind, as they were at one revision."""
        found: list[R] = []
        after, at = b"", 0
        while True:
            try:
                answer = cast(Answer, await self._hosts.call("cluster.read", prefix=kind.prefix(), after=after, at=at))
            except CompactedError:  # much has changed since the first page
                found, after, at = [], b"", 0
                continue
            page = cast(Sequence[tuple[bytes, bytes]], answer["records"])
            found += [kind.decode(value) for _, value in page]
            if not answer["more"]:
                return found
            after, at = page[-1][0], cast(int, answer["revision"])

    # -- the cluster --

    async def _status(self, call: Call) -> Answer:
        status = cast(Answer, await self._hosts.call("cluster.status"))
        hosts = await self._list_hosts(call)
        return {**status, "hosts": hosts, "vms": await self._list_vms(call)}

    async def _mode(self, call: Call) -> Answer:
        mode = _choice(call, "mode", Mode)
        (settings,) = await self._records(Settings) or [Settings()]
        await self._command(commands.SetSettings.of(attrs.evolve(settings, mode=mode)))
        return {"mode": mode.value}

    # -- hosts --

    async def _add_host(self, call: Call) -> Answer:
        """Register a host by its FQDN and hand it the cluster key under its join token; it joins by itself."""
        name, address = HostName(call.text("name")), call.text("address")
        token = read_token(call.text("token"))
        info, joined = await self._info_of(address, token)
        if info["host"] != name:
            raise OperationFailedError(f"{address} is {info['host']}, not {name}: check the name and the address")
        await self._check_that_it_is_the_same(name, address)
        links = cast(Mapping[str, str], info["links"])
        host = Host(
            name, tuple(sorted(links.items())), cast(int, info["cpu_mhz"]), cast(int, info["memory_mib"]),
            management=address, containment=cast(str, info["containment"]),
        )  # fmt: skip
        await self._command(commands.RegisterHost.of(host))
        status = cast(Answer, await self._hosts.call("cluster.status"))
        if not joined:
            sealed = seal(token, self._key)
            await call_host(
                address, token, "host.join", cluster=status["cluster"], sealed=sealed, primaries=status["primaries"]
            )  # fmt: skip
        return {"name": name, "primaries": status["primaries"]}

    async def _info_of(self, address: str, token: bytes) -> tuple[Answer, bool]:
        """What a host says of itself, and whether it holds our key already: the answer to an earlier request may be lost."""
        try:
            return cast(Answer, await call_host(address, token, "host.info")), False
        except RemoteProtocolError:
            pass
        try:
            return cast(Answer, await call_host(address, self._key, "host.info")), True
        except HAError as exc:
            raise OperationFailedError(f"{address}: that is not its join token; its data_dir has it in join.token") from exc

    async def _check_that_it_is_the_same(self, name: HostName, address: str) -> None:
        """Two hosts of one name would take each other's place for ever."""
        known = next((host for host in await self._records(Host) if host.name == name), None)
        held = any(lease.host == name and not lease.revoked for lease in await self._records(Lease))
        if known is not None and known.management != address and held:
            raise OperationFailedError(f"{name} is registered at {known.management} and alive: remove it first")

    async def _list_hosts(self, call: Call) -> list[Answer]:
        status = cast(Answer, await self._hosts.call("cluster.status"))
        leases = {lease.host: lease for lease in await self._records(Lease)}
        hosts = await self._records(Host)
        self._hosts.learn([host.management for host in hosts])
        primaries, learners = cast(list[str], status["voters"]), cast(list[str], status["learners"])
        rows: list[Answer] = []
        for host in hosts:
            node = f"aam@{host.name}"
            lease = leases.get(host.name)
            role = "primary" if node in primaries else "secondary" if node in learners else "not joined"
            rows.append({
                "name": host.name, "state": host.state.value, "role": "active primary" if node == status["leader"] else role,
                "links": dict(host.addresses), "management": host.management, "cpu_mhz": host.cpu_mhz,
                "memory_mib": host.memory_mib, "containment": host.containment, "lease": lease.token if lease else 0,
                "lease_state": "none" if lease is None else "revoked" if lease.revoked else "held",
            })  # fmt: skip
        return rows

    async def _list_paths(self, call: Call) -> list[Answer]:
        """Every path of every host that answers, as that host sees it."""
        rows: list[Answer] = []

        async def ask(host: Host) -> None:
            try:
                status = cast(Answer, await call_host(host.management, self._key, "cluster.status"))
            except HAError as exc:
                rows.append({"host": host.name, "peer": "", "link": "", "state": f"no answer: {exc}", "rtt_ms": ""})
                return
            rows.extend({"host": host.name, **path} for path in cast(list[Answer], status["paths"]))

        async with trio.open_nursery() as nursery:
            for host in await self._records(Host):
                nursery.start_soon(ask, host)
        return sorted(rows, key=lambda row: (str(row["host"]), str(row["peer"]), str(row["link"])))

    async def _remove_host(self, call: Call) -> Answer:
        """Take it from the registered hosts, wait until it is a member no longer, and tell it to leave."""
        name = HostName(call.text("name"))
        hosts = {host.name: host for host in await self._records(Host)}
        known = hosts.pop(name, None)
        if known is None:
            raise OperationFailedError(f"{name}: there is no such host")
        if not hosts:
            raise OperationFailedError(f"{name} is the only host of the cluster: there would be nothing left")
        self._hosts.learn([host.management for host in hosts.values()])
        await self._command(commands.RemoveHost(name))
        # Its own replica may never hear that it is a member no longer: from here on only the others are asked.
        self._hosts.forget(known.management)
        try:
            await self._until_no_member(name)
            await call_host(known.management, self._key, "host.leave", removed=True)
        except HAError as exc:
            hint = f"when {name} is back, run there: ha-core host leave --config FILE"
            return {"name": name, "left": False, "text": f"{name} is removed, but was not told to leave ({exc}); {hint}"}
        return {"name": name, "left": True, "text": f"{name} has left the cluster"}

    async def _until_no_member(self, name: HostName) -> None:
        with trio.move_on_after(GONE_S):
            while True:
                status = cast(Mapping[str, Sequence[str]], await self._hosts.call("cluster.status"))
                if status["leader"] and f"aam@{name}" not in (*status["voters"], *status["learners"]):
                    return
                await trio.sleep(LOOK_S)
        raise OperationFailedError(f"it is still a member after {GONE_S:g} s")

    async def _maintenance(self, call: Call) -> Answer:
        state = HostState.MAINTENANCE if call.params.get("on") else HostState.ONLINE
        await self._command(commands.SetHostState(HostName(call.text("name")), state))
        return {"state": state.value}

    # -- virtual machines --

    async def _add_vm(self, call: Call) -> Answer:
        """Define a VM; parameters are the fields of ``Vm`` with times in seconds, ``options`` those of its driver."""
        params = dict(call.params)
        options = params.pop("options", {})
        if not isinstance(options, dict):
            raise RemoteProtocolError("vm.add: options: expected a map", code="params")
        try:
            seconds = {f"{name}_ns": round(float(params.pop(f"{name}_s")) * 1e9) for name in _TIMES if f"{name}_s" in params}  # type: ignore[arg-type]
            priority = Priority[str(params.pop("priority", "medium")).upper()]
            vm = Vm(
                VmName(call.text("name")), options=tuple((str(k), _plain(v)) for k, v in sorted(options.items())),
                priority=priority, **{key: value for key, value in params.items() if key != "name"}, **seconds,  # type: ignore[arg-type]
            )  # fmt: skip
        except (TypeError, ValueError, KeyError) as exc:
            raise RemoteProtocolError(f"vm.add: {exc}", code="params") from exc
        await self._command(commands.DefineVm.of(vm))
        return {"name": vm.name}

    async def _remove_vm(self, call: Call) -> Answer:
        await self._command(commands.RemoveVm(VmName(call.text("name"))))
        return {}

    async def _want_vm(self, call: Call) -> Answer:
        wanted = _choice(call, "wanted", Wanted)
        await self._command(commands.WantVm(VmName(call.text("name")), wanted))
        return {"wanted": wanted.value}

    async def _move_vm(self, call: Call) -> Answer:
        await self._command(commands.MoveVm(VmName(call.text("name")), HostName(call.text("host"))))
        return {}

    async def _list_vms(self, call: Call) -> list[Answer]:
        runs = {run.vm: run for run in await self._records(Run)}
        rows: list[Answer] = []
        for vm in await self._records(Vm):
            run = runs.get(vm.name)
            rows.append({
                "name": vm.name, "wanted": vm.wanted.value, "priority": vm.priority.name.lower(), "after": list(vm.after),
                "host": run.host if run and not run.free else "", "token": run.token if run else 0,
                "state": "stopped" if run is None else "failed" if run.failed else run.state.value,
                "why": run.why if run else "", "text": run.text if run else "",
            })  # fmt: skip
        return rows

    async def _explain(self, call: Call) -> list[Answer]:
        """The decisions about a VM or a host, oldest first."""
        vm, host = call.text("vm", ""), call.text("host", "")
        found = [one for one in await self._records(Decision) if (not vm or one.vm == vm) and (not host or one.host == host)]
        return [attrs.asdict(one) for one in sorted(found, key=lambda one: one.number)]


def _choice(call: Call, name: str, kind: type[E]) -> E:
    value = call.text(name)
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(str(one.value) for one in kind)
        raise RemoteProtocolError(f"{call.method}: {name}: expected one of {known}, found {value!r}", code="params") from None


_TIMES = ("shutdown", "stop", "start")


def _plain(value: object) -> Plain:
    """A driver's option as records keep it: a table becomes pairs."""
    return plain(sorted(value.items()) if isinstance(value, dict) else value)
