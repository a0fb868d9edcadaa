"""Messages and records on the wire and on disk: every field comes back; bytes that mean nothing are refused, never obeyed."""

from __future__ import annotations

import random

import attrs
import msgpack
import pytest

from ha_core.config import LAN
from ha_core.errors import CorruptRecordError, DecodeError
from ha_core.interfaces import Recovered
from ha_core.machines.contract import WriteCheckpoint
from ha_core.machines.raft import messages as m
from ha_core.machines.raft.configuration import Configuration, Member, decode_configuration, encode_configuration
from ha_core.machines.raft.raft import Raft
from ha_core.machines.raft.records import encode_checkpoint, encode_mark, encode_record, last_mark, recover
from ha_core.machines.raft.types import Checkpointed, Entry, EntryKind, MessageRefused, RaftReceived, Reason
from tests.machines.raft.group import node_id

ONE = Configuration(incoming=(node_id("n1"),), members={node_id("n1"): Member(b"r" * 16)})
ALL: list[m.Message] = [
    m.VoteRequest(3, True, 4, 5, 2, False),
    m.VoteAnswer(3, False, 4, True, 1 << 40),
    m.Heartbeat(3, 9, 4),
    m.HeartbeatAnswer(3, 9),
    m.Append(3, 4, 2, 4, (m.encode_run([Entry(5, 3, EntryKind.COMMAND, b"x")]),)),
    m.AppendAnswer(3, False, 4, 2, 1),
    m.SnapshotChunk(3, 7, 2, b"d" * 32, 100, 50, b"c" * 16, b"data"),
    m.SnapshotAnswer(3, 7, 50),
    m.TimeoutNow(3),
    m.ReadRequest(3, 99),
    m.ReadAnswer(3, 99, True, 4),
    m.Removed(3),
]

WRONG: tuple[object, ...] = (None, -1, "text", 1.5, [1], {})


def entry(index: int, term: int, data: bytes = b"x", kind: EntryKind = EntryKind.COMMAND) -> Entry:
    return Entry(index, term, kind, data)


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: m.Message) -> None:
    envelope = m.decode(m.encode(b"cluster.", b"s" * 16, b"", message))

    assert envelope == m.Envelope(b"cluster.", b"s" * 16, b"", message)


def test_every_kind_of_message_is_here() -> None:
    assert {type(message) for message in ALL} == set(m._TYPES)


@pytest.mark.parametrize("message", ALL, ids=lambda message: type(message).__name__)
def test_a_field_of_a_wrong_type_is_refused(message: m.Message) -> None:
    fields = list(msgpack.unpackb(m.encode(b"c", b"s", b"r", message)[1:]))

    for at in range(len(fields)):
        other = 7 if isinstance(fields[at], bool) else True
        for wrong in (*WRONG, other):
            body = b"\x01" + msgpack.packb([*fields[:at], wrong, *fields[at + 1 :]])
            with pytest.raises(DecodeError):
                m.decode(body)


def test_no_bytes_do_harm() -> None:
    """Random bytes, cut messages and flipped bits raise DecodeError or decode; nothing else."""
    rng = random.Random(7)
    bodies = [m.encode(b"c" * 8, b"s" * 16, b"r" * 16, message) for message in ALL]
    for _ in range(3000):
        body = bytearray(rng.choice(bodies))
        match rng.randrange(3):
            case 0:
                body = body[: rng.randrange(len(body))]
            case 1:
                body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            case _:
                body = bytearray(rng.randbytes(rng.randrange(60)))
        try:
            m.decode(bytes(body))
        except DecodeError:
            pass


@pytest.mark.parametrize(
    "body", [b"", b"\x02\x90", b"\x01", b"\x01\xdd\xff\xff\xff\xff", b"\x01" + b"\x91" * 5000, b"\x01\xc7\xff\x01"]
)
def test_hostile_bytes_are_refused_in_little_time_and_memory(body: bytes) -> None:
    with pytest.raises(DecodeError):
        m.decode(body)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [entry(1, 1), entry(3, 1)],
        [entry(2, 1), entry(1, 1)],
        [entry(1, 2), entry(2, 1)],
        [entry(0, 1)],
        [entry(1, 0)],
        [(1, 1, 3, b"x")],
        [(1, 1, 0, "text")],
        [(1, 1, 0)],
        [7],
    ],
)
def test_a_run_out_of_order_is_refused(entries: list[object]) -> None:
    with pytest.raises(DecodeError):
        m.decode_run(msgpack.packb(entries))


