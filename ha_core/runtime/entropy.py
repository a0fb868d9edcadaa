"""The one place where entropy is drawn; the seed is logged, so that a run can be explained."""

from __future__ import annotations

import logging
import random
import secrets

logger = logging.getLogger(__name__)


def fresh_rng(what: str) -> random.Random:
    """A generator for the machine named ``what``."""
    seed = secrets.randbits(64)
    logger.debug("seed of %s: %d", what, seed)
    return random.Random(seed)


def fresh_id() -> bytes:
    """16 random bytes: the identity of a store, a session, a guard instance."""
    return secrets.token_bytes(16)
