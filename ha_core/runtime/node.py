"""``open_node``: a node of a cluster inside a program. Opens and closes its parts: stores, machine, links, tasks.

Leaving always ends every task, thread and connection of the node, within seconds even if a function hangs; the body's own
exception leaves as it is.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Final

import trio

from ha_core.config import Config, ns
from ha_core.errors import ConfigError, StorageError
from ha_core.ids import Boot, ReplicaId, StoreId
from ha_core.interfaces import RecordStore
from ha_core.machines.contract import Event, PersistFailed
from ha_core.machines.database import DatabaseMachine
from ha_core.machines.database_client import DatabaseClientMachine
from ha_core.machines.durable import DurableMachine
from ha_core.machines.durable_events import Batch, Message
from ha_core.machines.endpoint import EndpointMachine
from ha_core.machines.node import Child, NodeMachine, database_child, durable_child
from ha_core.machines.raft.configuration import Configuration, Member
from ha_core.runtime.deliveries import Inbox
from ha_core.runtime.driver import Driver
from ha_core.runtime.entropy import fresh_id, fresh_rng
from ha_core.runtime.event_queue import Events
from ha_core.runtime.node_shell import Node
from ha_core.runtime.parts import endpoint_shell, open_records
from ha_core.runtime.records import RecordShell, mark_boot
from ha_core.runtime.sessions import SessionChannel
from ha_core.security.key import load_key
from ha_core.storage.sqlite_transaction import Transaction
from ha_core.storage.sqlite_transactions import TransactionStore, open_transaction_store

__all__ = [
    "Batch",
    "Events",
    "Inbox",
    "Message",
    "Node",
    "SessionChannel",
    "Transaction",
    "open_node",
]

logger = logging.getLogger(__name__)

SWITCH_S: Final = 0.0005
"""Between threads of this process: a store's thread that comes back from a flush must not wait 5 ms for its turn."""


