"""Reaching a vpxa, any that lives: the center knows some addresses, learns the others from the database, and tries in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import trio

from ha_core.errors import HAError, NoUsablePathError, RemoteProtocolError, TransportError
from ha_core.runtime.rpc import dial_rpc

ATTEMPT_S = 2.0
"""How long one vpxa may take for an answer before the next one is asked."""
ROUNDS = 6
PAUSE_S = 0.25


class Hosts:
    """A connection to some vpxa, remade when it breaks."""

    def __init__(self, seeds: Sequence[str | Path], key: bytes) -> None:
        self._addresses: list[str | Path] = list(seeds)
        self._key = key

    def learn(self, addresses: Sequence[str]) -> None:
        self._addresses += [address for address in addresses if address and address not in self._addresses]

    def forget(self, address: str) -> None:
        """A host that has left; the last address is kept, there may be a new host behind it."""
        if address in self._addresses and len(self._addresses) > 1:
            self._addresses.remove(address)

    async def call(self, method: str, /, **params: object) -> object:
        """Ask some vpxa; a request that is lost or may be repeated (no leader just now, an outcome that nobody knows, a host that
        left) is asked again elsewhere: all that the center sends may be done twice.

        Raises:
            NoUsablePathError: no vpxa answered; the text says who was tried.
            HAError: what the cluster answered.
        """
        errors: list[str] = []
        for round_number in range(ROUNDS * max(1, len(self._addresses))):
            address = self._addresses[0] if self._addresses else None
            if address is None:
                break
            try:
                key = None if isinstance(address, Path) else self._key
                with trio.fail_after(ATTEMPT_S):
                    async with dial_rpc(address, key=key) as client:
                        return await client.call(method, **params)
            except (HAError, trio.TooSlowError) as exc:
                if isinstance(exc, HAError) and not (exc.retryable or _is_stranger(exc)):
                    raise
                errors.append(f"{address}: {exc or 'no answer'}")
                self._addresses.append(self._addresses.pop(0))
                if (round_number + 1) % len(self._addresses) == 0:
                    await trio.sleep(PAUSE_S)
        tried = "; ".join(errors[-len(self._addresses) :]) or "no vpxa is known"
        raise NoUsablePathError(f"{method}: no vpxa answered: {tried}", paths=tuple(map(str, self._addresses)))


def _is_stranger(error: HAError) -> bool:
    """A host that does not hold our key: it has left, or its place was taken."""
    return isinstance(error, RemoteProtocolError) and error.code == "key"


async def call_host(address: str, key: bytes, method: str, /, limit_s: float = ATTEMPT_S, **params: object) -> object:
    """Ask this very vpxa; it may take ``limit_s``.

    Raises:
        TransportError: nobody answers there.
        HAError: what it answered.
    """
    try:
        with trio.fail_after(limit_s):
            async with dial_rpc(address, key=key) as client:
                return await client.call(method, **params)
    except trio.TooSlowError as exc:
        raise TransportError(f"{address}: no answer in {limit_s:g} s") from exc
