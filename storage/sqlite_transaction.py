"""What an application's function gets: SQL and sends, inside one SAVEPOINT of the group's transaction.

Rules:

* The function may not end the transaction, reach other files, change settings or touch our tables: an authorizer refuses it
  when a statement is prepared (not at each run: statements are cached).
* OR ROLLBACK, RAISE(ROLLBACK), a full disk or an interrupt end the *group's* transaction, unseen. So ``in_transaction`` is
  checked around every statement, and once it is false everything raises ``GroupEndedError`` until the group is run again (M35).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from types import CoroutineType
from typing import Final, TypeVarTuple

import attrs
import outcome

from ha_core.errors import LocalProtocolError, OutboxFullError, StorageError
from ha_core.ids import ChannelName, MessageId, NodeId, StoreId
from ha_core.machines.durable import REPLY_PREFIX
from ha_core.machines.durable_events import Message
from ha_core.storage.sqlite_outbox import Outbox, OutgoingRecord, check_name

Ts = TypeVarTuple("Ts")
SqlValue = None | int | float | str | bytes
Row = tuple[SqlValue, ...]

MAX_OPEN_REQUESTS: Final = 1024
"""On each channel: every request reserves room for its reply at the node that answers."""
OWN_PREFIX: Final = "ha_"
"""Of our tables."""
FATAL: Final = frozenset(
    {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
)
"""Errors after which nobody knows what the file holds."""
_FORBIDDEN: Final = {
    sqlite3.SQLITE_TRANSACTION: "BEGIN, COMMIT or ROLLBACK",
    sqlite3.SQLITE_SAVEPOINT: "SAVEPOINT or RELEASE",
    sqlite3.SQLITE_ATTACH: "ATTACH",
    sqlite3.SQLITE_DETACH: "DETACH",
    sqlite3.SQLITE_PRAGMA: "PRAGMA",
}
_BY_FIRST: Final = frozenset({sqlite3.SQLITE_READ, sqlite3.SQLITE_UPDATE})
"""Here the second argument is a column."""
_STEPS: Final = 20_000
"""Steps of SQLite's machine between two looks at the clock: about a millisecond."""


class GroupEndedError(BaseException):
    """The group's transaction ended under a function; no ``except Exception`` of an application may hide it."""

    def __init__(self, cause: BaseException | None = None) -> None:
        super().__init__("the transaction ended: it was rolled back and is run again")
        self.cause = cause


@attrs.frozen
class DeadLetter:
    """A message that was set aside after its last attempt, in the transaction in which its channel's cursor stepped over it.

    A reply that nobody waited for becomes one, too; its channel is ``ha.reply/`` and the request's.
    """

    message: Message
    error: str
    created_s: float
    """Wall clock, as ``time.time``."""