class _OpenNode(AbstractAsyncContextManager[Node]):
    """What ``open_node`` returns."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stack = AsyncExitStack()
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._node: Node | None = None

    async def __aenter__(self) -> Node:
        try:
            self._node = await self._open()
        except BaseException:
            await self._close()  # noqa: ASYNC102 - shields itself, for a bounded time
            raise
        self._scope.__enter__()
        return self._node

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> bool:
        try:
            swallowed = self._scope.__exit__(kind, exc, trace)
        finally:
            await self._close()  # noqa: ASYNC102 - as above
        failure = None if self._node is None else self._node.failure
        if failure is not None and (exc is None or swallowed):
            raise failure
        return bool(swallowed)

    async def _close(self) -> None:
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        await self._stack.aclose()

    # -- parts --

    async def _open(self) -> Node:
        config = self._config
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        try:
            config.data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"data_dir: cannot make {config.data_dir}: {exc.strerror}", field="data_dir") from exc
        key = load_key(config.key_path)
        records = None if config.role == "client" else await self._stack.enter_async_context(open_records(config))
        store = await self._open_store(b"" if records is None else records.incarnation)
        endpoint = self._endpoint(key, store)
        children = [] if store is None else [durable_child(_durable(store, config))]
        children.append(await self._database(records, store))
        machine = NodeMachine(endpoint, children)

        self._nursery = await self._stack.enter_async_context(trio.open_nursery())
        node = Node(config, store, endpoint, self._nursery)
        driver = Driver(machine, node.perform, node.collect)
        shell = endpoint_shell(config, driver)
        await shell.open()
        record_shell = None
        if records is not None:
            record_shell = RecordShell(records, lambda event: self._written(node, driver, event))
        node.connect(driver, shell, record_shell, self._scope.cancel)
        await self._nursery.start(self._supervised_start, node, shell.run)
        await self._nursery.start(self._supervised_start, node, driver.run)
        self._nursery.start_soon(self._supervised, node, node.watch_store)
        if record_shell is not None:
            self._nursery.start_soon(self._supervised, node, record_shell.run)
        return node

    async def _open_store(self, replica: bytes) -> TransactionStore | None:
        config = self._config
        if config.store != "sqlite":
            return None
        return await self._stack.enter_async_context(
            open_transaction_store(
                config.data_dir / "app.db",
                owner=config.node,
                replica=replica,
                max_transaction_s=config.max_transaction_s,
                outbox_max_bytes=config.outbox_max_bytes,
            )
        )

    def _endpoint(self, key: bytes, store: TransactionStore | None) -> EndpointMachine:
        config = self._config
        rng = fresh_rng(f"endpoint of {config.node}")
        if store is None:  # nothing durable is promised for this life, so it is one of its own; 0: no need to remember it
            identity = (StoreId(fresh_id()), Boot(0, rng.getrandbits(63)), b"")
        else:
            identity = (store.identity.store, store.identity.boot, store.identity.boots_digest)
        return EndpointMachine(
            node=config.node,
            cluster=config.cluster,
            key=key,
            store=identity[0],
            boot=identity[1],
            boots_digest=identity[2],
            links=config.links,
            profile=config.profile,
            rng=rng,
            seen=() if store is None else store.seen,
        )

    async def _database(self, records: RecordStore | None, store: TransactionStore | None) -> Child:
        config = self._config
        if records is None:
            machine = DatabaseClientMachine(
                config.node,
                sorted(set(config.bootstrap) - {config.node}),
                retry_ns=ns(config.profile.prevote_retry_min_s),
                resend_ns=ns(config.profile.election_max_s),
            )
            return database_child(machine, persists=False)
        recovered = await records.recover()
        mark = b""
        if store is not None:
            mark = store.identity.boot.mark
            await mark_boot(records, recovered, mark, store.identity.marks, f"{config.data_dir}: node.db and app.db")
            await store.vouch()
        bootstrap = None
        if config.node in config.bootstrap:
            members = {node: Member(b"", dict(config.bootstrap[node])) for node in sorted(config.bootstrap)}
            bootstrap = Configuration(incoming=tuple(members), members=members)
        replica = DatabaseMachine(
            node=config.node,
            replica=ReplicaId(records.incarnation),
            profile=config.profile,
            rng=fresh_rng(f"database of {config.node}"),
            recovered=recovered,
            bootstrap=bootstrap,
            cluster=config.cluster,
            mark=mark,
        )
        return database_child(replica)

    # -- tasks --

    async def _supervised(self, node: Node, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except Exception as exc:
            node.fail(_first(exc))

    async def _supervised_start(
        self, node: Node, task: Callable[..., Awaitable[None]], *, task_status: trio.TaskStatus[None]
    ) -> None:
        try:
            await task(task_status=task_status)
        except Exception as exc:
            node.fail(_first(exc))

    def _written(self, node: Node, driver: Driver, event: Event) -> None:
        driver.step(event)  # at once: a commit waits for it
        if isinstance(event, PersistFailed):
            node.fail(StorageError(f"write {event.number} of node.db failed: {event.error}"))


def _durable(store: TransactionStore, config: Config) -> DurableMachine:
    return DurableMachine(
        outgoing=store.outgoing,
        incoming=store.incoming,
        unclean=store.unclean,
        max_attempts=config.message_attempts,
        seen=store.seen,
    )


def _first(exc: BaseException) -> BaseException:
    """The cause itself, out of the groups that nurseries put around it."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def open_node(config: Config) -> AbstractAsyncContextManager[Node]:
    """Run a node while the body runs: ``async with open_node(config) as node``.

    The body's exception leaves as it is. If a part of the node fails, the body is cancelled and NodeFailedError raised, with
    the cause chained.

    Raises:
        ConfigError: the cluster key is missing or readable by others, or a name in the configuration is unknown.
        StoreLockedError: another process runs this node.
        StorageError: a store is damaged, of another node, or cannot be opened.
        TransportError: an address is in use or not ours.
    """
    return _OpenNode(config)
