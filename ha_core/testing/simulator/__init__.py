"""Deterministic simulation: any set of machines in virtual time, with a seeded network, disks, clocks and process faults.

One seed, one trace: nothing here reads a wall clock, draws entropy or depends on PYTHONHASHSEED. Two runs of a seed give the
same ``Simulation.trace_hash``. A step of a process costs about 20 us plus what its machine costs.

The parts:

``Simulation``      virtual clock, heap of events, seeded streams, trace, counted faults, checked invariants (core.py)
``SimProcess``      runs one machine through ``contract.feed``: post, crash, crash_within, restart, freeze (process.py)
``SimHost``         processes that share clock, power and fate (host.py);  ``SimClock``: its nanoseconds (clock.py)
``SimDisk``         a record store (Persist, WriteCheckpoint) on a ``SimDevice`` with its faults (disk.py)
``SimNetwork``      hosts and links; each direction of each path is a ``Flow`` with its faults (network.py)
``SimMessages``     message level: datagrams, ordered channels, sessions (messages.py)
``SimConnections``  connection level: byte streams and UDP for the endpoint machine (connections.py)
``Chaos``           begins and ends faults at random; ``network_faults``, ``disk_faults``, ``process_faults`` (faults.py)

A worked example, complete and running: ha_core/testing/campaigns/ping.py (two machines that ping each other and remember on
disk). In short:

    network = SimNetwork(sim, ["n1", "n2"], links=("a", "b"))
    messages = SimMessages(network)
    process = SimProcess(sim, "n1", build, disk=SimDisk(sim, "n1"), start=False)    # build(process) -> machine, at each start
    process.on(Send, lambda effect: messages.send_datagram("n1", effect.to, effect.body))
    messages.attach(process, on_datagram=lambda sender, topic, body: process.post(Got(sender, body)))
    process.start()
    sim.watch(check)                                             # check(process name) after every step of every process
    chaos = Chaos(sim, [*network_faults(network), *process_faults([process])], sim.swarm(self.faults))
    chaos.start()
    sim.run_for(20 * SECOND)                                     # safety phase: anything may happen, nothing may go wrong
    chaos.stop()
    network.heal_all()
    process.start()                                              # does nothing to a live one
    done = sim.run_for(30 * SECOND, stop=lambda: ...)            # liveness phase: work must get done; else sim.violate(...)

Play a campaign: ``play_seed(PingCampaign(), 7)`` of ha_core.testing.campaigns, or ``ha-core simulate --campaign NAME
--seeds 1..200`` (NAME in CAMPAIGNS there, or ``module:class``); ``--seed 7 --trace`` shows the trace of one seed.

Notes for those who write campaigns:

* Draw randomness from ``sim.stream("a name of your own")``; machines get ``process.rng``.
* ``process.on(EffectClass, perform)`` says what carries an effect out. Persist and WriteCheckpoint go to ``process.disk``.
  An effect that nothing carries out is an error.
* ``sim.violate(id, text)`` records and goes on. An InvariantError whose text begins with a number ("I35 ...") out of a machine
  is recorded as that invariant; any other exception of a machine as invariant ``error``, and the process dies.
* A machine with a method ``check()`` has it called after each of its steps.
* Faults are counted under their kind by ``sim.fault(kind)``; do so for your own kinds. The runner fails a campaign over many
  seeds whose ``faults`` or ``invariants`` were not all exercised.
* ``disk.image()`` / ``disk.restore(image)`` are old copies and clones; ``disk.lose()`` is a replaced disk.
* A ``SimDevice`` of your own payloads gives any other store the same crash semantics (``keep`` is called when durable).
"""

from ha_core.testing.simulator.clock import SimClock as SimClock
from ha_core.testing.simulator.connections import SimConnections as SimConnections
from ha_core.testing.simulator.core import MICROSECOND as MICROSECOND
from ha_core.testing.simulator.core import MILLISECOND as MILLISECOND
from ha_core.testing.simulator.core import SECOND as SECOND
from ha_core.testing.simulator.core import Simulation as Simulation
from ha_core.testing.simulator.core import Timer as Timer
from ha_core.testing.simulator.core import TooManyViolationsError as TooManyViolationsError
from ha_core.testing.simulator.core import TraceField as TraceField
from ha_core.testing.simulator.core import Violation as Violation
from ha_core.testing.simulator.disk import DiskImage as DiskImage
from ha_core.testing.simulator.disk import SimDevice as SimDevice
from ha_core.testing.simulator.disk import SimDisk as SimDisk
from ha_core.testing.simulator.faults import DISK_FAULTS as DISK_FAULTS
from ha_core.testing.simulator.faults import NETWORK_FAULTS as NETWORK_FAULTS
from ha_core.testing.simulator.faults import PACKET_FAULTS as PACKET_FAULTS
from ha_core.testing.simulator.faults import PATH_FAULTS as PATH_FAULTS
from ha_core.testing.simulator.faults import PROCESS_FAULTS as PROCESS_FAULTS
from ha_core.testing.simulator.faults import Chaos as Chaos
from ha_core.testing.simulator.faults import End as End
from ha_core.testing.simulator.faults import Fault as Fault
from ha_core.testing.simulator.faults import disk_faults as disk_faults
from ha_core.testing.simulator.faults import network_faults as network_faults
from ha_core.testing.simulator.faults import process_faults as process_faults
from ha_core.testing.simulator.faults import reset_faults as reset_faults
from ha_core.testing.simulator.host import SimHost as SimHost
from ha_core.testing.simulator.messages import SimMessages as SimMessages
from ha_core.testing.simulator.network import Cut as Cut
from ha_core.testing.simulator.network import Flow as Flow
from ha_core.testing.simulator.network import SimNetwork as SimNetwork
from ha_core.testing.simulator.process import SimProcess as SimProcess
