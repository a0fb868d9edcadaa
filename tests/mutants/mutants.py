"""All planted bugs. Add yours to the table of its room: messages, database, cluster, processes, stores.

``python -m tests.mutants NAME`` tries one and says which seed catches it: remember that seed in the table.
"""

from __future__ import annotations

from tests.mutants import cluster, database, messages, processes, stores

MUTANTS = [*messages.MUTANTS, *database.MUTANTS, *cluster.MUTANTS, *processes.MUTANTS, *stores.MUTANTS]
