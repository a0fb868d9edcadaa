"""Three database machines in virtual time: what clients are promised, through crashes, cuts and freezes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from ha_core.errors import DecodeError
from ha_core.ids import LeaseToken, LogIndex, NodeId
from ha_core.machines.database_events import (
    DATABASE,
    Arrived,
    Confirm,
    Confirmed,
    DatabaseOutcome,
    DatabaseRequest,
    Done,
    Found,
    PeerDown,
    PeerUp,
    Range,
    Reconfigure,
    Renew,
    Renewed,
    Send,
    Transfer,
)
from ha_core.machines.database_wire import (
    Replies,
    Requests,
    WatchClose,
    WatchDeliver,
    WatchEnd,
    WatchOpen,
    WatchTake,
    WireRequest,
    WriteRequest,
    decode_message,
    encode_replies,
    encode_requests,
    encode_watch,
)
from ha_core.machines.keyvalue import KvTransaction
from ha_core.machines.keyvalue.codec import encode_command
from ha_core.machines.keyvalue.model import (
    Call,
    Called,
    Change,
    Command,
    Compare,
    Get,
    Grant,
    Granted,
    KeyEvent,
    Limits,
    OpenSession,
    Outcome,
    Page,
    Plain,
    Put,
    Record,
    Refusal,
    Refused,
    RequestId,
    RevisionEvents,
    Revoke,
    SetLimits,
)
from ha_core.machines.keyvalue.plain import pack
from ha_core.machines.messages import SendDatagram, SendRun
from ha_core.machines.raft.types import AddLearner, Promote, Remove
from tests.machines.database_cluster import MS, Cluster, S, WatchLog


def put(key: bytes, value: bytes, lease: int = 0) -> Change:
    return Change(then=(Put(key, value, lease),))


def append(key: bytes, value: bytes) -> Call:
    return Call("append", (key, value))


def _append(tx: KvTransaction, index: LogIndex, args: Sequence[Plain]) -> Plain:
    """Not idempotent on purpose."""
    key, value = args
    assert isinstance(key, bytes)
    assert isinstance(value, bytes)
    tx.put(key, (tx.get(key) or b"") + value)
    return index


PROCEDURES = {"append": _append}


def value(outcome: DatabaseOutcome) -> bytes | None:
    assert isinstance(outcome, Found), outcome
    return None if outcome.record is None else outcome.record.value


def code(outcome: DatabaseOutcome) -> Refusal:
    assert isinstance(outcome, Refused), outcome
    return outcome.code


def granted(outcome: DatabaseOutcome) -> LeaseToken:
    assert isinstance(outcome, Granted), outcome
    return outcome.token


def test_a_write_is_seen_by_every_read_that_begins_after_it_anywhere() -> None:
    cluster = Cluster(clients=1)
    cluster.leader()

    for number, writer in enumerate((*cluster.nodes, *cluster.clients)):
        assert cluster.call(writer, put(b"k", b"%d" % number)) == Outcome(True, number + 1, (None,))  # type: ignore[arg-type]
        for reader in (*cluster.nodes, *cluster.clients):
            assert value(cluster.call(reader, Get(b"k"))) == b"%d" % number

    cluster.run_for(S)
    cluster.check()


def test_a_request_that_cannot_be_served_here_is_refused_at_once() -> None:
    cluster = Cluster()
    follower = cluster.follower()
    process = cluster.processes[follower]
    process.sent.clear()

    process.feed(Arrived(cluster.leader(), DATABASE, encode_requests([(7, Renew(LeaseToken(1)))])))

    runs = [one.event for one in process.sent if isinstance(one.event, SendRun)]
    (body,) = runs[0].bodies
    (reply,) = decode_message(body).replies  # type: ignore[union-attr]
    assert reply[0] == 7
    assert code(reply[1]) is Refusal.NOT_LEADER


def test_a_request_in_the_batch_in_which_its_target_goes_away_is_sent_again() -> None:
    cluster = Cluster()
    leader, follower = cluster.leader(), cluster.follower()
    cluster.call(follower, put(b"k", b"1"))
    process = cluster.processes[follower]

    process.feed(DatabaseRequest(10_000, put(b"k", b"2")), PeerDown(leader))
    cluster.run_for(S)
    assert 10_000 not in process.replies
    process.feed(PeerUp(leader))
    cluster.run_until(lambda: 10_000 in process.replies)

    assert isinstance(process.replies[10_000], Outcome)


def test_requests_of_one_batch_share_one_append() -> None:
    cluster = Cluster()
    leader = cluster.leader()
    cluster.call(leader, put(b"warm", b"up"))
    process = cluster.processes[leader]
    before = process.database.state.index

    process.feed(*[DatabaseRequest(10_000 + number, put(b"k%d" % number, b"v")) for number in range(100)])
    cluster.run_until(lambda: 10_099 in process.replies)

    assert process.database.state.index == before + 1
    assert sorted(process.replies[10_000 + number].revision for number in range(100)) == list(range(2, 102))  # type: ignore[union-attr]


def test_one_round_serves_all_reads_that_wait() -> None:
    cluster = Cluster()
    leader = cluster.leader()
    follower = cluster.follower()
    cluster.call(follower, Get(b"k"))
    process = cluster.processes[follower]
    process.sent.clear()

    process.feed(*[DatabaseRequest(10_000 + number, Get(b"k")) for number in range(50)])
    cluster.run_until(lambda: 10_049 in process.replies)

    datagrams = [one.event for one in process.sent if isinstance(one.event, SendDatagram) and one.event.to == leader]
    assert len(datagrams) <= 2, "the question, and perhaps the answer to a heartbeat"


@pytest.mark.parametrize("victim_is_leader", [True, False])
def test_writes_go_on_when_a_host_dies_and_nothing_acknowledged_is_lost(victim_is_leader: bool) -> None:
    cluster = Cluster()
    leader = cluster.leader()
    asker = cluster.follower()
    victim = leader if victim_is_leader else next(node for node in cluster.nodes if node not in (leader, asker))
    for number in range(20):
        assert isinstance(cluster.call(asker, put(b"k%02d" % number, b"v")), Outcome)

    cluster.crash(victim)
    began = cluster.now_ns
    assert isinstance(cluster.call(asker, put(b"after", b"v")), Outcome)

    assert cluster.now_ns - began <= 700 * MS
    page = cluster.call(asker, Range(b"k", limit=100))
    assert isinstance(page, Page)
    assert len(page.records) == 20
    cluster.start(victim)
    cluster.run_for(2 * S)
    assert value(cluster.call(victim, Get(b"after"))) == b"v"
    cluster.check()


def test_everything_acknowledged_survives_the_death_of_all() -> None:
    """I36, I52: three processes die at once, again and again, between two flushes."""
    cluster = Cluster(procedures=PROCEDURES, checkpoint_min_bytes=2_000)
    expected = 0
    for life in range(6):
        leader = cluster.leader()
        for _ in range(15):
            outcome = cluster.call(leader, append(b"\x00ha/k", b"x"))
            assert isinstance(outcome, Called)
            expected += 1
        cluster.submit(leader, append(b"\x00ha/maybe", b"x"))
        cluster.run_for(life * 100_000)
        for node in cluster.nodes:
            cluster.crash(node)
        for node in cluster.nodes:
            cluster.start(node)
        found = value(cluster.call(cluster.leader(), Get(b"\x00ha/k")))
        assert found == b"x" * expected
    cluster.run_for(2 * S)
    cluster.check()


def test_a_request_caught_by_a_change_of_leaders_is_repeated_and_applied_once(rng: random.Random) -> None:
    """R40: the request is not idempotent, and its leader dies at any moment around the commit."""
    for delay_us in range(0, 2_000, 100):
        cluster = Cluster(procedures=PROCEDURES, seed=rng.getrandbits(32))
        leader, asker = cluster.leader(), cluster.follower()
        cluster.call(asker, append(b"\x00ha/k", b"a"))

        request = cluster.submit(asker, append(b"\x00ha/k", b"b"))
        cluster.run_for(delay_us * 1_000)
        cluster.crash(leader)
        replies = cluster.processes[asker].replies
        cluster.run_until(lambda replies=replies, request=request: request in replies)  # type: ignore[misc]

        assert isinstance(replies[request], Called)
        assert value(cluster.call(asker, Get(b"\x00ha/k"))) == b"ab"


def test_a_request_whose_reply_is_lost_is_applied_once() -> None:
    cluster = Cluster(procedures=PROCEDURES, clients=1)
    leader = cluster.leader()
    (client,) = cluster.clients
    cluster.call(client, append(b"\x00ha/k", b"a"))

    request = cluster.submit(client, append(b"\x00ha/k", b"b"))
    cluster.run_for(300_000)
    for node in cluster.nodes:
        cluster.cut(client, node)
    cluster.run_for(S)
    assert request not in cluster.processes[client].replies
    assert cluster.processes[leader].database.state.range(b"\x00ha/k")[0].value == b"ab", "it was carried out"
    cluster.heal()

    replies = cluster.processes[client].replies
    cluster.run_until(lambda: request in replies)
    assert isinstance(replies[request], Called)
    assert value(cluster.call(client, Get(b"\x00ha/k"))) == b"ab"


def test_a_client_that_restarts_gets_no_answer_meant_for_its_former_life() -> None:
    """It numbers its requests anew."""
    for delay_us in range(0, 1_000, 100):
        cluster = Cluster(clients=1)
        cluster.leader()
        (client,) = cluster.clients
        cluster.call(client, put(b"warm", b"up"))
        for _ in range(30):
            cluster.submit(client, Change((Compare.missing(b"no"),)))
        cluster.run_for(delay_us * 1_000)
        cluster.crash(client)
        cluster.start(client)
        requests = [cluster.submit(client, Change((Compare.exists(b"no"),))) for _ in range(30)]
        replies = cluster.processes[client].replies
        cluster.run_until(lambda requests=requests, replies=replies: set(requests) <= set(replies))  # type: ignore[misc]

        assert not any(isinstance(reply, Outcome) and reply.succeeded for reply in replies.values())


def test_an_unknown_fate_is_said_and_its_request_can_be_repeated_exactly_once() -> None:
    cluster = Cluster(procedures=PROCEDURES, clients=1)
    cluster.leader()
    (client,) = cluster.clients
    cluster.call(client, append(b"\x00ha/k", b"a"))
    request = cluster.submit(client, append(b"\x00ha/k", b"b"), timeout_ns=2 * S)
    cluster.run_for(300_000)
    for node in cluster.nodes:
        cluster.cut(client, node)
    cluster.run_for(3 * S)

    outcome = cluster.processes[client].replies[request]
    assert code(outcome) is Refusal.UNKNOWN
    assert isinstance(outcome, Refused)
    assert isinstance(outcome.detail, tuple)
    session, sequence = outcome.detail
    assert isinstance(session, int)
    assert isinstance(sequence, int)
    cluster.heal()
    for _ in range(20):
        cluster.call(client, put(b"other", b"v"))
    again = cluster.call(client, append(b"\x00ha/k", b"b"), identity=RequestId(session, sequence))

    assert isinstance(again, Called)
    assert value(cluster.call(client, Get(b"\x00ha/k"))) == b"ab"


def test_one_unknown_fate_that_nobody_asks_about_does_not_stop_the_writes_after_it() -> None:
    cluster = Cluster(clients=1)
    cluster.leader()
    (client,) = cluster.clients
    cluster.call(client, put(b"k", b"0"))
    lost = cluster.submit(client, put(b"k", b"1"), timeout_ns=2 * S)
    cluster.run_for(300_000)
    for node in cluster.nodes:
        cluster.cut(client, node)
    cluster.run_for(3 * S)
    replies = cluster.processes[client].replies
    assert code(replies[lost]) is Refusal.UNKNOWN
    cluster.heal()

    for _ in range(11):
        requests = [cluster.submit(client, put(b"k", b"v")) for _ in range(500)]
        cluster.run_for(S)
        assert all(isinstance(replies.get(request), Outcome) for request in requests)


def test_without_a_quorum_nothing_is_acknowledged_and_the_caller_hears_which_it_is() -> None:
    cluster = Cluster()
    leader = cluster.leader()
    cluster.call(leader, put(b"k", b"1"))
    for node in cluster.nodes:
        if node != leader:
            cluster.crash(node)

    sent = cluster.submit(leader, put(b"k", b"2"), timeout_ns=3 * S)
    cluster.run_for(2 * S)
    unsent = cluster.submit(leader, put(b"k", b"3"), timeout_ns=3 * S)
    read = cluster.submit(leader, Get(b"k"), timeout_ns=3 * S)
    cluster.run_for(5 * S)

    replies = cluster.processes[leader].replies
    assert code(replies[sent]) is Refusal.UNKNOWN
    assert code(replies[unsent]) is Refusal.UNAVAILABLE
    assert code(replies[read]) is Refusal.UNAVAILABLE


def test_a_leader_that_was_cut_off_serves_no_old_reads() -> None:
    """R35: it answers late, or not, but never with what has been overwritten since."""
    cluster = Cluster()
    leader = cluster.leader()
    cluster.call(leader, put(b"k", b"old"))
    cluster.isolate(leader)

    read = cluster.submit(leader, Get(b"k"), timeout_ns=4 * S)
    cluster.run_for(S)
    other = next(node for node in cluster.nodes if node != leader)
    assert isinstance(cluster.call(other, put(b"k", b"new")), Outcome)
    assert read not in cluster.processes[leader].replies
    cluster.heal()
    cluster.run_until(lambda: read in cluster.processes[leader].replies)

    assert value(cluster.processes[leader].replies[read]) == b"new"


def test_a_leader_that_was_frozen_answers_no_reads_of_the_past() -> None:
    """Thawed, it takes itself for the leader until it hears of the other."""
    cluster = Cluster()
    leader = cluster.leader()
    cluster.call(leader, put(b"k", b"old"))
    cluster.freeze(leader, 2 * S)
    other = next(node for node in cluster.nodes if node != leader)
    assert isinstance(cluster.call(other, put(b"k", b"new")), Outcome)

    assert cluster.processes[leader].database.is_leading
    assert value(cluster.call(leader, Get(b"k"))) == b"new"


# -- leases --


def test_a_lease_that_nobody_renews_ends_after_its_ttl_and_not_before() -> None:
    cluster = Cluster()
    leader = cluster.leader()
    token = granted(cluster.call(leader, Grant(S)))
    cluster.call(leader, put(b"k", b"v", token))
    cluster.run_for(900 * MS)
    assert value(cluster.call(leader, Get(b"k"))) == b"v"

    cluster.run_for(200 * MS)

    assert value(cluster.call(leader, Get(b"k"))) is None
    assert code(cluster.call(leader, Renew(token))) is Refusal.LEASE_NOT_FOUND


def test_a_repeated_grant_whose_lease_was_revoked_meanwhile_is_answered_and_counts_nothing() -> None:
    """I40: its session answers it with the token of then; the leader has no such lease to count."""
    cluster = Cluster(clients=1)
    leader = cluster.leader()
    (client,) = cluster.clients
    cluster.call(client, put(b"k", b"v"))
    request = cluster.submit(client, Grant(60 * S), timeout_ns=2 * S)
    cluster.run_for(300_000)
    for node in cluster.nodes:
        cluster.cut(client, node)
    cluster.run_for(3 * S)
    unknown = cluster.processes[client].replies[request]
    assert isinstance(unknown, Refused)
    assert isinstance(unknown.detail, tuple)
    session, sequence = unknown.detail
    assert isinstance(session, int)
    assert isinstance(sequence, int)
    (token,) = cluster.processes[leader].database.state.leases
    cluster.call(leader, Revoke(LeaseToken(token)))
    cluster.heal()

    again = cluster.call(client, Grant(60 * S), identity=RequestId(session, sequence))

    assert granted(again) == token
    assert code(cluster.call(leader, Renew(LeaseToken(token)))) is Refusal.LEASE_NOT_FOUND
    cluster.run_for(70 * S)
    assert cluster.processes[leader].database.is_leading
    assert cluster.processes[leader].database.state.leases == {}


def test_a_renewed_lease_lives_and_its_renewals_do_not_enter_the_log() -> None:
    cluster = Cluster()
    leader, follower = cluster.leader(), cluster.follower()
    token = granted(cluster.call(follower, Grant(S)))
    cluster.call(follower, put(b"k", b"v", token))
    before = cluster.processes[leader].database.state.index

    for _ in range(20):
        cluster.run_for(500 * MS)
        assert cluster.call(follower, Renew(token)) == Renewed(token, S)

    assert value(cluster.call(follower, Get(b"k"))) == b"v"
    assert cluster.processes[leader].database.state.index == before


def test_a_revoked_lease_is_never_renewed_and_its_keys_go_in_one_revision() -> None:
    """R37."""
    cluster = Cluster()
    leader = cluster.leader()
    token = granted(cluster.call(leader, Grant(S)))
    cluster.call(leader, put(b"a", b"", token))
    cluster.call(leader, put(b"b", b"", token))
    process = cluster.processes[leader]

    process.feed(DatabaseRequest(10_001, Revoke(token)), DatabaseRequest(10_002, Renew(token)))
    cluster.run_until(lambda: 10_002 in process.replies and 10_001 in process.replies)

    assert isinstance(process.replies[10_001], Outcome)
    assert code(process.replies[10_002]) is Refusal.LEASE_NOT_FOUND
    assert process.applied[-1].changes[-1].revision == 3
    assert [event.key for event in process.applied[-1].changes[-1].events] == [b"a", b"b"]


def test_a_lease_survives_the_death_of_a_leader_if_its_holder_renews() -> None:
    cluster = Cluster()
    leader, holder = cluster.leader(), cluster.follower()
    token = granted(cluster.call(holder, Grant(2 * S)))
    cluster.call(holder, put(b"k", b"v", token))
    cluster.run_for(S)
    assert isinstance(cluster.call(holder, Renew(token)), Renewed)

    cluster.crash(leader)
    assert isinstance(cluster.call(holder, Renew(token)), Renewed)
    for _ in range(5):
        cluster.run_for(S)
        assert isinstance(cluster.call(holder, Renew(token)), Renewed)

    assert value(cluster.call(holder, Get(b"k"))) == b"v"


def test_a_new_leader_ends_no_lease_before_its_holder_must_stop_and_does_not_start_over() -> None:
    """L6: it counts from the last moment at which the old leader can have renewed."""
    cluster = Cluster()
    leader, other = cluster.leader(), cluster.follower()
    token = granted(cluster.call(other, Grant(2 * S)))
    cluster.call(other, put(b"k", b"v", token))
    created_ns = cluster.now_ns
    assert isinstance(cluster.call(other, Renew(token)), Renewed)
    cluster.crash(leader)

    state = cluster.processes[other].database.state
    cluster.run_until(lambda: state.get(b"k") is None)

    assert created_ns + 2 * S <= cluster.now_ns <= created_ns + 2 * S + 250 * MS


def test_an_old_leader_ends_no_leases() -> None:
    """R36: cut off, it goes on counting until it steps down; what it proposed meanwhile is lost with its term."""
    cluster = Cluster()
    leader, holder = cluster.leader(), cluster.follower()
    token = granted(cluster.call(holder, Grant(700 * MS)))
    cluster.call(holder, put(b"k", b"v", token))
    cluster.isolate(leader)
    cluster.leader()
    for _ in range(8):
        renewed = cluster.call(holder, Renew(token))
        cluster.run_for(300 * MS)
        assert isinstance(renewed, Renewed)
    cluster.heal()
    for _ in range(8):
        assert isinstance(cluster.call(holder, Renew(token)), Renewed)
        cluster.run_for(300 * MS)

    assert value(cluster.call(holder, Get(b"k"))) == b"v"
    cluster.check()


def test_confirm_is_answered_by_a_leader_with_a_quorum_and_by_nobody_else() -> None:
    """L2."""
    cluster = Cluster(clients=1)
    leader, follower = cluster.leader(), cluster.follower()
    process = cluster.processes[leader]
    assert cluster.call(leader, Confirm()) == Confirmed(process.database.term)
    assert code(cluster.call(follower, Confirm())) is Refusal.NOT_LEADER
    assert code(cluster.call(cluster.clients[0], Confirm())) is Refusal.NOT_LEADER

    cluster.isolate(leader)
    outcome = cluster.call(leader, Confirm(), timeout_ns=3 * S)

    assert code(outcome) in (Refusal.NOT_LEADER, Refusal.UNAVAILABLE)
    assert process.led[-1].term == process.database.term or not process.database.is_leading


# -- watches --


def events(log: WatchLog) -> list[tuple[int, bytes]]:
    return [(group.revision, event.key) for group in log.changes for event in group.events]


def test_watches_at_every_node_see_the_same_changes_in_order_once(rng: random.Random) -> None:
    cluster = Cluster(clients=1, seed=rng.getrandbits(32))
    leader = cluster.leader()
    logs = {node: cluster.watch(node, b"w/", 0) for node in (*cluster.nodes, *cluster.clients)}
    for number in range(60):
        cluster.call(rng.choice([*cluster.nodes, *cluster.clients]), put(rng.choice([b"w/a", b"x/b"]), b"%d" % number))
        if number == 30:
            cluster.crash(leader)
            del logs[leader]
            cluster.nodes.remove(leader)
    cluster.run_for(S)

    seen = [events(log) for log in logs.values()]
    state = cluster.processes[cluster.leader()].database.state
    wanted = [(group.revision, event.key) for group in state.state.since(0) for event in group.events if event.key[:1] == b"w"]
    assert seen == [wanted] * 3
    assert wanted


def test_a_remote_watch_goes_on_at_another_replica_without_gap_or_double() -> None:
    cluster = Cluster(clients=1)
    leader = cluster.leader()
    (client,) = cluster.clients
    log = cluster.watch(client, b"", 0)
    cluster.call(client, put(b"a", b""))
    cluster.run_until(lambda: log.changes)

    cluster.crash(leader)
    cluster.nodes.remove(leader)
    asker = cluster.nodes[0]
    for number in range(10):
        cluster.call(asker, put(b"b%d" % number, b""))
    cluster.run_for(2 * S)

    assert [revision for revision, _ in events(log)] == list(range(1, 12))


def test_a_watch_from_now_begins_at_a_revision_that_a_quorum_confirmed() -> None:
    """A watcher at a follower that lags must not see what was written before it asked as new, nor miss what came after."""
    cluster = Cluster()
    leader, follower = cluster.leader(), cluster.follower()
    cluster.call(leader, put(b"k", b"before"))
    log = cluster.watch(follower, b"k")
    cluster.run_until(lambda: log.bookmark >= 0)
    assert log.bookmark == 1
    cluster.call(leader, put(b"k", b"after"))
    cluster.run_for(S)

    assert events(log) == [(2, b"k")]


def test_a_watch_of_a_compacted_revision_ends_with_the_reason() -> None:
    cluster = Cluster()
    leader = cluster.leader()
    limits = Command(0, 0, 0, SetLimits(Limits(history_revisions=5)))
    wire = encode_requests([(1, WriteRequest(limits, encode_command(limits)))])
    cluster.processes[leader].feed(Arrived(cluster.follower(), DATABASE, wire))
    for _ in range(9):
        cluster.call(leader, put(b"k", b""))

    log = cluster.watch(leader, b"k", 2)
    cluster.run_for(S)

    assert log.closed is not None
    assert (log.closed.resume, log.closed.compacted) == (2, 4)
    assert log.changes == []


def test_quiet_watches_get_bookmarks() -> None:
    cluster = Cluster(clients=1)
    leader = cluster.leader()
    logs = [cluster.watch(node, b"quiet", 0) for node in (leader, *cluster.clients)]
    cluster.run_until(lambda: all(log.bookmark == 0 for log in logs))
    cluster.call(leader, put(b"loud", b""))

    cluster.run_for(6 * S)

    assert [log.bookmark for log in logs] == [1, 1]


# -- members, checkpoints, leadership --


def test_a_replica_far_behind_gets_a_snapshot_and_equals_the_others() -> None:
    cluster = Cluster(checkpoint_min_bytes=20_000)
    leader, lost = cluster.leader(), cluster.follower()
    cluster.crash(lost)
    asker = next(node for node in cluster.nodes if node not in (leader, lost))
    for number in range(40):
        cluster.call(asker, put(b"k%d" % (number % 7), bytes(4_000)))
    assert cluster.processes[leader].disk.checkpoint is not None

    cluster.start(lost)
    cluster.run_for(3 * S)

    assert value(cluster.call(lost, Get(b"k3"))) == bytes(4_000)
    cluster.check()


def test_leadership_is_handed_over_on_request_and_writes_go_on() -> None:
    cluster = Cluster()
    leader, follower = cluster.leader(), cluster.follower()

    assert isinstance(cluster.call(follower, Transfer(follower)), Done)
    cluster.run_until(lambda: cluster.processes[follower].database.is_leading)

    assert isinstance(cluster.call(leader, put(b"k", b"v")), Outcome)
    assert cluster.processes[follower].led[-1].term == cluster.processes[follower].database.term


def test_members_change_only_as_raft_allows() -> None:
    cluster = Cluster()
    follower = cluster.follower()
    new = NodeId("aam@h9.example")

    assert isinstance(cluster.call(follower, Reconfigure(AddLearner(new, b"replica", {}))), Done)
    assert code(cluster.call(follower, Reconfigure(Promote(new)))) is Refusal.MEMBERS
    assert isinstance(cluster.call(follower, Reconfigure(Remove(new))), Done)

    cluster.run_for(S)
    configuration = cluster.processes[follower].database.configuration
    assert configuration is not None
    assert list(configuration.nodes) == cluster.nodes


def test_a_change_of_members_without_an_answer_may_have_been_made() -> None:
    cluster = Cluster()
    leader = cluster.leader()
    for node in cluster.nodes:
        if node != leader:
            cluster.crash(node)

    outcome = cluster.call(leader, Reconfigure(AddLearner(NodeId("aam@h9.example"), b"replica", {})), timeout_ns=2 * S)

    assert code(outcome) is Refusal.UNKNOWN


def test_an_expired_session_is_opened_anew_and_the_request_still_applied_once() -> None:
    cluster = Cluster(procedures=PROCEDURES)
    leader = cluster.leader()
    cluster.call(leader, append(b"\x00ha/k", b"a"))
    state = cluster.processes[leader].database.state
    for node in cluster.nodes:
        cluster.processes[node].database.state.sessions.clear()

    assert isinstance(cluster.call(leader, append(b"\x00ha/k", b"b")), Called)

    assert value(cluster.call(leader, Get(b"\x00ha/k"))) == b"ab"
    assert len(state.sessions) == 1


def test_a_request_sent_again_after_its_session_was_forgotten_is_never_applied_twice_R40() -> None:
    cluster = Cluster(procedures=PROCEDURES, clients=1)
    cluster.leader()
    (client,) = cluster.clients
    cluster.call(client, append(b"\x00ha/k", b"a"))
    request = cluster.submit(client, append(b"\x00ha/k", b"b"))
    cluster.run_for(300_000)
    for node in cluster.nodes:
        cluster.cut(client, node)
    cluster.run_for(S)
    for node in cluster.nodes:
        cluster.processes[node].database.state.sessions.clear()
    cluster.heal()

    replies = cluster.processes[client].replies
    cluster.run_until(lambda: request in replies)

    assert code(replies[request]) is Refusal.UNKNOWN
    assert value(cluster.call(client, Get(b"\x00ha/k"))) == b"ab"


def test_idle_sessions_are_forgotten_after_an_hour_through_the_log() -> None:
    cluster = Cluster()
    leader, follower = cluster.leader(), cluster.follower()
    cluster.call(follower, put(b"k", b"v"))
    state = cluster.processes[leader].database.state
    assert len(state.sessions) == 1
    process = cluster.processes[leader]

    server = process.database._server
    for minute in range(63):
        server.handle_timer(cluster.now_ns + minute * 60 * S)
    process.feed()
    cluster.submit(leader, Get(b"k"))
    cluster.run_for(S)

    assert state.sessions == {}
    cluster.check()


def test_bad_requests_are_refused_at_the_door() -> None:
    cluster = Cluster()
    leader = cluster.leader()
    cluster.call(leader, put(b"k", b"v"))
    index = cluster.processes[leader].database.state.index

    assert code(cluster.call(leader, put(b"", b""))) is Refusal.BAD
    assert code(cluster.call(leader, Grant(0))) is Refusal.BAD

    for read in (Get("k"), Get([b"k"]), Range("k"), Range(b"k", after="k"), Range(b"k", limit=1.5), Range(b"k", at=-1)):  # type: ignore[arg-type]
        assert code(cluster.call(leader, read)) is Refusal.BAD

    assert cluster.processes[leader].database.state.index == index


LEARNER = pack((1, (1, 5, 1, "aam@h9.example", "no bytes", ())))


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x90", b"\x91\x63", b"\x92\x01\x91\x01", b"\x93\x05\xff\x01", b"\x91" * 2000, LEARNER]
)
def test_malformed_messages_change_nothing(body: bytes) -> None:
    cluster = Cluster()
    leader, follower = cluster.leader(), cluster.follower()

    cluster.processes[leader].feed(Arrived(follower, DATABASE, [body]))

    with pytest.raises(DecodeError):
        decode_message(body)
    assert isinstance(cluster.call(leader, put(b"k", b"v")), Outcome)


def test_credit_is_given_back_for_everything_that_came() -> None:
    cluster = Cluster()
    leader, follower = cluster.leader(), cluster.follower()
    process = cluster.processes[leader]
    process.sent.clear()
    process.feed(Arrived(follower, DATABASE, [b"\x90", b"\x91\x63"]))

    (send,) = process.sent
    assert isinstance(send, Send)
    assert (send.event.count, send.event.byte_count) == (2, 3)  # type: ignore[union-attr]


RECORD = Record(b"k", b"v", 1, 2, 3, 4)
COMMAND = Command(1, 2, 3, OpenSession())
WIRE_REQUESTS: list[WireRequest] = [
    WriteRequest(COMMAND, encode_command(COMMAND)),
    Get(b"k"),
    Range(b"p", 5, b"a", 9),
    Renew(LeaseToken(4)),
    Reconfigure(AddLearner(NodeId("aam@h9.example"), b"replica", {"one": "127.0.0.1:1"})),  # type: ignore[dict-item]
    Reconfigure(Promote(NodeId("aam@h9.example"))),
    Reconfigure(Remove(NodeId("aam@h9.example"))),
    Transfer(NodeId("aam@h9.example")),
]


def test_requests_and_replies_survive_the_wire_in_runs() -> None:
    requests = list(enumerate(WIRE_REQUESTS))
    (body,) = encode_requests(requests)
    assert decode_message(body) == Requests(requests)

    replies: list[tuple[int, DatabaseOutcome]] = [
        (1, Found(None, 3)),  # type: ignore[arg-type]
        (2, Found(RECORD, 3)),  # type: ignore[arg-type]
        (3, Page([RECORD], 3, True)),  # type: ignore[arg-type]
        (4, Renewed(LeaseToken(4), 5)),
        (5, Confirmed(6)),
        (6, Done()),
        (7, Refused(Refusal.NOT_LEADER, "text", "aam@h1.example")),
    ]
    (body,) = encode_replies(replies)
    assert decode_message(body) == Replies(replies)
    assert len(encode_replies([(number, Found(Record(b"k", bytes(9_000), 1, 1, 1, 0), 1)) for number in range(12)])) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "message",
    [
        WatchOpen(1, b"p", None),
        WatchOpen(1, b"p", 5),
        WatchClose(1),
        WatchTake(1, 2),
        WatchDeliver(1, 2, [RevisionEvents(2, (KeyEvent(b"k", RECORD, None), KeyEvent(b"l", None, RECORD)))]),
        WatchEnd(1, 2, 3),
    ],
)
def test_watch_messages_survive_the_wire(message: WatchOpen | WatchClose | WatchTake | WatchDeliver | WatchEnd) -> None:
    assert decode_message(encode_watch(message)) == message


def test_compare_and_set_from_all_nodes_at_once_loses_no_update(rng: random.Random) -> None:
    cluster = Cluster(clients=1, seed=rng.getrandbits(32))
    cluster.leader()
    nodes = [*cluster.nodes, *cluster.clients]
    done = 0
    while done < 20:
        found = [(node, cluster.call(node, Get(b"n"))) for node in nodes]
        requests: list[tuple[NodeId, int]] = []
        for node, outcome in found:
            assert isinstance(outcome, Found)
            since = 0 if outcome.record is None else outcome.record.mod_revision
            change = Change((Compare.unchanged(b"n", since),), (Put(b"n", b"%d" % (done + 1)),))
            requests.append((node, cluster.submit(node, change)))
        cluster.run_until(lambda requests=requests: all(one in cluster.processes[node].replies for node, one in requests))  # type: ignore[misc]
        outcomes = [cluster.processes[node].replies[one] for node, one in requests]
        assert sum(isinstance(one, Outcome) and one.succeeded for one in outcomes) == 1
        done += 1
    assert value(cluster.call(nodes[0], Get(b"n"))) == b"20"


def test_a_client_that_goes_away_leaves_nothing_behind() -> None:
    cluster = Cluster(clients=1)
    cluster.leader()
    (client,) = cluster.clients
    log = cluster.watch(client, b"", 0)
    cluster.run_until(lambda: log.bookmark == 0)
    replicas = [cluster.processes[node] for node in cluster.nodes]
    assert sum(len(process.database._watches) for process in replicas) == 1

    for process in replicas:
        process.feed(PeerDown(client))

    assert sum(len(process.database._watches) for process in replicas) == 0
