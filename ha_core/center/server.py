"""What the center answers: the command line asks it, it asks the vpxa of some host, and the database decides."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TypeVar, cast

import attrs
import trio

from ha_core.center.hosts import Hosts, call_host
from ha_core.center.tables import Row, View, host_rows, notes, path_rows, vm_rows, waiting_of
from ha_core.errors import CompactedError, HAError, OperationFailedError, RemoteProtocolError
from ha_core.ids import HostName, VmName
from ha_core.machines.explain import explain_host, explain_vm, sentence, story
from ha_core.machines.failover import commands
from ha_core.machines.failover.commands import Command, Outcome
from ha_core.machines.failover.inventory import Inventory
from ha_core.machines.failover.planner import Waiting
from ha_core.machines.failover.records import (
    PREFIX,
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

VIEW_S = 1.0
"""How long one host may take to say how it is: all are asked at once, and a table shall not wait long for the dead."""
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
            "host.fenced": self._fenced,
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

    async def _command(self, about: str, command: Command) -> Outcome:
        """Raises OperationFailedError: whom or what the command is ``about``, and the database's reason."""
        answer = await self._hosts.call("cluster.call", name=command.name, args=list(command.args()))
        outcome = Outcome.decode(tuple(cast(Sequence[Plain], answer)))
        if not outcome.done:
            raise OperationFailedError(f"{about}: {outcome.reason}")
        return outcome

    async def _read(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        """All records under a prefix, as they were at one revision."""
        found: list[tuple[bytes, bytes]] = []
        at = 0
        while True:
            after = found[-1][0] if found else b""
            try:
                answer = cast(Answer, await self._hosts.call("cluster.read", prefix=prefix, after=after, at=at))
            except CompactedError:  # much has changed since the first page
                found, at = [], 0
                continue
            found += [(key, value) for key, value in cast(Sequence[tuple[bytes, bytes]], answer["records"])]
            if not answer["more"]:
                return found
            at = cast(int, answer["revision"])

    async def _records(self, kind: type[R]) -> list[R]:
        return [kind.decode(value) for _, value in await self._read(kind.prefix())]

    async def _views(self, hosts: Sequence[Host]) -> Mapping[HostName, View | str]:
        """What each of these hosts says of itself, all asked at once; a text for those that do not answer."""
        views: dict[HostName, View | str] = {}

        async def ask(host: Host) -> None:
            try:
                views[host.name] = cast(View, await call_host(host.management, self._key, "cluster.status", limit_s=VIEW_S))
            except HAError as exc:
                views[host.name] = str(exc)

        self._hosts.learn([host.management for host in hosts])
        async with trio.open_nursery() as nursery:
            for host in hosts:
                nursery.start_soon(ask, host)
        return views

    # -- the cluster --

    async def _status(self, call: Call) -> Answer:
        status, hosts = await self._members(), await self._records(Host)
        views = await self._views(hosts)
        (settings,) = await self._records(Settings) or [Settings()]
        return {
            **status, "mode": settings.mode.value, "notes": notes(status, hosts, settings),
            "hosts": host_rows(hosts, await self._records(Lease), status, views),
            "vms": vm_rows(await self._records(Vm), await self._records(Run), waiting_of(views.values())),
        }  # fmt: skip

    async def _members(self) -> Answer:
        return cast(Answer, await self._hosts.call("cluster.status"))

    async def _mode(self, call: Call) -> Answer:
        mode = _choice(call, "mode", Mode)
        (settings,) = await self._records(Settings) or [Settings()]
        await self._command("the cluster", commands.SetSettings.of(attrs.evolve(settings, mode=mode)))
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
        await self._command(name, commands.RegisterHost.of(host))
        status = await self._members()
        if not joined:
            sealed = seal(token, self._key)
            await call_host(
                address, token, "host.join", cluster=status["cluster"], sealed=sealed, primaries=status["primaries"]
            )  # fmt: skip
        known = notes(status, await self._records(Host), Settings())
        return {"name": name, "primaries": status["primaries"], "was_member": joined, "notes": known}

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

    async def _list_hosts(self, call: Call) -> list[Row]:
        status, hosts = await self._members(), await self._records(Host)
        return host_rows(hosts, await self._records(Lease), status, await self._views(hosts))

    async def _list_paths(self, call: Call) -> list[Row]:
        return path_rows(await self._views(await self._records(Host)))

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
        await self._command(name, commands.RemoveHost(name))
        # Its own replica may never hear that it is a member no longer: from here on only the others are asked.
        self._hosts.forget(known.management)
        try:
            await self._until_no_member(name)
            await call_host(known.management, self._key, "host.leave", removed=True)
        except HAError as exc:
            hint = f"when {name} is back, run there: ha-core host leave --force --config FILE"
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
        name = HostName(call.text("name"))
        await self._command(name, commands.SetHostState(name, state))
        return {"name": name, "state": state.value}

    async def _fenced(self, call: Call) -> Answer:
        """An administrator says that a host is off: what nobody else can tell, if its lease has no deadline or its VMs outlive
        it. Not of one that answers."""
        name = HostName(call.text("name"))
        lease = next((one for one in await self._records(Lease) if one.host == name), None)
        if lease is None:
            raise OperationFailedError(f"{name}: it never had a lease")
        known = next((one for one in await self._records(Host) if one.name == name), None)
        if known is not None and known.management and await self._answers(known.management):
            raise OperationFailedError(f"{name} answers: it is not off")
        await self._command(name, commands.Fenced(name, lease.token, "an administrator says that it is off"))
        return {"name": name}

    async def _answers(self, address: str) -> bool:
        try:
            await call_host(address, self._key, "host.info")
        except HAError:
            return False
        return True

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
        known = {one.name for one in await self._records(Vm)}
        await self._check_vm(vm, known)
        await self._command(vm.name, commands.DefineVm.of(vm))
        return {"name": vm.name, "was_known": vm.name in known}

    async def _check_vm(self, vm: Vm, known: Collection[str]) -> None:
        """The mistakes that the database would accept, and that nobody would notice before it is too late."""
        if not _VM_NAME.fullmatch(vm.name):
            raise OperationFailedError(f"{vm.name!r} is no name of a VM: expected letters, digits, '.', '_', '-', at most 63")
        if vm.cpu_mhz < 0 or vm.memory_mib < 0 or min(vm.shutdown_ns, vm.stop_ns, vm.start_ns) < -1:
            raise OperationFailedError(f"{vm.name}: its capacity and its times cannot be negative")
        missing = [name for name in vm.after if name not in known and name != vm.name]
        if missing:
            raise OperationFailedError(f"{vm.name}: cannot wait for {', '.join(missing)}: there is no such VM; add it first")
        hosts = [host.name for host in await self._records(Host)] if vm.host else []
        if vm.host and vm.host not in hosts:
            raise OperationFailedError(f"{vm.name}: there is no host {vm.host}; there are {', '.join(hosts)}")

    async def _remove_vm(self, call: Call) -> Answer:
        name = VmName(call.text("name"))
        if name not in {vm.name for vm in await self._records(Vm)}:
            raise OperationFailedError(f"{name}: there is no such VM")
        await self._command(name, commands.RemoveVm(name))
        return {"name": name}

    async def _want_vm(self, call: Call) -> Answer:
        wanted = _choice(call, "wanted", Wanted)
        name = VmName(call.text("name"))
        await self._command(name, commands.WantVm(name, wanted))
        return {"name": name, "wanted": wanted.value}

    async def _move_vm(self, call: Call) -> Answer:
        name, host = VmName(call.text("name")), HostName(call.text("host"))
        await self._command(f"{name} to {host}", commands.MoveVm(name, host))
        return {"name": name, "host": host}

    async def _list_vms(self, call: Call) -> list[Row]:
        return vm_rows(await self._records(Vm), await self._records(Run), await self._waiting(await self._records(Host)))

    async def _waiting(self, hosts: Sequence[Host]) -> Sequence[Waiting]:
        """Only the coordinator knows: the active primary, if it can be reached from here."""
        status = await self._members()
        leads = [host for host in hosts if status["leader"] == f"aam@{host.name}"]
        return waiting_of((await self._views(leads)).values())

    async def _explain(self, call: Call) -> Answer:
        """``lines`` for people, ``decisions`` for programs, oldest first: about a VM, about a host, or all that is kept."""
        vm, host = VmName(call.text("vm", "")), HostName(call.text("host", ""))
        if vm and host:
            raise RemoteProtocolError("explain: a VM or a host, not both", code="params")
        inventory = Inventory()
        inventory.restore(0, await self._read(PREFIX), 0)
        told = story(inventory.decisions.values(), vm=vm, host=host)
        if vm:
            lines = explain_vm(inventory, vm, await self._waiting(list(inventory.hosts.values())))
        elif host:
            lines = explain_host(inventory, host)
        else:
            lines = [sentence(one) for one in told]
        if not told and vm not in inventory.vms and host not in inventory.hosts and (vm or host):
            raise OperationFailedError(lines[-1])
        return {"lines": lines, "decisions": [attrs.asdict(one) for one in told]}


def _choice(call: Call, name: str, kind: type[E]) -> E:
    value = call.text(name)
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(str(one.value) for one in kind)
        raise RemoteProtocolError(f"{call.method}: {name}: expected one of {known}, found {value!r}", code="params") from None


_VM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_TIMES = ("shutdown", "stop", "start")


def _plain(value: object) -> Plain:
    """A driver's option as records keep it: a table becomes pairs."""
    return plain(sorted(value.items()) if isinstance(value, dict) else value)
