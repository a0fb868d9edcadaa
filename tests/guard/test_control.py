from __future__ import annotations

import json
import random

import pytest

from ha_core.guard.control import (
    MAX_LINE_BYTES,
    AgentStatus,
    Beat,
    ControlError,
    EndRequest,
    GuardStatus,
    LineDecoder,
    ListRequest,
    Reply,
    Request,
    RunReport,
    StartRequest,
    StatusRequest,
    StopRequest,
    SubscribeRequest,
    decode_answer,
    decode_beat,
    decode_request,
    encode_beat,
    encode_reply,
    encode_report,
    encode_request,
    request_id,
)
from ha_core.guard.primaries import decode_primaries, encode_primaries, split_address

RUN = RunReport("db", 15, 12, "running", 99, "ab" * 16)
STATUS = GuardStatus(
    "h1", 10, "ab", "cd", 12, -1, 2_000, 300, False, 5, 4, 17, 1, "pid-namespace", (AgentStatus("aam", 4, "up", 2),)
)


@pytest.mark.parametrize(
    "request_",
    [
        StartRequest("db", 12, 15, ("sleep", "60"), {"A": "b"}, "/tmp", 2.5),
        StartRequest("db", 12, 15, ("sleep",)),
        StopRequest("db", 15, 3.0),
        ListRequest(),
        SubscribeRequest(),
        StatusRequest(),
        EndRequest(),
        EndRequest(True),
    ],
)
def test_requests_arrive_as_they_were_sent(request_: Request) -> None:
    line = encode_request(7, request_)

    assert line.endswith(b"\n")
    assert decode_request(line[:-1]) == (7, request_)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(1, run=RUN),
        Reply(2, runs=(RUN, RunReport("a", 1, 1, "failed", 3, "ab", 127, "not found"))),
        Reply(3, status=STATUS),
        Reply(4, "stale-token", "db: token 3 is older than 15", current=15),
        Reply(5),
    ],
)
def test_replies_arrive_as_they_were_sent(reply: Reply) -> None:
    assert decode_answer(encode_reply(reply)) == reply


def test_reports_are_told_from_replies() -> None:
    assert decode_answer(encode_report(RUN)) == RUN


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ([], "object"),
        ({"op": "list"}, "id"),
        ({"id": -1, "op": "list"}, "id"),
        ({"id": True, "op": "list"}, "id"),
        ({"id": 1, "op": "format"}, "op"),
        ({"id": 1, "op": ["list"]}, "op"),
        ({"id": 1, "op": "stop", "token": 1}, "vm"),
        ({"id": 1, "op": "stop", "vm": "x" * 101, "token": 1}, "vm"),
        ({"id": 1, "op": "stop", "vm": "\ud800", "token": 1}, "vm"),
        ({"id": 1, "op": "start", "vm": "x", "lease": 1, "token": 1, "argv": ["\udc80"]}, "argv"),
        ({"id": 1, "op": "stop", "vm": "x", "token": 0}, "token"),
        ({"id": 1, "op": "stop", "vm": "x", "token": 1 << 63}, "token"),
        ({"id": 1, "op": "stop", "vm": "x", "token": 1, "shutdown_s": -1}, "shutdown_s"),
        ({"id": 1, "op": "stop", "vm": "x", "token": 1, "shutdown_s": True}, "shutdown_s"),
        ({"id": 1, "op": "start", "vm": "x", "lease": 1, "token": 1, "argv": []}, "argv"),
        ({"id": 1, "op": "start", "vm": "x", "lease": 1, "token": 1, "argv": ["a\0b"]}, "argv"),
        ({"id": 1, "op": "start", "vm": "x", "lease": 0, "token": 1, "argv": ["a"]}, "lease"),
        ({"id": 1, "op": "start", "vm": "x", "lease": 1, "token": 1, "argv": ["a"], "env": {"A=": "b"}}, "env"),
        ({"id": 1, "op": "start", "vm": "x", "lease": 1, "token": 1, "argv": ["a"], "env": {"A": 1}}, "env"),
        ({"id": 1, "op": "start", "vm": "x", "lease": 1, "token": 1, "argv": ["a"], "workdir": ""}, "workdir"),
        ({"id": 1, "op": "end", "stop_vms": 1}, "stop_vms"),
    ],
)
def test_a_bad_request_names_the_key(data: object, key: str) -> None:
    with pytest.raises(ControlError, match=key) as caught:
        decode_request(json.dumps(data).encode())

    assert caught.value.code == "bad-request"


def test_any_bytes_are_refused_without_any_other_error() -> None:
    rng = random.Random(3)
    lines = [rng.randbytes(rng.randrange(1, 200)) for _ in range(200)]
    lines += [
        b"[" * 60_000,
        b'{"id":' * 10_000,
        b"\xff\xfe",
        b"1e999",
        b'{"id": 1e999, "op": "list"}',
        b'{"id": NaN, "op": "list"}',
    ]
    for line in lines:
        with pytest.raises(ControlError):
            decode_request(line)
        with pytest.raises(ControlError):
            decode_answer(line)
        assert request_id(line) == 0


def test_lines_are_cut_wherever_the_bytes_break() -> None:
    stream = b"".join(encode_request(n, ListRequest()) for n in range(1, 6)) + b"\n"
    for step in (1, 3, 1000):
        decoder = LineDecoder()
        lines = [line for at in range(0, len(stream), step) for line in decoder.receive(stream[at : at + step])]
        assert [decode_request(line)[0] for line in lines] == [1, 2, 3, 4, 5]


def test_a_line_without_end_is_refused_and_not_kept() -> None:
    decoder = LineDecoder()
    for _ in range(MAX_LINE_BYTES // 1000):
        assert decoder.receive(b"x" * 1000) == []
    with pytest.raises(ControlError):
        decoder.receive(b"x" * 1000)

    assert not decoder._buffer


def test_beats_arrive_and_other_datagrams_do_not_count() -> None:
    beat = Beat("vpxa", 4711, 123456, 9)

    assert decode_beat(encode_beat(beat)) == beat
    assert decode_beat(encode_beat(Beat("mallory", 1, 2, 3))) is None
    assert decode_beat(b"") is None
    assert decode_beat(b"x" * len(encode_beat(beat))) is None


def test_primaries_are_read_back_and_bad_files_named() -> None:
    primaries = {"aam@h1": {"a": "127.1.0.1:7400"}, "aam@h2": {"a": "127.1.0.2:7400", "b": "127.2.0.2:7400"}}

    assert decode_primaries(encode_primaries(primaries)) == primaries
    for bad in (b"", b"[]", b'{"primaries": [1]}', b'{"primaries": [{"node": "x"}]}', b"[" * 50_000):
        with pytest.raises(ValueError, match="expected"):
            decode_primaries(bad)
    with pytest.raises(ValueError, match="at most"):
        decode_primaries(encode_primaries({str(n): {} for n in range(17)}))


def test_addresses_are_split_and_names_are_left_to_nobody() -> None:
    assert split_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("nothing") is None
    assert split_address(":80") is None
    assert split_address("h:99999") is None
