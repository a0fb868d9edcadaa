"""Planted bugs of shells and stores (H5, H20, H27, M6, S*), caught by named tests."""

from __future__ import annotations

from tests.mutants.harness import Mutant

MUTANTS: list[Mutant] = []
