"""Handling received messages inside a group: the effects, the step of the cursor, dead letters and replies, all in one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from struct import Struct
from typing import Final, TypeVarTuple

import attrs
import outcome

from ha_core.errors import OutboxFullError, invariant
from ha_core.ids import NodeId
from ha_core.machines.durable import REPLY_PREFIX
from ha_core.machines.durable_events import Attempt, Batch, RunBatch
from ha_core.machines.handshake import SeenBoot
from ha_core.storage.sqlite_transaction import Transaction

Ts = TypeVarTuple("Ts")

BOOT: Final = Struct(">QQ")
"""Counter and nonce: more than the signed integers of SQLite hold."""
SCHEMA: Final = (
    "CREATE TABLE ha_incoming (store BLOB NOT NULL, name TEXT NOT NULL, peer TEXT NOT NULL, cursor INTEGER NOT NULL,"
    " digest BLOB NOT NULL, PRIMARY KEY (store, name)) WITHOUT ROWID",
    "CREATE TABLE ha_boots (store BLOB NOT NULL PRIMARY KEY, peer TEXT NOT NULL, boot BLOB NOT NULL,"
    " digest BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE ha_attempts (store BLOB NOT NULL, name TEXT NOT NULL, number INTEGER NOT NULL, size INTEGER NOT NULL,"
    " count INTEGER NOT NULL, upto INTEGER NOT NULL, PRIMARY KEY (store, name)) WITHOUT ROWID",
    "CREATE TABLE ha_dead_letters (store BLOB NOT NULL, name TEXT NOT NULL, number INTEGER NOT NULL, peer TEXT NOT NULL,"
    " body BLOB NOT NULL, error TEXT NOT NULL, created_s REAL NOT NULL, PRIMARY KEY (store, name, number)) WITHOUT ROWID",
    "CREATE TABLE ha_requests (peer TEXT NOT NULL, name TEXT NOT NULL, number INTEGER NOT NULL, reply BLOB,"
    " reply_store BLOB, reply_number INTEGER, PRIMARY KEY (peer, name, number)) WITHOUT ROWID",
)


@attrs.frozen
class Delivered:
    """How far a delivery came: the cursor and its digest, and what message ``cursor`` + 1 raised (empty: nothing)."""

    cursor: int
    digest: bytes
    error: str = ""
    value: object = None
    blocked: bool = False
    """There was no room, on the disk or in the outbox: nobody's fault, to be tried again."""


def deliver(
    tx: Transaction, batch: RunBatch, to: NodeId, handler: Callable[[Transaction, Batch], object], max_batch: int
) -> Delivered:
    """Handle ``batch`` in pieces of ``max_batch``; a piece that raises is tried again message by message.

    What succeeded before a message that keeps raising is kept, and the cursor stands before it.
    """
    done = 0
    failure: BaseException | None = None
    peer, store, name, first, bodies = batch.peer, batch.store, batch.name, batch.first, batch.bodies
    attempt = tx.attempt
    while done < len(bodies):
        piece = bodies if max_batch >= len(bodies) else bodies[done : done + max_batch]
        failure = attempt(handler, Batch(peer, store, to, name, first + done, piece))
        if failure is None:
            done += len(piece)
            continue
        if len(piece) > 1:
            handled, failure = _one_by_one(tx, batch, to, handler, done, len(piece))
            done += handled
        if failure is not None:
            break
    if isinstance(failure, OutboxFullError):
        return attrs.evolve(_step(tx, batch, done, ""), blocked=True)
    return _step(tx, batch, done, "" if failure is None else text_of(failure))


def _one_by_one(
    tx: Transaction, batch: RunBatch, to: NodeId, handler: Callable[[Transaction, Batch], object], start: int, count: int
) -> tuple[int, BaseException | None]:
    for at in range(start, start + count):
        one = Batch(batch.peer, batch.store, to, batch.name, batch.first + at, batch.bodies[at : at + 1])
        failure = tx.attempt(handler, one)
        if failure is not None:
            return at - start, failure
    return count, None


