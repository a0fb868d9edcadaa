"""What a host that has lost the quorum says of itself: isolated, partitioned or failed.

The verdict explains; it starts and stops nothing. VMs end at their lease's deadline and not before, so a network that blinks
between all hosts fences nobody (H10), and a host that sees a quorum never says that it is isolated (H9).

    CONNECTED   a leader is known
    PINGING     none was known for ``patience_ns``: the isolation addresses are asked
    PARTITIONED a peer or an isolation address answers: the network works, but not to a quorum
    ISOLATED    nobody answers within ``answer_ns``
    FAILED      this host's own store failed: it takes part in no quorum, whatever the network does
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from ha_core.ids import NodeId


class Verdict(enum.Enum):
    CONNECTED = "connected"
    PINGING = "pinging"
    PARTITIONED = "partitioned"
    ISOLATED = "isolated"
    FAILED = "failed"


class Isolation:
    def __init__(self, addresses: Sequence[str], patience_ns: int, answer_ns: int) -> None:
        """``patience_ns``: without a leader for so long, a host asks; ``answer_ns``: how long an answer may take."""
        self.verdict = Verdict.CONNECTED
        self.reason = ""
        self._addresses = tuple(addresses)
        self._patience_ns = patience_ns
        self._answer_ns = answer_ns
        self._lost_ns: int | None = None
        self._asked_ns: int | None = None
        self._answered: dict[str, int] = {}
        self._reachable: dict[NodeId, None] = {}
        self._failed = ""
        self._pings: list[str] = []

    # -- what it is told --

    def leader(self, known: bool, now_ns: int) -> None:
        if known:
            self._lost_ns = self._asked_ns = None
        elif self._lost_ns is None:
            self._lost_ns = now_ns
        self._conclude(now_ns)

    def peer(self, peer: NodeId, reachable: bool, now_ns: int) -> None:
        if reachable:
            self._reachable[peer] = None
        else:
            self._reachable.pop(peer, None)
        self._conclude(now_ns)

    def answered(self, address: str, now_ns: int) -> None:
        """An isolation address answered a ping."""
        if address in self._addresses:
            self._answered[address] = now_ns
        self._conclude(now_ns)

    def store_failed(self, error: str, now_ns: int) -> None:
        self._failed = error
        self._conclude(now_ns)

    # -- time --

    def next_timer(self) -> int | None:
        if self._lost_ns is None:
            return None
        return self._lost_ns + self._patience_ns if self._asked_ns is None else self._asked_ns + self._answer_ns

    def handle_timer(self, now_ns: int) -> None:
        timer = self.next_timer()
        if timer is None or now_ns < timer:
            return
        self._conclude(now_ns, overdue=self._asked_ns is not None)
        self._asked_ns = now_ns
        self._pings.extend(self._addresses)

    def take_pings(self) -> list[str]:
        """Addresses to ping now."""
        pings, self._pings = self._pings, []
        return pings

    # -- the verdict --

    def _conclude(self, now_ns: int, *, overdue: bool = False) -> None:
        if self._failed:
            self._say(Verdict.FAILED, f"the store failed: {self._failed}")
        elif self._lost_ns is None:
            self._say(Verdict.CONNECTED, "")
        elif now_ns < self._lost_ns + self._patience_ns:
            return
        elif self._reachable:
            self._say(Verdict.PARTITIONED, f"no quorum, but {', '.join(sorted(self._reachable))} can be reached")
        elif self._answers(now_ns):
            self._say(Verdict.PARTITIONED, f"no peer can be reached, but {', '.join(self._answers(now_ns))} answers")
        elif overdue:
            asked = ", ".join(self._addresses) or "no isolation address is configured"
            self._say(Verdict.ISOLATED, f"no peer can be reached and nobody answers ({asked})")
        elif self.verdict in (Verdict.CONNECTED, Verdict.PARTITIONED):
            self._say(Verdict.PINGING, "no leader is known: asking the isolation addresses")

    def _answers(self, now_ns: int) -> list[str]:
        since_ns = max(self._lost_ns or 0, now_ns - 2 * self._answer_ns)
        return [address for address in self._addresses if self._answered.get(address, -1) >= since_ns]

    def _say(self, verdict: Verdict, reason: str) -> None:
        self.verdict, self.reason = verdict, reason
