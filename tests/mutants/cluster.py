"""Planted bugs of high availability (H*)."""

from __future__ import annotations

from tests.mutants.harness import Mutant

MUTANTS: list[Mutant] = []
