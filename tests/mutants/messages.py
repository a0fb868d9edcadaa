"""Planted bugs of messages (M*)."""

from __future__ import annotations

from tests.mutants.harness import Mutant

MUTANTS: list[Mutant] = []
