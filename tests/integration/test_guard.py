"""Real guards, shims and VMs. The witness of every overlap is the VM itself (see guard_world); the profile is the fast one."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ha_core.guard.control import SOCKET_NAME, StartRequest, StopRequest
from ha_core.guard.kernel_timer import probe_pid_namespace
from ha_core.guard.mapping import Field, RunPhase, boot_number, create_run
from ha_core.guard.primaries import write_primaries
from ha_core.guard.processes import Process, boot_id, lock_holder
from ha_core.guard.runs import living_processes
from tests.conftest import skip_without
from tests.integration import hang
from tests.integration.guard_world import GUARD, KEY, LEASE_S, MARGIN_S, WITNESS, World, now_ns, usable_python

pytestmark = pytest.mark.integration

DEAD_WITHIN_MS = 90.0
"""After the deadline; it is about 1 ms on a quiet machine."""


def await_death_at_deadline(world: World, vm: str) -> None:
    """The VM, its whole tree included, dies at the deadline of its mapping, not before."""
    mapping = world.mapping(vm)
    init = world.init(vm)
    early_s = max(0.0, (mapping.get(Field.DEADLINE) - now_ns()) / 1e9 - 0.005)
    assert not init.wait(early_s), "I45 violated: a VM died before its deadline"
    judge_death(world, vm, mapping.get(Field.DEADLINE), init)


def judge_death(world: World, vm: str, deadline_ns: int, init: Process) -> None:
    assert init.wait(2.0), "I43 violated: a VM runs 2 s past its deadline"
    late_ms = (now_ns() - deadline_ns) / 1e6
    init.close()
    assert late_ms >= 0, "I45 violated: a VM died before its deadline"
    assert late_ms < DEAD_WITHIN_MS, f"I43 violated: a VM ran {late_ms:.1f} ms past its deadline"
    assert not world.lock_held(vm), "I43 violated: a process of the VM outlived it"


def stop_tree(world: World, vm: str) -> None:
    mapping = world.mapping(vm)
    children = Path(f"/proc/{mapping.get(Field.INIT_PID)}/task/{mapping.get(Field.INIT_PID)}/children").read_text().split()
    for pid in (mapping.get(Field.SHIM_PID), mapping.get(Field.INIT_PID), *map(int, children)):
        os.kill(pid, signal.SIGSTOP)


@pytest.mark.parametrize("fault", ["none", "guard stopped", "guard killed", "shim stopped", "everything stopped"])
def test_a_vm_dies_at_its_deadline_whatever_became_of_guard_and_shim(fault: str) -> None:
    """H5, I43, I45."""
    with World() as world:
        guard = world.start_guard()
        world.start_vm("a", 1000)
        world.leader.silent = True
        if fault in ("guard stopped", "everything stopped"):
            guard.send_signal(signal.SIGSTOP)
        if fault == "guard killed":
            guard.kill()
        if fault == "shim stopped":
            os.kill(world.mapping("a").get(Field.SHIM_PID), signal.SIGSTOP)
        if fault == "everything stopped":
            stop_tree(world, "a")

        if fault in ("shim stopped", "everything stopped"):
            # A stopped shim dies at the deadline that it armed last.
            mapping, init = world.mapping("a"), world.init("a")
            judge_death(world, "a", mapping.get(Field.ARMED), init)
        else:
            await_death_at_deadline(world, "a")


def test_a_double_forked_child_in_its_own_session_dies_with_its_vm_at_the_deadline() -> None:
    """H27."""
    with World() as world:
        guard = world.start_guard()
        world.start_vm("a", 1000, "daemon")
        world.wait_until(lambda: any(line.startswith("daemon") for line in world.journal("a")))
        world.leader.silent = True
        guard.kill()

        await_death_at_deadline(world, "a")


def test_a_double_forked_child_dies_when_its_vm_ends_by_itself() -> None:
    """H27."""
    with World() as world:
        world.start_guard()
        world.start_vm("a", 1000, "daemon")
        world.wait_until(lambda: any(line.startswith("daemon") for line in world.journal("a")))
        init = world.mapping("a").get(Field.INIT_PID)
        children = Path(f"/proc/{init}/task/{init}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)

        run = world.wait_until(lambda: run if (run := world.run("a")) and run.state == "stopped" else None)
        assert run.exit_code == -9
        assert not world.lock_held("a"), "I42 violated: reported as gone, and a process of the VM lives"


def test_a_renewed_lease_keeps_the_vm_running_far_beyond_its_first_deadline() -> None:
    with World() as world:
        world.start_guard()
        world.start_vm("a", 1000)
        time.sleep(2 * LEASE_S)

        run = world.run("a")
        assert run is not None
        assert (run.state, len(world.starts("a"))) == ("running", 1)


@pytest.mark.parametrize("signo", [signal.SIGKILL, signal.SIGTERM])
def test_a_new_guard_adopts_the_vm_undisturbed_and_hears_of_its_end(signo: signal.Signals) -> None:
    """H3; the exit status arrives across the change of guard."""
    with World(stop_vms=False) as world:
        guard = world.start_guard()
        world.start_vm("a", 1000)
        init = world.init("a")
        guard.send_signal(signo)
        guard.wait()
        world.start_guard()
        lease = world.wait_for_lease().lease_token
        time.sleep(1.5 * LEASE_S)

        assert not init.dead()
        run = world.run("a")
        assert run is not None
        assert (run.state, run.lease, len(world.journal("a"))) == ("running", lease, 1)
        os.kill(init.pid, signal.SIGTERM)
        assert world.wait_until(lambda: run if (run := world.run("a")) and run.state == "stopped" else None).exit_code == -15
        init.close()


def test_a_new_guard_does_not_extend_runs_that_its_grant_does_not_continue() -> None:
    """H29."""
    with World() as world:
        guard = world.start_guard()
        world.start_vm("a", 1000)
        world.leader.continues = False
        guard.kill()
        guard.wait()
        world.start_guard()
        world.wait_for_lease()

        run = world.wait_until(
            lambda: run if (run := world.run("a")) and run.state == "stopped" else None,
            2 * LEASE_S,
            otherwise="I43 violated: a run was extended whose lease the new Grant does not continue",
        )
        assert "revoked" in run.text
        assert not world.lock_held("a")


def test_a_run_that_ended_while_no_guard_was_there_is_reported_with_its_status() -> None:
    with World() as world:
        guard = world.start_guard()
        world.start_vm("a", 1000)
        guard.kill()
        guard.wait()
        os.kill(world.mapping("a").get(Field.INIT_PID), signal.SIGTERM)
        time.sleep(0.05)
        world.start_guard()

        run = world.wait_until(lambda: world.run("a"))
        assert (run.state, run.exit_code) == ("stopped", -15)


def test_a_shim_that_may_yet_start_blocks_every_other_start() -> None:
    """A run file whose lock is held while no init is recorded belongs to a stalled shim."""
    with World() as world:
        mapping, lock = create_run(
            world.run_dir, "a", boot_number(boot_id()), token=1000, lease_token=100, deadline_ns=now_ns() + 10**10,
            shutdown_ns=0, poll_ns=10**8,
        )  # fmt: skip
        world.start_guard()
        lease = world.wait_for_lease().lease_token
        request = StartRequest("a", lease, 1001, ("true",))
        assert world.ask(request).error == "not-reaped"

        fcntl.flock(lock, fcntl.LOCK_UN)
        run = world.wait_until(lambda: run if (run := world.run("a")) and run.state == "failed" else None)
        assert run.token == 1000
        assert not world.ask(request).error
        os.close(lock)
        mapping.close()


def test_a_shim_stopped_by_somebody_is_continued_and_its_vm_undisturbed() -> None:
    with World() as world:
        world.start_guard()
        world.start_vm("a", 1000)
        for _ in range(3):
            os.kill(world.mapping("a").get(Field.SHIM_PID), signal.SIGSTOP)
            time.sleep(LEASE_S)

        run = world.run("a")
        assert run is not None
        assert (run.state, len(world.journal("a"))) == ("running", 1)


def test_one_silent_network_does_not_cost_the_lease() -> None:
    with World(links=2) as world:
        world.start_guard()
        world.start_vm("a", 1000)
        for link in (0, 1):
            world.leader.silent_links = {link}
            time.sleep(1.5 * LEASE_S)

        assert len(world.journal("a")) == 1
        assert world.run("a") is not None
        assert world.lock_held("a")


def test_a_revoked_lease_ends_its_vms_before_their_deadline() -> None:
    with World() as world:
        world.start_guard()
        world.start_vm("a", 1000)
        world.leader.revoked = True

        run = world.wait_until(lambda: run if (run := world.run("a")) and run.state == "stopped" else None)
        assert "revoked" in run.text


def test_a_host_that_joins_another_cluster_gets_its_lease_without_a_new_guard() -> None:
    with World() as world:
        guard = world.start_guard()
        world.start_vm("a", 1000)
        world.ask(StopRequest("a", 1000, 0.0))
        world.wait_until(lambda: (run := world.run("a")) and run.state == "stopped")
        other = bytes(reversed(KEY))

        world.leader.join(other)
        Path(f"{world.dir}/key").unlink()
        Path(f"{world.dir}/key").write_bytes(other)
        world.wait_until(lambda: (status := world.status()) and status.lease_token == world.leader.token == 10)
        run = world.start_vm("a", 20)

        assert (run.token, run.lease) == (20, 10)
        assert guard.poll() is None


def test_disarmed_vms_outlive_a_silent_cluster_and_a_dead_guard_and_are_armed_again() -> None:
    with World() as world:
        guard = world.start_guard()
        world.leader.armed = False
        world.start_vm("a", 1000)
        world.leader.silent = True
        guard.kill()
        guard.wait()
        time.sleep(1.5 * LEASE_S)
        assert world.lock_held("a")

        world.leader.silent, world.leader.armed = False, True
        guard = world.start_guard()
        world.wait_until(lambda: (status := world.status()) and status.lease_token and status.deadline_ns > 0)
        guard.kill()
        await_death_at_deadline(world, "a")


def test_an_expired_lease_gives_a_vm_its_shutdown_time() -> None:
    """Also with the guard dead: the shim asks the VM to end at the lease's deadline and kills it when the time is over."""
    with World() as world:
        guard = world.start_guard()
        world.start_vm("kind", 1000, shutdown_s=1.0)
        world.start_vm("rude", 1001, "ignore-term", shutdown_s=0.4)
        world.leader.silent = True
        guard.kill()
        lease_ends_ns = world.mapping("kind").get(Field.DEADLINE) - 10**9
        kind = world.init("kind")

        assert kind.wait(3.0)
        assert lease_ends_ns <= now_ns() < lease_ends_ns + 0.3e9
        kind.close()
        await_death_at_deadline(world, "rude")


