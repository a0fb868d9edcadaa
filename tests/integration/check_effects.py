"""Judge a kill campaign by two SQLite files alone: what the sender's transactions say they sent, and the receiver's effects.

Standard library only, and nothing of the project: ``python check_effects.py SENDER.db RECEIVER.db`` prints one JSON object.

Tables: ``sent (channel, number, digest)`` and ``effects (at, channel, number, body)``; ``at`` is the order of the effects.
"""

import hashlib
import json
import sqlite3
import sys


def check(sender_path: str, receiver_path: str) -> dict[str, int]:
    """Counts of what was sent and of everything that is wrong with what arrived."""
    with sqlite3.connect(sender_path) as sender:
        sent = {
            (channel, number): digest for channel, number, digest in sender.execute("SELECT channel, number, digest FROM sent")
        }
    with sqlite3.connect(receiver_path) as receiver:
        effects = receiver.execute("SELECT channel, number, body FROM effects ORDER BY at").fetchall()
    sender.close()
    receiver.close()
    seen: set[tuple[str, int]] = set()
    last: dict[str, int] = {}
    duplicates = disordered = damaged = unsent = 0
    for channel, number, body in effects:
        key = (channel, number)
        duplicates += key in seen
        disordered += number != last.get(channel, 0) + 1
        unsent += key not in sent
        damaged += key in sent and hashlib.sha256(body).hexdigest() != sent[key]
        seen.add(key)
        last[channel] = number
    return {
        "sent": len(sent),
        "delivered": len(effects),
        "lost": len(sent.keys() - seen),
        "duplicates": duplicates,
        "disordered": disordered,
        "damaged": damaged,
        "unsent": unsent,
    }


if __name__ == "__main__":
    print(json.dumps(check(sys.argv[1], sys.argv[2])))
