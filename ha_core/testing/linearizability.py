"""Checks of histories: is what clients saw possible if every call took effect at one instant between its call and its return?

``check_linearizable`` searches for such an order (Wing and Gong's search with Lowe's memory of what was tried, key by key);
``check_revisions`` needs no search, because every answer of the database carries a revision; ``check_watch`` holds a watch
against what was committed. All give the violations as texts, none if the history is good.

A call whose fate is unknown (``returned_ns`` None) may have taken effect at any time after it was called, or never.

Sources: Wing, Gong, "Testing and verifying concurrent objects" (1993); Lowe, "Testing for linearizability" (2017).
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Sequence

import attrs

from ha_core.machines.keyvalue.model import KeyEvent, RevisionEvents


class Kind(enum.Enum):
    GET = "get"
    PUT = "put"
    DELETE = "delete"
    COMPARE_AND_PUT = "compare-and-put"
    """Put ``value`` if the key had ``expected``."""


@attrs.frozen(kw_only=True)
class Operation:
    """One call of one client on one key. Values are None where the key is not there."""

    client: str
    kind: Kind
    key: bytes
    called_ns: int
    returned_ns: int | None
    value: bytes | None = None
    """What was written."""
    expected: bytes | None = None
    found: bytes | None = None
    """What a get returned."""
    succeeded: bool | None = None
    """Whether a compare-and-put wrote; None if its fate is unknown."""
    revision: int | None = None
    """Of the answer."""

    def __str__(self) -> str:
        details = {
            Kind.GET: f"get {self.key!r} -> {self.found!r}",
            Kind.PUT: f"put {self.key!r} = {self.value!r}",
            Kind.DELETE: f"delete {self.key!r}",
            Kind.COMPARE_AND_PUT: f"put {self.key!r} = {self.value!r} if {self.expected!r} -> {self.succeeded}",
        }[self.kind]
        end = "?" if self.returned_ns is None else str(self.returned_ns)
        return f"{self.client}: {details} [{self.called_ns}, {end}] at revision {self.revision}"


# -- Wing, Gong, Lowe --


@attrs.define(eq=False)
class _Node:
    """A call or a return in the order of time, in a list from which calls that took effect are lifted with their returns."""

    operation: int
    match: _Node | None = None
    """A call's return; None for a return."""
    before: _Node | None = None
    after: _Node | None = None


def check_linearizable(history: Sequence[Operation]) -> list[str]:
    """Per key, because a history is linearizable if and only if that of each key is. Time grows steeply with the number of
    calls that overlap and of unknown fates, not with the length."""
    by_key: dict[bytes, list[Operation]] = {}
    for operation in history:
        by_key.setdefault(operation.key, []).append(operation)
    violations: list[str] = []
    for key, operations in sorted(by_key.items()):
        longest = _search(operations)
        if longest is not None:
            stuck = [operation for at, operation in enumerate(operations) if not longest >> at & 1 and operation.returned_ns]
            first = min(stuck, key=lambda operation: operation.returned_ns or 0)
            violations.append(f"key {key!r}: no order explains {len(operations)} calls; none was found that goes past: {first}")
    return violations


def _step(state: bytes | None, operation: Operation) -> tuple[bool, bytes | None]:
    """(the answer is possible in this state, the state after it)."""
    match operation.kind:
        case Kind.GET:
            return operation.returned_ns is None or operation.found == state, state
        case Kind.PUT:
            return True, operation.value
        case Kind.DELETE:
            return True, None
        case Kind.COMPARE_AND_PUT:
            succeeds = state == operation.expected
            return operation.succeeded in (None, succeeds), operation.value if succeeds else state


def _search(operations: Sequence[Operation]) -> int | None:
    """None if an order was found, else the largest set of operations (as bits) that could be ordered."""
    head = _linked(operations)
    open_count = sum(operation.returned_ns is not None for operation in operations)
    tried: set[tuple[int, bytes | None]] = set()
    stack: list[tuple[_Node, bytes | None]] = []
    state: bytes | None = None
    done = longest = 0
    node = head.after
    while open_count and node is not None:
        if node.match is not None:
            operation = operations[node.operation]
            possible, new_state = _step(state, operation)
            new_done = done | 1 << node.operation
            if possible and (new_done, new_state) not in tried:
                tried.add((new_done, new_state))
                stack.append((node, state))
                state, done = new_state, new_done
                open_count -= operation.returned_ns is not None
                if done.bit_count() > longest.bit_count():
                    longest = done
                _lift(node)
                node = head.after
            else:
                node = node.after
        else:
            # A call that had returned by now has not taken effect: undo the last choice.
            if not stack:
                return longest
            node, state = stack.pop()
            done &= ~(1 << node.operation)
            open_count += operations[node.operation].returned_ns is not None
            _unlift(node)
            node = node.after
    return None if not open_count else longest