def test_stop_is_orderly_and_ends_by_force_although_the_guard_dies() -> None:
    with World() as world:
        guard = world.start_guard()
        world.start_vm("kind", 1000)
        world.start_vm("rude", 1001, "ignore-term")
        world.ask(StopRequest("kind", 1000, 30.0))
        run = world.wait_until(lambda: run if (run := world.run("kind")) and run.state == "stopped" else None)
        assert run.exit_code == -15

        begun_ns, rude = now_ns(), world.init("rude")
        world.ask(StopRequest("rude", 1001, 0.3))
        guard.kill()
        assert rude.wait(2.0)
        assert 0.3 <= (now_ns() - begun_ns) / 1e9 < 0.3 + DEAD_WITHIN_MS / 1e3
        rude.close()


def test_a_restart_on_the_same_host_never_overlaps_the_run_before() -> None:
    """I42, L7: the new token is refused until init's pidfd says that the old run is gone."""
    with World() as world:
        world.start_guard()
        world.start_vm("a", 1000)
        for token in range(1001, 1006):
            world.ask(StopRequest("a", token - 1, 0.0))
            lease = world.wait_for_lease().lease_token
            argv = (sys.executable, "-I", "-S", "-c", "import sys; exec(sys.argv[1])")
            request = StartRequest("a", lease, token, (*argv, _witness(), f"{world.dir}/a"))
            world.wait_until(lambda request=request: not world.ask(request).error)  # type: ignore[misc]
            world.wait_until(lambda token=token: any(f" {token} " in line for line in world.starts("a")))  # type: ignore[misc]

        assert [line.split()[0] for line in world.journal("a")] == ["start"] * 6, "I42 violated: the witness saw an overlap"


