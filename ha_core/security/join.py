"""How the cluster key travels to a new host: sealed under a join token that only that host and its administrator know.

A token is 32 random bytes, made by the host that wants to join, shown to its administrator, and used once. The key is
covered by a keyed BLAKE2b stream of a fresh nonce and carries a tag over nonce and cover, so that a stranger neither reads nor
changes it. TLS takes this over later; the token stays.
"""

from __future__ import annotations

import hmac
import secrets
from hashlib import blake2b
from pathlib import Path

from ha_core.errors import ConfigError, RemoteProtocolError
from ha_core.storage.files import replace_file

KEY_BYTES = 32
_NONCE_BYTES = 16
_TAG_BYTES = 16


def make_token(path: Path) -> bytes:
    """The token in ``path`` (hexadecimal, mode 0600), made now if there is none yet, or half of one."""
    try:
        return read_token(path.read_text())
    except (FileNotFoundError, ConfigError):
        pass
    token = secrets.token_bytes(KEY_BYTES)
    replace_file(path, f"{token.hex()}\n".encode(), mode=0o600)
    return token


def read_token(text: str) -> bytes:
    """Raises ConfigError for anything but 64 hexadecimal digits."""
    try:
        token = bytes.fromhex(text.strip())
    except ValueError:
        token = b""
    if len(token) != KEY_BYTES:
        raise ConfigError(
            "a join token has 64 hexadecimal digits; the new host shows its own when its agent starts", field="token"
        )
    return token


def _cover(token: bytes, nonce: bytes) -> bytes:
    return blake2b(nonce, key=token, digest_size=KEY_BYTES, person=b"ha-core join key").digest()


def _tag(token: bytes, sealed: bytes) -> bytes:
    return blake2b(sealed, key=token, digest_size=_TAG_BYTES, person=b"ha-core join tag").digest()


def seal(token: bytes, key: bytes) -> bytes:
    """The cluster key as it may travel: nonce, covered key, tag."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    body = nonce + bytes(a ^ b for a, b in zip(key, _cover(token, nonce), strict=True))
    return body + _tag(token, body)


def unseal(token: bytes, sealed: bytes) -> bytes:
    """Raises RemoteProtocolError if it was sealed under another token, or changed on the way."""
    body, tag = sealed[:-_TAG_BYTES], sealed[-_TAG_BYTES:]
    if len(body) != _NONCE_BYTES + KEY_BYTES or not hmac.compare_digest(tag, _tag(token, body)):
        raise RemoteProtocolError("the cluster key was sealed under another join token", code="token")
    return bytes(a ^ b for a, b in zip(body[_NONCE_BYTES:], _cover(token, body[:_NONCE_BYTES]), strict=True))
