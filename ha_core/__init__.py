"""ha-core keeps virtual machines and services running when hosts, networks, disks or processes fail.

This module re-exports the public names; nothing else is public, but for ``ha_core.errors``, ``ha_core.events``,
``ha_core.interfaces`` and ``ha_core.testing``.
"""

from ha_core._version import __version__ as __version__
from ha_core.config import AAM as AAM
from ha_core.config import FAST as FAST
from ha_core.config import LAN as LAN
from ha_core.config import Config as Config
from ha_core.config import Profile as Profile
from ha_core.ids import ChannelName as ChannelName
from ha_core.ids import FencingToken as FencingToken
from ha_core.ids import LinkName as LinkName
from ha_core.ids import MessageId as MessageId
from ha_core.ids import NodeId as NodeId
from ha_core.ids import Revision as Revision
from ha_core.machines.durable_events import Message as Message
from ha_core.machines.keyvalue.model import Change as Change
from ha_core.machines.keyvalue.model import Compare as Compare
from ha_core.machines.keyvalue.model import Delete as Delete
from ha_core.machines.keyvalue.model import Get as Get
from ha_core.machines.keyvalue.model import Outcome as Outcome
from ha_core.machines.keyvalue.model import Page as Page
from ha_core.machines.keyvalue.model import Put as Put
from ha_core.machines.keyvalue.model import Record as Record
from ha_core.machines.keyvalue.model import RequestId as RequestId
from ha_core.runtime.database import Database as Database
from ha_core.runtime.database import Lease as Lease
from ha_core.runtime.database import Watch as Watch
from ha_core.runtime.node import Inbox as Inbox
from ha_core.runtime.node import Node as Node
from ha_core.runtime.node import SessionChannel as SessionChannel
from ha_core.runtime.node import Transaction as Transaction
from ha_core.runtime.node import open_node as open_node
from ha_core.storage.sqlite_transaction import DeadLetter as DeadLetter
