"""ha-core keeps virtual machines and services running when hosts, networks, disks or processes fail.

This module re-exports the public names; nothing else is public.
"""

from ha_core._version import __version__ as __version__
from ha_core.config import AAM as AAM
from ha_core.config import FAST as FAST
from ha_core.config import LAN as LAN
from ha_core.config import Config as Config
from ha_core.config import Profile as Profile