def commit_inbox(
    tx: Transaction, batch: RunBatch, messages: Batch, apply: Callable[[Transaction, Batch, *Ts], object], *args: *Ts
) -> outcome.Outcome[object]:
    """Handle a whole batch with one function; if it raises, nothing of it happened and the cursor stays."""
    result = tx.within(apply, messages, *args)
    if isinstance(result, outcome.Value):
        return outcome.Value(attrs.evolve(_step(tx, batch, len(batch.bodies), ""), value=result.value))
    return result


def set_aside(tx: Transaction, batch: RunBatch) -> Delivered:
    """What is in ``batch`` becomes dead letters; the cursor steps over it (I12)."""
    for number, body in enumerate(batch.bodies, batch.first):
        tx.own(
            "INSERT INTO ha_dead_letters VALUES (?,?,?,?,?,?,?)",
            (batch.store, batch.name, number, batch.peer, body, batch.dead_letter, time.time()),
        )
    return _step(tx, batch, len(batch.bodies), "")


def record_boots(tx: Transaction, boots: Iterable[SeenBoot]) -> None:
    """Write down which processes of other stores were seen."""
    for seen in boots:
        row = (seen.store, seen.peer, BOOT.pack(seen.boot.counter, seen.boot.nonce), seen.boots_digest)
        tx.own("INSERT OR REPLACE INTO ha_boots VALUES (?,?,?,?)", row)


def record_attempt(tx: Transaction, batch: RunBatch, attempt: Attempt) -> None:
    """Make durable that these messages are about to be handled, in case that ends the process."""
    tx.own(
        "INSERT INTO ha_incoming VALUES (?,?,?,0,?) ON CONFLICT (store, name) DO NOTHING",
        (batch.store, batch.name, batch.peer, bytes(16)),
    )
    tx.own(
        "INSERT OR REPLACE INTO ha_attempts VALUES (?,?,?,?,?,?)",
        (batch.store, batch.name, attempt.number, attempt.size, attempt.count, attempt.upto),
    )


def store_replies(tx: Transaction, batch: RunBatch) -> Delivered:
    """Keep replies until they are received; one to no open request becomes a dead letter."""
    name = batch.name.removeprefix(REPLY_PREFIX)
    for number, body in enumerate(batch.bodies, batch.first):
        request = int.from_bytes(body[:8], "big")
        updated = tx.own(
            "UPDATE ha_requests SET reply=?, reply_store=?, reply_number=?"
            " WHERE peer=? AND name=? AND number=? AND reply IS NULL",
            (body[8:], batch.store, number, batch.peer, name, request),
        ).rowcount
        if updated != 1:
            tx.own(
                "INSERT INTO ha_dead_letters VALUES (?,?,?,?,?,?,?)",
                (batch.store, batch.name, number, batch.peer, body, f"no open request {request}", time.time()),
            )
    return _step(tx, batch, len(batch.bodies), "")


def _step(tx: Transaction, batch: RunBatch, done: int, error: str) -> Delivered:
    """Move the cursor over ``done`` messages, in the transaction that holds their effects."""
    cursor = batch.first - 1
    if done == 0:
        return Delivered(cursor, b"", error)
    after, digest = cursor + done, batch.digests[done - 1]
    if cursor:
        stepped = tx.own(
            "UPDATE ha_incoming SET cursor=?, digest=?, peer=? WHERE store=? AND name=? AND cursor=?",
            (after, digest, batch.peer, batch.store, batch.name, cursor),
        ).rowcount
    else:
        stepped = tx.own(
            "INSERT INTO ha_incoming VALUES (?,?,?,?,?) ON CONFLICT (store, name)"
            " DO UPDATE SET cursor=excluded.cursor, digest=excluded.digest, peer=excluded.peer WHERE cursor=0",
            (batch.store, batch.name, batch.peer, after, digest),
        ).rowcount
    invariant(stepped == 1, "a cursor steps from where it stands (I3)", channel=batch.name, cursor=cursor)
    if batch.attempt is not None or batch.dead_letter:
        tx.own("DELETE FROM ha_attempts WHERE store=? AND name=?", (batch.store, batch.name))
    return Delivered(after, digest, error)


def text_of(failure: BaseException) -> str:
    """One line for logs and dead letters."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:1000]