def _witness() -> str:
    return "import sys; sys.argv = ['-c', sys.argv[2]]\n" + WITNESS


def test_a_command_that_cannot_be_run_is_failed_with_the_reason() -> None:
    with World() as world:
        world.start_guard()
        lease = world.wait_for_lease().lease_token
        world.ask(StartRequest("a", lease, 1000, ("/no/such/program",)))
        world.ask(StartRequest("b", lease, 1001, ("true",), {}, "/no/such/place"))

        for vm in ("a", "b"):
            run = world.wait_until(
                lambda vm=vm: run if (run := world.run(vm)) and run.state == "failed" else None  # type: ignore[misc]
            )
            assert "No such file" in run.text


def test_the_witness_sees_an_overlap() -> None:
    """The witness itself is no formality: a second copy outside the guard's rules is seen."""
    with World() as world:
        world.start_guard()
        world.start_vm("a", 1000)
        environment = os.environ | {"HA_CORE_HOST": "h2", "HA_CORE_FENCING_TOKEN": "1001"}
        copy = subprocess.run([sys.executable, "-c", WITNESS, f"{world.dir}/a"], env=environment, check=False)

        assert copy.returncode == 99
        assert world.journal("a")[-1].startswith("overlap h2 1001")


# -- the agents --


@pytest.mark.parametrize(("fault", "within_s"), [("kill", 0.5), ("stop", 0.7), ("hang", 2.0)])
def test_a_dead_stopped_or_hung_agent_is_replaced_in_time_and_no_vm_disturbed(fault: str, within_s: float) -> None:
    with World(agents=("aam", "vpxa")) as world:
        world.start_guard()
        world.start_vm("a", 1000)
        world.wait_until(lambda: world.lives("aam") and world.lives("vpxa"))
        begun = time.monotonic()
        if fault == "hang":
            Path(f"{world.run_dir}/aam.hang").touch()
        else:
            os.kill(world.lives("aam")[0], signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        world.wait_until(lambda: len(world.lives("aam")) == 2)

        assert time.monotonic() - begun < within_s + 0.3
        assert len(world.lives("vpxa")) == 1
        assert len(world.journal("a")) == 1
        assert world.lock_held("a")


def test_a_debugger_that_keeps_a_dead_agent_does_not_keep_the_guard(tmp_path: Path) -> None:
    """The tracer hears of its tracee's end before its parent does; a tracer that stands still keeps the parent's wait waiting."""
    hang.skip_unless_possible()
    path = str(tmp_path / "hang")

    with World(agents=("aam",), prefix=tuple(hang.launcher(path))) as world:
        debugger = world.start_guard()
        world.wait_for_lease()
        guard = world.guard_pid()
        (pid,) = world.wait_until(lambda: world.lives("aam"))
        time.sleep(0.1)  # it has beaten
        hang.ask(path, f"hang {pid}")
        debugger.send_signal(signal.SIGSTOP)
        try:
            world.wait_until(lambda: lock_holder(world.run_dir, "aam") not in (0, pid))
            confirmed = world.wait_for_lease().renewals_confirmed
            world.wait_until(lambda: world.wait_for_lease().renewals_confirmed > confirmed + 5)
            assert world.guard_pid() == guard
            assert "held by a debugger" in world.log()
        finally:
            debugger.send_signal(signal.SIGCONT)
        world.wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_an_agent_that_is_slow_once_is_left_alone() -> None:
    """H19."""
    with World(agents=("aam",)) as world:
        world.start_guard()
        world.wait_until(lambda: world.lives("aam"))
        Path(f"{world.run_dir}/aam.slow").touch()
        time.sleep(1.2)

        assert not Path(f"{world.run_dir}/aam.slow").exists()
        assert len(world.lives("aam")) == 1


def test_a_new_guard_adopts_living_agents() -> None:
    with World(agents=("aam", "vpxa")) as world:
        guard = world.start_guard()
        world.wait_until(lambda: world.lives("aam") and world.lives("vpxa"))
        guard.kill()
        guard.wait()
        world.start_guard()
        status = world.wait_for_lease()
        time.sleep(0.3)

        assert [agent.pid for agent in status.agents] == [*world.lives("aam"), *world.lives("vpxa")]


@pytest.mark.parametrize(("fault", "within_s"), [("kill", 0.5), ("stop", 0.7)])
def test_a_dead_or_stopped_guard_is_replaced_once_and_no_vm_disturbed(fault: str, within_s: float) -> None:
    """H3, H20: both agents see it; one restarts it."""
    with World(agents=("aam", "vpxa"), watchdogs=True) as world:
        first = world.start_guard()
        world.start_vm("a", 1000)
        world.wait_until(lambda: world.lives("aam") and world.lives("vpxa"), 10)
        time.sleep(0.5)
        for _ in range(2):
            old = world.guard_pid()
            begun = time.monotonic()
            os.kill(old, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            world.wait_until(lambda old=old: world.guard_pid() not in (0, old))  # type: ignore[misc]
            restarted_s = time.monotonic() - begun
            world.wait_for_lease()
            assert restarted_s < within_s + 0.3
            time.sleep(0.3)
        first.wait()
        time.sleep(LEASE_S)

        logs = world.log()
        assert logs.count("guard restarted") == 2, f"I45 violated: more than one process restarted the guard\n{logs}"
        assert logs.count(" up, containment") == 3
        assert (len(world.lives("aam")), len(world.lives("vpxa"))) == (1, 1)
        assert len(world.journal("a")) == 1
        assert world.lock_held("a")


def test_while_another_process_restarts_the_guard_nobody_else_does() -> None:
    """H20, with the other restarter held in the middle of it."""
    hold = (
        "import sys, time; from ha_core.guard.processes import open_lock, take_lock;"
        "assert take_lock(open_lock(sys.argv[1], 'guard-restart')); print('held', flush=True); time.sleep(60)"
    )
    with World(agents=("aam", "vpxa"), watchdogs=True) as world:
        first = world.start_guard()
        world.wait_until(lambda: world.lives("aam") and world.lives("vpxa"), 10)
        with subprocess.Popen([sys.executable, "-c", hold, world.run_dir], stdout=subprocess.PIPE) as other:
            try:
                assert other.stdout is not None
                assert other.stdout.readline() == b"held\n"
                first.kill()
                first.wait()
                time.sleep(0.7)
                assert "guard restarted" not in world.log(), "I45 violated: two processes restarted the guard"
                assert world.guard_pid() == 0
            finally:
                other.kill()
        world.wait_until(lambda: world.guard_pid() != 0)
        world.wait_for_lease()


def test_a_hung_guard_is_replaced_once_and_no_vm_disturbed() -> None:
    """It hangs in a system call: opening a FIFO that nobody writes, where its list of primaries should be."""
    with World(agents=("aam", "vpxa"), watchdogs=True) as world:
        world.start_guard()
        world.start_vm("a", 1000)
        world.wait_until(lambda: world.lives("aam") and world.lives("vpxa"), 10)
        time.sleep(0.5)
        old, begun = world.guard_pid(), time.monotonic()
        os.mkfifo(f"{world.run_dir}/fifo")
        os.rename(f"{world.run_dir}/fifo", f"{world.run_dir}/primaries.json")
        time.sleep(0.08)
        write_primaries(world.run_dir, {"aam@leader": world.leader.addresses})
        world.wait_until(lambda: world.guard_pid() not in (0, old))
        assert time.monotonic() - begun < 0.7 + 0.3
        world.wait_for_lease()
        time.sleep(LEASE_S)

        assert world.log().count("guard restarted") == 1, world.log()
        assert (len(world.lives("aam")), len(world.lives("vpxa"))) == (1, 1)
        assert len(world.journal("a")) == 1
        assert world.lock_held("a")


@pytest.mark.parametrize("left", ["aam", "vpxa"])
def test_whoever_is_left_brings_everything_back(left: str) -> None:
    """The guard and one agent are killed together, or the other agent is stopped just then."""
    with World(agents=("aam", "vpxa"), watchdogs=True) as world:
        world.start_guard()
        world.start_vm("a", 1000)
        world.wait_until(lambda: world.lives("aam") and world.lives("vpxa"), 10)
        time.sleep(0.5)
        other = "vpxa" if left == "aam" else "aam"
        os.kill(world.lives(other)[0], signal.SIGSTOP)
        os.kill(world.guard_pid(), signal.SIGKILL)
        world.wait_until(lambda: len(world.lives(other)) == 2, 8)
        world.wait_for_lease()
        time.sleep(LEASE_S)

        assert len(world.lives(left)) == 1
        assert len(world.journal("a")) == 1
        assert world.lock_held("a")


def test_with_every_agent_killed_vms_end_at_their_deadline_and_not_before() -> None:
    """H5."""
    with World(agents=("aam", "vpxa")) as world:
        guard = world.start_guard()
        world.start_vm("a", 1000)
        world.wait_until(lambda: world.lives("aam") and world.lives("vpxa"))
        guard.kill()
        for name in ("aam", "vpxa"):
            os.kill(world.lives(name)[0], signal.SIGKILL)

        await_death_at_deadline(world, "a")


# -- the end, and faulty starts --


def test_sigterm_ends_vms_and_agents_in_order() -> None:
    with World(agents=("aam",)) as world:
        guard = world.start_guard()
        world.start_vm("a", 1000, shutdown_s=5.0)
        world.wait_until(lambda: world.lives("aam"))
        guard.terminate()

        assert guard.wait(4) == 0
        assert not world.lock_held("a")
        assert world.mapping("a").get(Field.STATE) == RunPhase.EXITED
        assert not Path(f"/proc/{world.lives('aam')[0]}").exists()


def test_a_second_guard_refuses_to_run_beside_the_first() -> None:
    with World() as world:
        first = world.start_guard()
        world.wait_for_lease()
        second = world.start_guard()

        assert second.wait(5) == 75
        assert "another guard" in Path(f"{world.dir}/guard.log").read_text()
        assert first.poll() is None
        assert world.status() is not None


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ("{", "not valid JSON"),
        ('{"hots": "h1"}', "hots: unknown key"),
        ('{"host": "h1"}', "cluster: missing"),
        ('{"host": 7}', "host: expected"),
    ],
)
def test_wrong_settings_are_named_in_one_line(settings: str, text: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-I", "-S", GUARD, "--config-json", settings], capture_output=True, text=True, check=False
    )

    assert ended.returncode == 2
    assert text in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_bad_clients_cost_nothing_but_their_connection() -> None:
    with World() as world:
        world.start_guard()
        world.start_vm("a", 1000)
        path = f"{world.run_dir}/{SOCKET_NAME}"
        clients = []
        for _ in range(100):
            client = socket.socket(socket.AF_UNIX)
            client.connect(path)
            clients.append(client)
        assert clients[-1].recv(10) == b""
        clients[0].settimeout(2)
        clients[0].sendall(b"garbage\n")
        assert b"bad-request" in clients[0].recv(1000)
        for client in clients:
            client.close()
        with socket.socket(socket.AF_UNIX) as endless:
            world.wait_until(world.status)
            endless.connect(path)
            endless.settimeout(2)
            with pytest.raises(OSError):
                for _ in range(1000):
                    endless.sendall(b"x" * 65_536)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as beats:
            for _ in range(5):
                beats.sendto(b"nonsense", f"{world.run_dir}/guard.beat")

        assert world.wait_until(world.status).lease_token
        assert len(world.journal("a")) == 1