def _linked(operations: Sequence[Operation]) -> _Node:
    """Calls and returns by time; calls first where times are equal, so that such operations overlap. Unknown returns last."""
    last = max((operation.returned_ns or operation.called_ns for operation in operations), default=0) + 1
    nodes: list[tuple[int, int, int, _Node]] = []
    for at, operation in enumerate(operations):
        end = _Node(at)
        nodes.append((operation.called_ns, 0, at, _Node(at, end)))
        nodes.append((last if operation.returned_ns is None else operation.returned_ns, 1, at, end))
    head = previous = _Node(-1)
    for _, _, _, node in sorted(nodes, key=lambda item: item[:3]):
        previous.after, node.before = node, previous
        previous = node
    return head


def _unlink(node: _Node) -> None:
    if node.before is not None:
        node.before.after = node.after
    if node.after is not None:
        node.after.before = node.before


def _relink(node: _Node) -> None:
    if node.before is not None:
        node.before.after = node
    if node.after is not None:
        node.after.before = node


def _lift(call: _Node) -> None:
    _unlink(call)
    if call.match is not None:
        _unlink(call.match)


def _unlift(call: _Node) -> None:
    if call.match is not None:
        _relink(call.match)
    _relink(call)


# -- by revision --


def check_revisions(history: Sequence[Operation]) -> list[str]:
    """Replay what was answered in the order of its revisions: each answer must fit the state there, revisions of writes are
    unique, and none is smaller than that of a call which had returned before it was made."""
    violations = _check_real_time(history)
    writes: dict[int, Operation] = {}
    maybe: dict[bytes, set[bytes | None]] = {}
    for operation in history:
        if operation.kind is Kind.GET:
            continue
        if operation.returned_ns is None:
            maybe.setdefault(operation.key, set()).add(operation.value)
        elif _wrote(operation) and operation.revision is not None:
            other = writes.setdefault(operation.revision, operation)
            if other is not operation:
                violations.append(f"two writes have revision {operation.revision}: {other}; {operation}")
    state: dict[bytes, bytes | None] = {}
    answered = [operation for operation in history if operation.returned_ns is not None and operation.revision is not None]
    for operation in sorted(answered, key=lambda one: (one.revision or 0, not _wrote(one))):
        now = state.get(operation.key)
        if operation.kind is Kind.GET and operation.found != now and operation.found not in maybe.get(operation.key, ()):
            violations.append(f"the value at this revision is {now!r}: {operation}")
        is_certain = operation.kind is Kind.COMPARE_AND_PUT and operation.key not in maybe
        if is_certain and operation.succeeded is not (operation.expected == now):
            violations.append(f"the value before this revision is {now!r}: {operation}")
        if _wrote(operation):
            state[operation.key] = operation.value
    return violations


def _wrote(operation: Operation) -> bool:
    """A delete of nothing has the revision of another's write, so a delete counts only if ``succeeded`` says that it wrote."""
    return operation.kind is Kind.PUT or operation.succeeded is True


def _check_real_time(history: Sequence[Operation]) -> list[str]:
    violations: list[str] = []
    returning: list[tuple[int, int, int]] = []
    floor, by = 0, -1
    known = sorted(
        (operation.called_ns, at, operation)
        for at, operation in enumerate(history)
        if operation.revision is not None and operation.returned_ns is not None
    )
    for called_ns, at, operation in known:
        while returning and returning[0][0] < called_ns:
            _, revision, other = heapq.heappop(returning)
            if revision > floor:
                floor, by = revision, other
        revision = operation.revision or 0
        if revision < floor or (revision == floor and by >= 0 and operation.kind is Kind.PUT):
            violations.append(f"revision {floor} had been seen before this was called ({history[by]}): {operation}")
        heapq.heappush(returning, (operation.returned_ns or 0, revision, at))
    return violations


# -- watches --


def check_watch(
    delivered: Sequence[RevisionEvents], committed: Sequence[RevisionEvents], *, prefix: bytes, after: int, until: int
) -> list[str]:
    """Whether a watch of ``prefix`` from revision ``after`` up to its bookmark ``until`` delivered what was committed: ordered,
    unique, atomic (a revision whole) and reliable (nothing left out). ``committed`` holds every revision in between."""
    violations: list[str] = []
    last = after
    for group in delivered:
        if group.revision <= last:
            violations.append(f"revision {group.revision} was delivered after {last}: out of order, or twice")
        last = max(last, group.revision)
    wanted: dict[int, tuple[KeyEvent, ...]] = {}
    for group in committed:
        events = tuple(event for event in group.events if event.key.startswith(prefix))
        if events and after < group.revision <= until:
            wanted[group.revision] = events
    got = {group.revision: group.events for group in delivered}
    for revision in sorted(wanted.keys() | got.keys()):
        if revision not in got:
            violations.append(f"revision {revision} was left out")
        elif revision not in wanted:
            violations.append(f"revision {revision} was delivered and never committed under {prefix!r}")
        elif got[revision] != wanted[revision]:
            violations.append(f"revision {revision} was delivered in part or changed")
    return violations
