"""An isolation address answers, or it does not; both in time."""

from __future__ import annotations

import os

import pytest
import trio

from ha_core.runtime.ping import ping


async def test_a_listening_port_answers() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]

    assert await ping(f"127.0.0.1:{port}", 1.0)

    await listeners[0].aclose()

    assert await ping(f"127.0.0.1:{port}", 1.0), "a refusal is an answer too"


@pytest.mark.parametrize("address", ["256.0.0.1", "256.0.0.1:9"])
async def test_what_cannot_be_reached_does_not_answer(address: str) -> None:
    assert not await ping(address, 0.05)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may send an ICMP echo here")
async def test_loopback_answers_an_echo() -> None:
    assert await ping("127.0.0.1", 1.0)