def test_systemd_is_told_when_the_guard_is_ready_and_that_it_lives() -> None:
    with World() as world, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"{world.dir}/notify")
        systemd.settimeout(3)
        guard = world.start_guard(NOTIFY_SOCKET=f"{world.dir}/notify")

        assert systemd.recv(100).decode() == f"READY=1\nMAINPID={guard.pid}"
        assert systemd.recv(100) == b"WATCHDOG=1"


def test_nothing_of_the_guard_leaks_into_a_vm() -> None:
    """No descriptor but its own three, no blocked or ignored signal, and the limits that the guard was started with."""
    with World() as world:
        world.start_guard()
        lease = world.wait_for_lease().lease_token
        script = (
            "ls -l /proc/self/fd; grep -E 'Sig(Blk|Ign|Cgt)' /proc/self/status; "
            "nice; cat /proc/self/oom_score_adj; ulimit -Sn; echo end; sleep 60"
        )
        world.ask(StartRequest("a", lease, 1000, ("sh", "-c", script)))
        log = Path(f"{world.dir}/log/vm-a.log")
        text = world.wait_until(lambda: text if log.exists() and (text := log.read_text()).endswith("end\n") else None)
        lines = text.splitlines()[:-1]

        targets = [line.split(" -> ")[1] for line in lines if " -> " in line]
        assert sorted(target for target in targets if "/proc/" not in target) == sorted(["/dev/null", str(log), str(log)])
        assert [line.split()[1] for line in lines if line.startswith(("SigBlk", "SigIgn"))] == ["0" * 16] * 2
        assert lines[-3:-1] == [str(os.getpriority(os.PRIO_PROCESS, 0)), Path("/proc/self/oom_score_adj").read_text().strip()]
        assert int(lines[-1]) == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_every_process_of_a_host_is_found_for_a_power_cut() -> None:
    with World(agents=("aam", "vpxa")) as world:
        world.start_guard()
        world.start_vm("a", 1000, "daemon")
        world.wait_until(lambda: world.lives("aam") and world.lives("vpxa"))
        found = living_processes(world.run_dir)
        assert len(found) == 5
        for process in found:
            process.send(signal.SIGKILL)
        for process in found:
            assert process.wait(2)
            process.close()

        assert not world.lock_held("a")