class Transaction:
    """``tx`` of an application's function; valid only while that function runs, on the store's thread."""

    def __init__(
        self, database: sqlite3.Connection, outbox: Outbox, store: StoreId, owner: NodeId, mark: str, max_transaction_s: float
    ) -> None:
        self._database = database
        self._cursor = database.cursor()
        self._own = database.cursor()
        self.cursors = (self._cursor, self._own)
        """For the store to close."""
        self._outbox = outbox
        self._store = store
        self._owner = owner
        self._mark = mark
        self._savepoint = mark + "SAVEPOINT ha_function"
        self._rollback_to = mark + "ROLLBACK TO ha_function"
        self._release = mark + "RELEASE ha_function"
        self._max_ns = round(max_transaction_s * 1e9)
        self._deadline_ns = 0
        self._open = False
        self._guarded = False
        self._denied = ""
        self._serial = 0
        self._touched: list[tuple[OutgoingRecord, int]] = []
        self._doom: StorageError | None = None
        """Why the function is rolled back even if it hides what it was told."""
        self.requested: set[ChannelName] = set()
        """Channels on which the group made requests."""
        self.timed_out = False
        """The group ended because a function ran too long."""
        self._function: object = None
        self.value: object = None
        """What the last function returned."""
        database.set_authorizer(self._authorize)
        database.set_progress_handler(self._look_at_clock, _STEPS)

    # -- for applications --

    def execute(self, sql: str, parameters: Sequence[SqlValue] = ()) -> list[Row]:
        """Run one statement; all of its rows.

        Raises:
            LocalProtocolError: the statement is not for transactions (COMMIT, PRAGMA, our tables, ...).
            sqlite3.Error: what SQLite says of it (a constraint, a syntax error).
        """
        if not (self._open and self._database.in_transaction):
            self._refuse()
        self._guarded = True
        try:
            rows = self._cursor.execute(sql, parameters).fetchall()
        except sqlite3.Error as exc:
            raise self._translate(exc) from exc
        finally:
            self._guarded = False
        if not self._database.in_transaction:
            raise GroupEndedError
        return rows

    def executemany(self, sql: str, rows: Iterable[Sequence[SqlValue]]) -> None:
        """Run one statement for every row of parameters; for what it raises see ``execute``."""
        if not (self._open and self._database.in_transaction):
            self._refuse()
        self._guarded = True
        try:
            self._cursor.executemany(sql, rows)
        except sqlite3.Error as exc:
            raise self._translate(exc) from exc
        finally:
            self._guarded = False
        if not self._database.in_transaction:
            raise GroupEndedError

    def send(self, to: NodeId, channel: str, body: bytes) -> MessageId:
        """Send ``body`` if and only if this transaction commits; never waits.

        Raises:
            OutboxFullError: the channel has no room; the function is rolled back even if it goes on.
            ForkedError: the channel stands still until an administrator decides.
            LocalProtocolError: an unknown node, a wrong name, a message over 1 MiB.
        """
        record = self._record(to, ChannelName(channel))
        return self._send(record, body)

    def request(self, to: NodeId, channel: str, body: bytes) -> MessageId:
        """``send`` that will be answered: pass the id to ``receive_reply``.

        Raises:
            OutboxFullError: also if 1,024 requests on this channel wait for their replies to be received.
        """
        name = ChannelName(channel)
        record = self._record(to, name)
        query = "SELECT count(*) FROM ha_requests WHERE peer=? AND name=?"
        if self._execute_own(query, (to, name)).fetchone()[0] >= MAX_OPEN_REQUESTS:
            text = f"{to}, channel {channel!r}: {MAX_OPEN_REQUESTS} requests are open: receive replies"
            self._doom = OutboxFullError(text, to=to, channel=channel)
            raise self._doom
        message = self._send(record, body)
        self._execute_own("INSERT INTO ha_requests (peer, name, number) VALUES (?,?,?)", (to, name, message.number))
        self.requested.add(name)
        return message

    def reply(self, request: Message, body: bytes) -> MessageId:
        """Answer ``request``, if and only if this transaction commits; there is always room for it."""
        if not self._open:
            self._refuse()
        name = ChannelName(REPLY_PREFIX + request.channel)
        record = self._touch(self._outbox.open(request.sender, name))
        number = self._outbox.add(record, request.number.to_bytes(8, "big") + _bytes(body), admit=False)
        return MessageId(self._store, request.sender, name, number)

    def dead_letters(self, channel: str | None = None, *, limit: int = 100) -> list[DeadLetter]:
        """Messages that were set aside, oldest first; on ``channel``, or on all. To retry or to drop one: ``take_dead_letter``."""
        rows = self._execute_own(
            "SELECT store, name, number, peer, body, error, created_s FROM ha_dead_letters WHERE ?1 IS NULL OR name=?1"
            " ORDER BY created_s, store, name, number LIMIT ?2",
            (channel, limit),
        ).fetchall()
        return [
            DeadLetter(Message(peer, store, self._owner, name, number, body), error, created_s)
            for store, name, number, peer, body, error, created_s in rows
        ]

    def take_dead_letter(self, message: MessageId) -> Message:
        """The message of a dead letter, which is one no longer if this transaction commits.

        To retry, handle it in the same function: the effect happens once, but later than its channel's order says. To drop it,
        do nothing with it.

        Raises:
            LocalProtocolError: there is no such dead letter; it was taken already.
        """
        key = (message.store, message.channel, message.number)
        where = "FROM ha_dead_letters WHERE store=? AND name=? AND number=?"
        row = self._execute_own(f"SELECT peer, body {where}", key).fetchone()
        if row is None:
            raise LocalProtocolError(
                f"message {message.number} on {message.channel!r} is no dead letter here, or is one no longer"
            )
        self._execute_own(f"DELETE {where}", key)
        return Message(row[0], message.store, self._owner, message.channel, message.number, row[1])

    # -- for the store --

    def within(self, function: Callable[[Transaction, *Ts], object], *args: *Ts) -> outcome.Outcome[object]:
        """Run ``function`` under a SAVEPOINT of its own: done, or undone with what it raised.

        Raises:
            GroupEndedError: the whole group was rolled back under it.
        """
        failure = self.attempt(function, *args)
        return outcome.Value(self.value) if failure is None else outcome.Error(failure)

    def attempt(self, function: Callable[[Transaction, *Ts], object], *args: *Ts) -> BaseException | None:
        """``within`` for those who run many functions: what it raised, None if it is done; its value is ``value``."""
        own = self._own.execute
        own(self._savepoint)
        self._serial += 1
        if self._touched:
            self._touched.clear()
        self._function = function
        self._deadline_ns = time.monotonic_ns() + self._max_ns
        self._open = True
        try:
            self.value = value = function(self, *args)
            if self._doom is not None:
                raise self._doom
            if type(value) is CoroutineType:
                value.close()
                raise LocalProtocolError(f"{name_of(function)} is async: a transaction takes plain functions")
        except BaseException as exc:  # noqa: ASYNC103 - whatever it is goes to the caller; no trio on this thread
            self._open = False
            self._deadline_ns = 0
            self._doom = None
            if isinstance(exc, GroupEndedError):
                raise
            if not self._database.in_transaction:
                raise GroupEndedError(exc) from exc  # noqa: ASYNC104
            self.timed_out = False
            for record, count in self._touched:
                self._outbox.truncate(record, count)
            own(self._rollback_to)
            own(self._release)
            return exc  # noqa: ASYNC104
        self._open = False
        self._deadline_ns = 0
        if not self._database.in_transaction:
            raise GroupEndedError
        own(self._release)
        return None

    def own(self, sql: str, parameters: Sequence[SqlValue] = ()) -> sqlite3.Cursor:
        """A statement of ours, between functions."""
        return self._own.execute(self._mark + sql, parameters)

    # -- inside --

    def _execute_own(self, sql: str, parameters: Sequence[SqlValue]) -> sqlite3.Cursor:
        if not (self._open and self._database.in_transaction):
            self._refuse()
        try:
            return self._own.execute(self._mark + sql, parameters)
        except sqlite3.Error as exc:
            raise self._translate(exc) from exc

    def _record(self, to: NodeId, name: ChannelName) -> OutgoingRecord:
        if not self._open:
            self._refuse()
        record = self._outbox.records.get((to, name))
        if record is None or record.forked:
            check_name(name)
            record = self._outbox.open(to, name)
        return record if record.touched == self._serial else self._touch(record)

    def _touch(self, record: OutgoingRecord) -> OutgoingRecord:
        if record.touched != self._serial:
            record.touched = self._serial
            self._touched.append((record, len(record.pending)))
        return record

    def _send(self, record: OutgoingRecord, body: bytes) -> MessageId:
        try:
            number = self._outbox.add(record, body if type(body) is bytes else _bytes(body))
        except OutboxFullError as exc:
            self._doom = exc
            start = next(count for one, count in self._touched if one is record)
            self._outbox.refused(record, start, len(body))
            raise
        return MessageId(self._store, record.to, record.name, number)

    def _refuse(self) -> None:
        if self._open:
            raise GroupEndedError
        raise LocalProtocolError("this transaction is over: use tx only inside the function that it was given to")

    def _translate(self, exc: sqlite3.Error) -> BaseException:
        code = (exc.sqlite_errorcode if hasattr(exc, "sqlite_errorcode") else 0) & 0xFF
        if code in FATAL or code == sqlite3.SQLITE_FULL or not self._database.in_transaction:
            return GroupEndedError(exc)
        if code == sqlite3.SQLITE_INTERRUPT:
            self._doom = StorageError(f"{name_of(self._function)} ran longer than max_transaction_s allows and was rolled back")
            return self._doom
        if code == sqlite3.SQLITE_AUTH:
            return LocalProtocolError(f"{self._denied or 'this statement'}: not inside a transaction of ha-core")
        return exc

    def _authorize(self, action: int, one: str | None, two: str | None, database: str | None, trigger: str | None) -> int:
        if not self._guarded:
            return sqlite3.SQLITE_OK
        if action in _FORBIDDEN:
            self._denied = _FORBIDDEN[action]
            return sqlite3.SQLITE_DENY
        names = (one,) if action in _BY_FIRST else (one, two)
        for name in names:
            if name is not None and name[:3].lower() == OWN_PREFIX:
                self._denied = f"table {name} belongs to ha-core"
                return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    def _look_at_clock(self) -> int:
        if self._deadline_ns and time.monotonic_ns() > self._deadline_ns:
            self.timed_out = True
            return 1
        return 0


def _bytes(body: object) -> bytes:
    if isinstance(body, bytes):
        return body
    if isinstance(body, bytearray | memoryview):
        return bytes(body)
    raise LocalProtocolError(f"a message is bytes, not {type(body).__name__}")


def name_of(function: object) -> str:
    """What an application calls its function, for errors that name it."""
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__qualname__", None) or inner)
