"""Planted bugs of Raft and the database (R*)."""

from __future__ import annotations

from tests.mutants.harness import Mutant

MUTANTS: list[Mutant] = []