# -- containment --


def test_without_namespaces_the_tree_dies_at_the_deadline_and_that_is_said() -> None:
    with World(containment="subreaper") as world:
        guard = world.start_guard()
        world.start_vm("a", 1000)
        status = world.status()
        assert status is not None
        assert status.containment == "subreaper"
        world.leader.silent = True
        guard.kill()

        await_death_at_deadline(world, "a")


def test_without_namespaces_a_daemonising_command_is_refused() -> None:
    with World(containment="subreaper") as world:
        world.start_guard()
        world.start_vm("a", 1000, "daemon")

        run = world.wait_until(lambda: run if (run := world.run("a")) and run.state == "stopped" else None)
        assert "namespace" in run.text
        assert not world.lock_held("a")


@pytest.mark.parametrize("how", ["revoked", "deadline", "stopped", "shim killed", "init stopped"])
def test_without_namespaces_a_vms_children_end_with_it_while_the_guard_lives(how: str) -> None:
    """I43: init is what knows them, so it must not be killed before it has ended them."""
    with World(containment="subreaper") as world:
        world.start_guard()
        world.start_vm("a", 1000, "child")
        time.sleep(0.05)
        match how:
            case "revoked":
                world.leader.revoked = True
            case "deadline":
                world.leader.silent = True
            case "stopped":
                world.ask(StopRequest("a", 1000, 0.0))
            case _:
                mapping = world.mapping("a")
                if how == "init stopped":
                    os.kill(mapping.get(Field.INIT_PID), signal.SIGSTOP)
                os.kill(mapping.get(Field.SHIM_PID), signal.SIGKILL)

        world.wait_until(lambda: run if (run := world.run("a")) and run.state == "stopped" else None)
        time.sleep(0.05)
        assert not world.lock_held("a"), "I43: a child of the VM outlives it"


