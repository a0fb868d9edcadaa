"""Options and guards for all tests: a seed that is printed, golden files that can be rewritten, a limit on async tests."""

from __future__ import annotations

import functools
import inspect
import os
import random
import secrets
from collections.abc import Awaitable, Callable
from typing import NoReturn

import pytest
import trio

ASYNC_LIMIT_S = 60


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of the random tests (printed at the head of the run)")
    parser.addoption(
        "--rewrite", action="store_true", help="write the golden output of interaction files anew; then read the diff"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--seed") is None:
        worker = getattr(config, "workerinput", None)
        config.option.seed = worker["seed"] if worker else secrets.randbits(32)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    node.workerinput["seed"] = node.config.option.seed  # type: ignore[attr-defined]


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.option.seed} (repeat with: pytest --seed {config.option.seed})"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{request.config.option.seed}/{request.node.nodeid}")


@pytest.fixture
def rewrite(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--rewrite"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that hangs is cancelled by trio itself: a signal would leave the tests after it inside a dead run."""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = _limited(item.obj)


def _limited(function: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(function)
    async def limited(*args: object, **kwargs: object) -> None:
        with trio.fail_after(ASYNC_LIMIT_S):
            await function(*args, **kwargs)

    return limited


def skip_without(what: str, reason: str) -> NoReturn:
    """Skip this test, because the machine lacks ``what``; if HA_CORE_REQUIRE (a list with commas) names it, fail instead."""
    if what in os.environ.get("HA_CORE_REQUIRE", "").split(","):
        pytest.fail(f"HA_CORE_REQUIRE={what}, but: {reason}", pytrace=False)
    pytest.skip(reason)
