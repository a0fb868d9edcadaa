"""The replicated state machine: a multi-version key-value map with transactions, watches, leases and client sessions."""

from ha_core.machines.keyvalue.machine import KeyValue as KeyValue
from ha_core.machines.keyvalue.transaction import KvTransaction as KvTransaction
from ha_core.machines.keyvalue.transaction import Procedure as Procedure
from ha_core.machines.keyvalue.transaction import ProcedureError as ProcedureError