def test_a_run_comes_back_as_it_was() -> None:
    entries = [entry(4, 2), entry(5, 2, b"", EntryKind.NOOP), entry(6, 3, b"\x00" * 300)]

    back = m.decode_run(m.encode_run(entries))

    assert back == entries
    assert [one.kind for one in back] == [one.kind for one in entries]


def test_the_machine_refuses_malformed_bytes_and_goes_on() -> None:
    raft = Raft(node=node_id("n1"), replica=b"r" * 16, profile=LAN, rng=random.Random(1), bootstrap=ONE)
    raft.receive([RaftReceived(node_id("n2"), b"garbage")], 5)

    assert MessageRefused(node_id("n2"), Reason.MALFORMED) in raft.take_effects()
    raft.check()


def test_a_record_is_one_step_of_history() -> None:
    records = [
        encode_record(1, None, 0, 0, [m.encode_run([entry(1, 1), entry(2, 1)])]),
        encode_record(2, node_id("n2"), 1, 0, []),
        encode_record(3, node_id("n3"), 1, 2, [m.encode_run([entry(2, 3)]), m.encode_run([entry(3, 3)])]),
    ]

    durable = recover(Recovered(None, records))

    assert (durable.term, durable.vote, durable.commit) == (3, node_id("n3"), 1)
    assert [(one.index, one.term) for one in durable.entries] == [(1, 1), (2, 3), (3, 3)]


def test_a_checkpoint_replaces_what_it_covers() -> None:
    snapshot = encode_checkpoint(5, 2, ONE, b"state")
    records = [encode_record(2, None, 5, 0, [m.encode_run([entry(5, 2), entry(6, 2)])])]

    durable = recover(Recovered(snapshot.payload, records))

    assert durable.snapshot == snapshot
    assert [one.index for one in durable.entries] == [6]
    assert durable.commit == 5


@pytest.mark.parametrize(
    "records",
    [
        [b""],
        [b"\x09\x90"],
        [b"\x01\x90"],
        [encode_record(2, None, 0, 0, []), encode_record(1, None, 0, 0, [])],
        [encode_record(1, None, 0, 0, [m.encode_run([entry(2, 1)])])],
        [encode_record(1, None, 0, 0, [b"?"])],
    ],
)
def test_records_that_are_no_history_name_the_damage_R42(records: list[bytes]) -> None:
    with pytest.raises(CorruptRecordError, match="store is damaged"):
        recover(Recovered(None, records))


def test_a_damaged_checkpoint_is_named() -> None:
    with pytest.raises(CorruptRecordError):
        recover(Recovered(b"\x01garbage", []))


@pytest.mark.parametrize(
    "body", [[], [[], [], [], [], []], [["n1"], [], [], [], []], [["n1"], [], [], [["n1", "text", []]], []]]
)
def test_a_configuration_that_contradicts_itself_is_refused(body: list[object]) -> None:
    with pytest.raises(DecodeError):
        decode_configuration(msgpack.packb(body))


def test_the_first_format_of_a_record_still_decodes() -> None:
    """Bytes of version 1, written once; they must decode for ever, or be refused with a clear error."""
    record = bytes.fromhex("019502a76e314074657374010091c4089194010100c40161")

    durable = recover(Recovered(None, [record]))

    assert (durable.term, durable.vote, durable.commit) == (2, node_id("n1"), 1)
    assert durable.entries == [entry(1, 1, b"a")]


def test_messages_are_frozen() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        ALL[0].term = 9  # type: ignore[misc]


def test_a_checkpoint_keeps_the_mark_of_the_process_life() -> None:
    first = entry(1, 1, encode_configuration(ONE), EntryKind.CONFIGURATION)
    records = [encode_mark(b"before"), encode_record(1, None, 1, 0, [m.encode_run([first])]), encode_mark(b"now")]
    raft = Raft(
        node=node_id("n1"), replica=b"r" * 16, profile=LAN, rng=random.Random(1), recovered=Recovered(None, records), mark=b"now"
    )  # fmt: skip

    raft.receive([Checkpointed(1, b"state")], 5)

    (written,) = [effect for effect in raft.take_effects() if isinstance(effect, WriteCheckpoint)]
    assert last_mark(Recovered(written.state, written.records)) == b"now"
    assert recover(Recovered(written.state, written.records)).commit == 1
