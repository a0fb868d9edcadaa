"""The state machine's rules, entry by entry."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from ha_core.errors import CompactedError, CorruptRecordError, DecodeError
from ha_core.ids import LeaseToken, LogIndex
from ha_core.machines.keyvalue import KeyValue, KvTransaction, ProcedureError
from ha_core.machines.keyvalue.codec import decode_command, decode_entry, encode_command, encode_entry, problem_of
from ha_core.machines.keyvalue.formats import reply_fields, reply_from
from ha_core.machines.keyvalue.model import (
    Body,
    Call,
    Called,
    Change,
    Command,
    Compact,
    Compare,
    Delete,
    DeletePrefix,
    ExpireLeases,
    ExpireSessions,
    Get,
    Grant,
    Granted,
    Limits,
    OpenSession,
    Outcome,
    Plain,
    Put,
    Record,
    Refusal,
    Refused,
    Relation,
    Reply,
    Revoke,
    SessionOpened,
    SetLimits,
    Step,
    Target,
)
from ha_core.machines.keyvalue.plain import pack, unpack


class Replica:
    """A state machine with a log of its own."""

    def __init__(self, state: KeyValue | None = None) -> None:
        self.state = state or KeyValue()
        self.log: list[bytes] = []

    def run(self, *commands: Command) -> Sequence[Reply]:
        data = encode_entry([encode_command(command) for command in commands])
        self.log.append(data)
        return self.state.apply(LogIndex(self.state.index + 1), data)

    def do(self, body: Body, session: int = 0, sequence: int = 0, floor: int = 0) -> Reply:
        (reply,) = self.run(Command(session, sequence, floor, body))
        return reply

    def put(self, key: bytes, value: bytes, lease: int = 0) -> Reply:
        return self.do(Change(then=(Put(key, value, lease),)))

    def value(self, key: bytes) -> bytes | None:
        record = self.state.get(key)
        return None if record is None else record.value


def refusal(reply: Reply) -> Refusal:
    assert isinstance(reply, Refused), reply
    return reply.code


def test_versions_count_writes_and_restart_after_a_delete() -> None:
    replica = Replica()

    replica.put(b"a", b"1")
    replica.put(b"b", b"1")
    replica.put(b"a", b"2")
    assert replica.state.get(b"a") == Record(b"a", b"2", 1, 3, 2, 0)
    replica.do(Change(then=(Delete(b"a"),)))
    replica.put(b"a", b"3")

    assert replica.state.get(b"a") == Record(b"a", b"3", 5, 5, 1, 0)


def test_a_transaction_is_one_revision_and_sees_its_own_writes() -> None:
    replica = Replica()
    replica.put(b"k/1", b"old")

    reply = replica.do(
        Change(then=(Put(b"k/2", b"new"), Get(b"k/2"), Delete(b"k/1"), Get(b"k/1"), Put(b"k/2", b"newer"), DeletePrefix(b"x")))
    )

    assert isinstance(reply, Outcome)
    assert reply.revision == 2
    assert list(reply.results) == [None, Record(b"k/2", b"new", 2, 2, 1, 0), 1, None, None, 0]
    (first, second) = replica.state.take_changes()
    assert [event.key for event in second.events] == [b"k/2", b"k/1"]
    assert replica.state.get(b"k/2") == Record(b"k/2", b"newer", 2, 2, 1, 0)


def test_a_change_that_changes_nothing_takes_no_revision() -> None:
    replica = Replica()

    replica.do(Change(then=(Delete(b"nothing"), Put(b"a", b"1"), Delete(b"a"), Get(b"a"))))

    assert replica.state.revision == 0
    assert replica.state.take_changes() == []


@pytest.mark.parametrize(
    ("compare", "holds"),
    [
        (Compare.missing(b"none"), True),
        (Compare.missing(b"a"), False),
        (Compare.exists(b"a"), True),
        (Compare.value(b"a", b"2"), True),
        (Compare.value(b"none", b""), True),
        (Compare.unchanged(b"a", 2), True),
        (Compare.unchanged(b"a", 1), False),
        (Compare(b"a", Target.VALUE, Relation.LESS, b"3"), True),
        (Compare(b"a", Target.VALUE, Relation.GREATER, b"3"), False),
        (Compare(b"a", Target.VERSION, Relation.NOT_EQUAL, 1), True),
        (Compare(b"a", Target.CREATE_REVISION, Relation.EQUAL, 1), True),
        (Compare(b"a", Target.MOD_REVISION, Relation.LESS, 3), True),
        (Compare(b"a", Target.LEASE, Relation.EQUAL, 0), True),
    ],
)
def test_compares_choose_the_branch(compare: Compare, holds: bool) -> None:
    replica = Replica()
    replica.put(b"a", b"1")
    replica.put(b"a", b"2")

    reply = replica.do(Change((compare,), (Put(b"then", b""),), (Put(b"otherwise", b""),)))

    assert isinstance(reply, Outcome)
    assert reply.succeeded is holds
    assert (replica.value(b"then") is not None) is holds
    assert (replica.value(b"otherwise") is not None) is not holds


def test_a_page_ends_at_its_limit_and_goes_on_after_its_last_key() -> None:
    replica = Replica()
    for name in (b"c", b"a", b"d", b"b", b"z"):
        replica.put(b"p/" + name, name)
    replica.put(b"q", b"")

    first = replica.state.state.range(b"p/", limit=2)
    second = replica.state.state.range(b"p/", limit=3, after=first.records[-1].key)

    assert [record.value for record in first.records] == [b"a", b"b"]
    assert first.more
    assert [record.value for record in second.records] == [b"c", b"d", b"z"]
    assert not second.more


def test_the_past_is_read_as_it_was_until_it_is_compacted() -> None:
    replica = Replica()
    rng = random.Random(7)
    pasts: list[dict[bytes, bytes]] = [{}]
    for _ in range(60):
        key = bytes([97 + rng.randrange(6)])
        if rng.random() < 0.3 and key in pasts[-1]:
            replica.do(Change(then=(Delete(key),)))
            pasts.append({name: value for name, value in pasts[-1].items() if name != key})
        else:
            value = bytes([rng.randrange(256)])
            replica.put(key, value)
            pasts.append(pasts[-1] | {key: value})

    for revision, past in enumerate(pasts[1:], 1):
        page = replica.state.state.range(b"", limit=100, at=revision)
        assert {record.key: record.value for record in page.records} == past
    replica.do(Compact(30))

    assert replica.state.state.range(b"", limit=100, at=30).revision == 30
    with pytest.raises(CompactedError) as caught:
        replica.state.state.range(b"", limit=100, at=29)
    assert caught.value.first_index == 30


def test_history_is_bounded_by_revisions_and_by_bytes() -> None:
    replica = Replica()
    replica.do(SetLimits(Limits(history_revisions=5, history_bytes=10_000)))
    for number in range(9):
        replica.put(b"k", b"%d" % number)
    assert replica.state.state.compacted == 4

    replica.put(b"k", bytes(9_000))
    replica.put(b"k", bytes(9_000))

    assert replica.state.state.history_bytes <= 10_000
    replica.state.check()


def test_writes_hang_on_a_lease_until_they_are_rewritten_and_end_with_it_together() -> None:
    replica = Replica()
    granted = replica.do(Grant(10**9))
    assert isinstance(granted, Granted)
    token = granted.token
    assert token == replica.state.index

    replica.put(b"a", b"1", token)
    replica.put(b"b", b"1", token)
    replica.put(b"c", b"1", token)
    replica.put(b"c", b"2")
    revision = replica.state.revision
    replica.state.take_changes()
    replica.state.check()
    replica.do(ExpireLeases((token,)))

    assert [record.key for record in replica.state.range(b"")] == [b"c"]
    assert replica.state.revision == revision + 1
    (group,) = replica.state.take_changes()
    assert [event.key for event in group.events] == [b"a", b"b"]
    assert refusal(replica.put(b"a", b"1", token)) is Refusal.LEASE_NOT_FOUND
    assert refusal(replica.do(Revoke(LeaseToken(token)))) is Refusal.LEASE_NOT_FOUND


def test_a_request_of_a_session_is_applied_once_however_often_it_stands_in_the_log() -> None:
    """R40."""
    replica = Replica()
    opened = replica.do(OpenSession())
    assert isinstance(opened, SessionOpened)
    append = Change((Compare.missing(b"a"),), (Put(b"a", b"1"),), (Put(b"twice", b""),))

    first = replica.do(append, opened.session, 1, 1)
    again = replica.do(append, opened.session, 1, 1)

    assert first == again
    assert isinstance(first, Outcome)
    assert first.succeeded
    assert replica.value(b"twice") is None


def test_two_copies_of_a_request_in_one_entry_are_applied_once() -> None:
    replica = Replica()
    opened = replica.do(OpenSession())
    assert isinstance(opened, SessionOpened)
    command = Command(opened.session, 1, 1, Change(then=(Put(b"a", b"1"),)))

    replies = replica.run(command, command)

    assert replies[0] == replies[1]
    assert replica.state.revision == 1


def test_settled_requests_are_forgotten_and_never_applied_again() -> None:
    replica = Replica()
    opened = replica.do(OpenSession())
    assert isinstance(opened, SessionOpened)
    for sequence in range(1, 9):
        replica.do(Change(then=(Put(b"a", b"%d" % sequence),)), opened.session, sequence, sequence)

    assert len(replica.state.sessions[opened.session].replies) == 1
    late = replica.do(Change(then=(Put(b"a", b"late"),)), opened.session, 3, 3)

    assert refusal(late) is Refusal.SETTLED
    assert replica.value(b"a") == b"8"


def test_sessions_end_only_through_the_log_and_only_if_idle() -> None:
    replica = Replica()
    opened = replica.do(OpenSession())
    assert isinstance(opened, SessionOpened)
    replica.do(Change(then=(Put(b"a", b"1"),)), opened.session, 1, 1)

    replica.do(ExpireSessions(((opened.session, opened.session),)))
    assert opened.session in replica.state.sessions, "it was used since"
    replica.do(ExpireSessions(((opened.session, replica.state.sessions[opened.session].last_index),)))

    assert refusal(replica.do(Change(then=(Put(b"a", b"2"),)), opened.session, 2, 2)) is Refusal.SESSION_EXPIRED
    assert replica.value(b"a") == b"1"


def test_one_session_too_many_forgets_the_one_longest_unused() -> None:
    replica = Replica()
    replica.do(SetLimits(Limits(max_sessions=2)))
    one, two = replica.do(OpenSession()), replica.do(OpenSession())
    assert isinstance(one, SessionOpened)
    assert isinstance(two, SessionOpened)
    replica.do(Change(), one.session, 1, 1)

    three = replica.do(OpenSession())

    assert isinstance(three, SessionOpened)
    assert sorted(replica.state.sessions) == [one.session, three.session]


def _count(tx: KvTransaction, index: LogIndex, args: Sequence[Plain]) -> Plain:
    key = b"\x00ha/count"
    value = (tx.get(key) or b"") + b"x"
    tx.put(key, value)
    tx.put(b"\x00ha/at", b"%d" % index)
    if args == ("refuse",):
        raise ProcedureError("not today")
    if args == ("break",):
        raise ZeroDivisionError
    if args == ("wrong",):
        return {"no": "dict"}  # type: ignore[return-value]
    return (len(value), tuple(key for key, _ in tx.range(b"\x00ha/")))


def test_procedures_write_reserved_keys_in_one_revision_and_nobody_else_does() -> None:
    replica = Replica(KeyValue({"count": _count}))

    reply = replica.do(Call("count", ()))

    assert reply == Called((1, (b"\x00ha/at", b"\x00ha/count")), LogIndex(1), replica.state.revision)
    assert replica.state.revision == 1
    assert refusal(replica.put(b"\x00ha/count", b"")) is Refusal.RESERVED
    assert refusal(replica.do(Change(then=(DeletePrefix(b"\x00"),)))) is Refusal.RESERVED
    assert replica.value(b"\x00ha/count") == b"x"


@pytest.mark.parametrize("argument", ["refuse", "break", "wrong"])
def test_a_procedure_that_raises_changes_nothing(argument: str) -> None:
    replica = Replica(KeyValue({"count": _count}))

    assert refusal(replica.do(Call("count", (argument,)))) is Refusal.PROCEDURE
    assert refusal(replica.do(Call("unknown", ()))) is Refusal.PROCEDURE

    assert replica.state.revision == 0
    assert replica.state.index == 2


def test_a_full_database_still_takes_deletes_leases_and_procedures() -> None:
    replica = Replica(KeyValue({"count": _count}))
    replica.do(SetLimits(Limits(max_bytes=4_000, reserve_bytes=1_000)))
    replica.put(b"big", bytes(2_500))

    assert refusal(replica.put(b"more", bytes(500))) is Refusal.QUOTA
    assert isinstance(replica.put(b"big", bytes(2_400)), Outcome), "a write that shrinks"
    assert isinstance(replica.do(Grant(10**9)), Granted)
    assert isinstance(replica.do(Call("count", ())), Called)
    replica.do(Change(then=(Delete(b"big"),)))

    assert isinstance(replica.put(b"more", bytes(500)), Outcome)


BAD_ENTRIES = [
    b"",
    b"\x02\x90",
    b"\x01",
    b"\x01\x90",
    b"\x01\xc1",
    b"\x01" + pack(7),
    b"\x01" + pack(((0, 0, 0),)),
    b"\x01" + pack(((0, 0, 0, 99),)),
    b"\x01" + pack(((-1, 0, 0, 5),)),
    b"\x01" + pack(((0, 0, 0, 1, (), ((0, "text", b"", 0),), ()),)),
    b"\x01" + pack(((0, 0, 0, 1, (), ((0, b"", b"", 0),), ()),)),
    b"\x01" + pack(((0, 0, 0, 1, (), ((0, b"k", b"", 1.5),), ()),)),
    b"\x01" + pack(((0, 0, 0, 1, (), ((9, b"k"),), ()),)),
    b"\x01" + pack(((0, 0, 0, 1, ((b"k", 0, 0, 7),), (), ()),)),
    b"\x01" + pack(((0, 0, 0, 1, ((b"k", 9, 0, 7),), (), ()),)),
    b"\x01" + pack(((0, 0, 0, 1, (), ((2, ""),), ()),)),
    b"\x01" + pack(((0, 0, 0, 1, (), ((2, None),), ()),)),
    b"\x01" + pack(((0, 0, 0, 2, 0),)),
    b"\x01" + pack(((0, 0, 0, 4, "call", (1.5,)),)),
    b"\x01" + pack(((0, 0, 0, 5), (0, 0, 0, 5))),
    b"\x01" + pack(((0, 0, 0, 9, (1, 2)),)),
    b"\x01" + pack(((0, 0, 0, 9, (1 << 20, 0, 10, 1 << 20, 0, 10)),)),
    b"\x01" + b"\x91" * 3000,
    b"\x01\xdd\xff\xff\xff\xff",
]


@pytest.mark.parametrize("data", BAD_ENTRIES)
def test_a_bad_entry_is_refused_and_harmless(data: bytes) -> None:
    replica = Replica()
    replica.put(b"a", b"1")
    before = replica.state.digest

    with pytest.raises(DecodeError):
        decode_entry(data)
    (reply,) = replica.state.apply(LogIndex(2), data)

    assert refusal(reply) is Refusal.BAD
    assert (replica.state.index, replica.state.revision, replica.state.digest) == (2, 1, before)


def test_random_bytes_are_refused_or_are_an_entry() -> None:
    rng = random.Random(11)
    good = encode_entry([encode_command(Command(1, 2, 3, Change((Compare.missing(b"k"),), (Put(b"k", b"v"),), (Get(b"k"),))))])
    for _ in range(2_000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        Replica().state.apply(LogIndex(1), bytes(data))


@pytest.mark.parametrize(
    "body",
    [
        Change(then=(Put(b"", b""),)),
        Change(then=(Put(b"k" * 4097, b""),)),
        Change(then=(Put(b"k", bytes((1 << 20) + 1)),)),
        Change(then=(Put(b"k", bytearray(b"v")),)),  # type: ignore[arg-type]
        Change(then=(Put("k", b""),)),  # type: ignore[arg-type]
        Change(then=tuple(Get(b"k") for _ in range(4097))),
        Change((Compare(b"k", Target.VALUE, Relation.EQUAL, 1),)),
        Change((Compare(b"k", Target.VERSION, Relation.EQUAL, b""),)),
        Change((Compare(b"k", Target.VERSION, 0, 0),)),  # type: ignore[arg-type]
        Change((Compare(b"k", 1, Relation.EQUAL, 0),)),  # type: ignore[arg-type]
        Change(then=(DeletePrefix(""),)),  # type: ignore[arg-type]
        Change(then=(DeletePrefix(None),)),  # type: ignore[arg-type]
        Change(then=("step",)),  # type: ignore[arg-type]
        Grant(0),
        Grant(1.5),  # type: ignore[arg-type]
        Call("name", (1.5,)),  # type: ignore[arg-type]
        Call("name", ("half of a pair \ud800",)),
        Call("\ud800", ()),
        Call("name", ((((),) * 3,),) if False else (1 << 80,)),
    ],
)
def test_what_breaks_a_rule_is_seen_at_the_door(body: Body) -> None:
    assert problem_of(body) is not None


@pytest.mark.parametrize(
    "body",
    [
        Change(
            (Compare.value(b"k", b"v"), Compare.unchanged(b"k", 7)),
            (Put(b"a", b"1", 3), Delete(b"b"), DeletePrefix(b""), Get(b"c")),
            (Get(b"d"),),
        ),
        Grant(10**9),
        Revoke(LeaseToken(5)),
        Call("procedure", (None, True, -5, "text", b"bytes", (1, (2, 3)))),
        OpenSession(),
        ExpireLeases((1, 2)),
        ExpireSessions(((1, 2), (3, 4))),
        Compact(9),
        SetLimits(Limits(max_bytes=1)),
    ],
)
def test_commands_survive_their_encoding(body: Body) -> None:
    command = Command(1, 2, 3, body)
    assert decode_command(encode_command(command)) == command


@pytest.mark.parametrize(
    "reply",
    [
        Outcome(True, 5, (None, 1, Record(b"k", b"v", 1, 2, 3, 4))),  # type: ignore[arg-type]
        Granted(LeaseToken(3)),
        SessionOpened(4),
        Called((1, "a", (b"",)), LogIndex(3), 4),  # type: ignore[arg-type]
        Refused(Refusal.QUOTA, "full", (1, 2)),
    ],
)
def test_replies_survive_their_encoding(reply: Reply) -> None:
    assert reply_from(unpack(pack(reply_fields(reply)))) == reply


def _random_body(rng: random.Random, replica: Replica) -> Body:
    key = b"k%d" % rng.randrange(12)
    token = rng.choice([0, 0, *replica.state.leases])
    pick = rng.randrange(10)
    steps: tuple[Step, ...] = (Put(key, rng.randbytes(rng.randrange(40)), token), Get(key))
    if pick < 5:
        return Change((Compare(key, Target.VERSION, Relation.LESS, rng.randrange(5)),), steps, (Delete(key),))
    if pick < 6:
        return Change(then=(DeletePrefix(b"k1"), *steps))
    if pick < 7:
        return Grant(rng.randrange(10**6, 10**9))
    if pick < 8:
        return Revoke(LeaseToken(token))
    if pick < 9:
        return Call("count", (rng.choice(["", "refuse", "break"]),))
    return Compact(rng.randrange(1, 50))


def test_replicas_that_apply_the_same_log_are_equal_through_snapshots_too(rng: random.Random) -> None:
    """I41: one replica applies everything, another is made from a snapshot in the middle, a third restarts thrice."""
    leader = Replica(KeyValue({"count": _count}))
    leader.do(SetLimits(Limits(history_revisions=40)))
    sessions: list[int] = []
    for _ in range(3):
        opened = leader.do(OpenSession())
        assert isinstance(opened, SessionOpened)
        sessions.append(opened.session)
    for number in range(300):
        leader.do(_random_body(rng, leader), rng.choice([0, *sessions]), rng.randrange(number, number + 3), max(0, number - 5))
    leader.state.check()

    for cuts in ((150,), (20, 100, 299)):
        other = KeyValue({"count": _count})
        for index, data in enumerate(leader.log, 1):
            other.apply(LogIndex(index), data)
            if index in cuts:
                data = other.snapshot()
                other = KeyValue({"count": _count})
                other.restore(data)
        assert other.snapshot() == leader.state.snapshot()
        assert other.state_hash() == leader.state.state_hash()
        assert other.digest == leader.state.digest


def test_commands_held_decoded_apply_like_the_bytes() -> None:
    command = Command(0, 0, 0, Change((Compare.missing(b"k"),), (Put(b"k", b"v"), Get(b"k"))))
    data = encode_entry([encode_command(command)])
    one, two = KeyValue(), KeyValue()

    assert one.apply(LogIndex(1), data, (command,)) == two.apply(LogIndex(1), data)
    assert one.snapshot() == two.snapshot()


def test_a_damaged_snapshot_is_refused_and_changes_nothing() -> None:
    replica = Replica()
    replica.put(b"a", b"1")
    data = replica.state.snapshot()

    for at in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(CorruptRecordError):
            replica.state.restore(bytes(damaged))

    assert replica.value(b"a") == b"1"
