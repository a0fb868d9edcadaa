"""``primaries.json`` in the run directory: where renewals go. The aam writes it, atomically, whenever it learns of a change.

{"primaries": [{"node": "aam@h1.example", "links": {"a": "127.1.0.1:7400", "b": "127.2.0.1:7400"}}]}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

FILE_NAME = "primaries.json"
MAX_PRIMARIES = 16
MAX_LINKS = 8


def encode_primaries(primaries: Mapping[str, Mapping[str, str]]) -> bytes:
    """``primaries``: node id -> link name -> ``host:port`` of its message endpoint."""
    listed = [{"node": node, "links": dict(links)} for node, links in primaries.items()]
    return json.dumps({"primaries": listed}).encode()


def decode_primaries(data: bytes) -> dict[str, dict[str, str]]:
    """Raises ValueError with what is wrong."""
    try:
        listed = json.loads(data)["primaries"]
        found = {str(item["node"]): {str(k): str(v) for k, v in item["links"].items()} for item in listed}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise ValueError(f"expected {{'primaries': [{{'node': ..., 'links': {{...}}}}]}}: {exc!r}") from None
    if len(found) > MAX_PRIMARIES or any(len(links) > MAX_LINKS for links in found.values()):
        raise ValueError(f"expected at most {MAX_PRIMARIES} primaries with {MAX_LINKS} links each")
    return found


def write_primaries(run_dir: str, primaries: Mapping[str, Mapping[str, str]]) -> None:
    """Replace the file atomically. It lies on a tmpfs and is rebuilt by the aam: no flush."""
    path = os.path.join(run_dir, FILE_NAME)
    with open(path + ".new", "wb") as file:
        file.write(encode_primaries(primaries))
    os.replace(path + ".new", path)


def split_address(text: str) -> tuple[str, int] | None:
    """``host:port`` (IPv6 in brackets) as a pair; None if it is something else. Numeric hosts only: nothing here asks DNS."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        return None
    return host.strip("[]"), int(port)
