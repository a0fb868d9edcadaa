"""Plain values and their bytes: what may be in a command, a reply or a snapshot."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, cast

import msgpack

from ha_core.errors import DecodeError

MAX_NUMBER = (1 << 63) - 1

_pack = cast("Callable[[object], bytes]", msgpack.Packer().pack)


def pack(plain: object) -> bytes:
    return _pack(plain)


def unpack(data: bytes) -> object:
    """One msgpack value, arrays as tuples.

    Raises:
        DecodeError: it is none, or holds an extension type or too deep a nesting.
    """
    try:
        value: object = msgpack.unpackb(data, use_list=False, strict_map_key=False, ext_hook=_refuse_extension)
    except DecodeError:
        raise
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as exc:
        raise DecodeError(f"not a msgpack value: {exc}", code="msgpack") from exc
    return value


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise DecodeError(f"msgpack extension type {code} is not used here", code="msgpack")


def is_number(value: object) -> bool:
    """Whether it may stand for a token, a revision, a length of time."""
    return type(value) is int and 0 <= value <= MAX_NUMBER


def is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can carry: half of a surrogate pair (a file's name can have one) cannot go."""
    if type(value) is not str:
        return False
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def is_plain(value: object, depth: int = 32) -> bool:
    """Whether a value may go into the log or a reply."""
    if value is None or type(value) in (bool, bytes) or is_text(value):
        return True
    if type(value) is int:
        return -MAX_NUMBER <= value <= MAX_NUMBER
    return type(value) is tuple and depth > 0 and all(is_plain(item, depth - 1) for item in value)