@pytest.mark.parametrize("how", ["nobody", "user namespace"])
def test_an_unprivileged_guard_contains_its_vms_as_well(how: str) -> None:
    """As another user (the namespace is made with a user namespace), and as root of a user namespace only."""
    if not probe_pid_namespace():
        skip_without("pidns", "PID namespaces are not allowed here")
    if how == "nobody" and os.geteuid() != 0:
        skip_without("root", "only root can become another user")
    for tool in ("setpriv", "unshare"):
        if shutil.which(tool) is None:
            skip_without("pidns", f"there is no {tool} command (util-linux)")
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    prefix: tuple[str, ...] = nobody if how == "nobody" else ("unshare", "-Urm")
    python = usable_python(prefix)
    if python is None:
        skip_without("pidns", f"no Python 3.11 can read this checkout under {' '.join(prefix)}, or that is not allowed here")
    with World(prefix=prefix, python=python) as world:
        if how == "nobody":
            subprocess.run(["chown", "-R", "65534:65534", world.dir], check=True)
        guard = world.start_guard()
        world.start_vm("a", 1000, "daemon")
        status = world.status()
        assert status is not None
        assert status.containment == "pid-namespace"
        world.leader.silent = True
        guard.kill()

        await_death_at_deadline(world, "a")


def test_the_margin_leaves_time_for_the_kill() -> None:
    """What the other tests allow for the kill must fit into the margin of the profile they use."""
    assert DEAD_WITHIN_MS / 1e3 < MARGIN_S
