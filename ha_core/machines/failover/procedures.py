"""The log commands at work: deterministic functions over the records, run at their log index on every replica.

Rules (the letters are those of docs/guarantees.md):

* A token is the log index of its Grant or Assign, so none ever goes back (I44).
* L1: only a changed *kernel boot* proves that VMs are gone. A Grant to another guard of the same boot retires the old token and
  re-stamps its runs in the same entry; its answer names the chain that it continues.
* L3: a run is assigned again only after it was released, or after its lease was revoked.
* L7, H21: reports are numbered by the guard; what is older than the newest one taken is dropped.
* What comes too late is refused, never done twice: every command names the token that its proposer saw.

A procedure never raises for what a command asks; it answers an Outcome with the reason.
"""

from __future__ import annotations

from ha_core.machines.failover import lease_procedures as lease_procedures
from ha_core.machines.failover import order_procedures as order_procedures
from ha_core.machines.failover import run_procedures as run_procedures
from ha_core.machines.failover.procedure_registry import PROCEDURES as PROCEDURES
from ha_core.machines.failover.procedure_registry import Procedure as Procedure
