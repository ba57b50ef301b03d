r"""Start a Slurm of two nodes on this machine, run a command in it, stop it again.

Every "node" is a daemon of its own at the loopback addresses 127.0.0.1, 127.0.0.2, …; all state
lies in a temporary folder that goes away in the end. It is a real Slurm, without accounting:
`sacct` fails. The command's environment names it in SLURM_CONF.
Needs root on Debian or Ubuntu; `--install` installs the packages slurm-wlm and munge.

  sudo -E uv run python tools/throwaway_slurm.py --install -- uv run train +deploy=submitit \
      +experiment=tiny/pretrain/pretrain-tiny-e2e hydra.launcher.nodes=2

Exit codes: the command's, or 3 where Slurm cannot start
"""

import argparse
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
NO_SLURM = 3
START_SECONDS = 60.0
CONFIG = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again may not start while its old credential holds, 120 s by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=1
ReturnToService=2
KillWait=10
# As at many sites: a task that fails ends the others.
KillOnBadExit=1
# A node with fewer CPUs than configured would be drained.
SlurmdParameters=config_overrides
FirstJobId={first_job}
"""


class NoSlurmError(Exception):
    """Slurm cannot start here, for the reason in the message."""


def install() -> None:
    """Install what is missing; raises NoSlurmError where that fails."""
    if not _missing():
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise NoSlurmError("installing Slurm needs root and apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update"],
        ["apt-get", "install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"],
    ):
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode:
            last = (ran.stderr.strip() or ran.stdout.strip()).splitlines()[-1:]
            raise NoSlurmError(f"{' '.join(command)} failed: {' '.join(last)}")


def why_not() -> str:
    """What keeps a Slurm from being started here; empty: nothing."""
    if os.geteuid() != 0:
        return "a throw-away Slurm needs root, for its daemons"
    if missing := _missing():
        return f"no {', '.join(missing)} (apt-get install slurm-wlm munge, or --install)"
    return ""


@contextmanager
def cluster(*, nodes: int = 2, cpus: int = 1) -> Generator[dict[str, str]]:
    """A running Slurm with its files in a temporary folder; yields the environment for commands.

    nodes, cpus: how many nodes, and CPUs of each; more than the machine has are pretended.

    Raises NoSlurmError, with the end of the logs, if it does not start. In the end all jobs are
    cancelled and all daemons gone.
    """
    if why := why_not():
        raise NoSlurmError(why)
    daemons: list[subprocess.Popen[bytes]] = []
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged wants its socket in everybody's reach
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    # Names that every resolver turns into an address: JAX's first process waits at the first one.
    names = [f"127.0.0.{number}" for number in range(1, nodes + 1)]
    try:
        _configure(folder, names, cpus)
        for command in (
            _munged(folder),
            ["slurmctld", "-D"],
            *(["slurmd", "-D", "-N", name] for name in names),
        ):
            with (folder / "daemons.log").open("ab") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if len(daemons) == 1:  # the others need it at once
                _wait(folder, daemons, lambda: (folder / "munge" / "socket").exists())
        _wait(folder, daemons, lambda: _idle(environment) == nodes)
        yield environment
    finally:
        _stop(daemons, environment)
        shutil.rmtree(folder, ignore_errors=True)


def _missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


def _configure(folder: Path, names: list[str], cpus: int) -> None:
    for name in ("munge", "state", *(f"spool-{name}" for name in names)):
        (folder / name).mkdir(parents=True)
    ports = _free_ports(1 + len(names))
    text = CONFIG.format(
        host=socket.gethostname().split(".")[0],
        folder=folder,
        control_port=ports[0],
        # JAX makes its port of a job's number, and two of these clusters may run at once.
        first_job=random.randrange(1, 60_000),
    )
    for name, port in zip(names, ports[1:], strict=True):
        text += (
            f"NodeName={name} NodeAddr={name} NodeHostname={socket.gethostname().split('.')[0]} "
            f"Port={port} CPUs={cpus}\n"
        )
    text += f"PartitionName=all Nodes={','.join(names)} Default=YES MaxTime=INFINITE State=UP\n"
    (folder / "slurm.conf").write_text(text)


def _munged(folder: Path) -> list[str]:
    """The command of an authentication daemon with a key of its own."""
    place = folder / "munge"
    (place / "key").write_bytes(os.urandom(128))
    (place / "key").chmod(0o400)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
    files["seed-file"] = "seed"
    options = [f"--{option}={place}/{name}" for option, name in files.items()]
    return ["munged", "--foreground", *options]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _idle(environment: dict[str, str]) -> int:
    """How many nodes wait for work."""
    command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    return len(ran.stdout.split())


def _wait(folder: Path, daemons: list[subprocess.Popen[bytes]], ready: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not ready():
        dead = [daemon.args for daemon in daemons if daemon.poll() is not None]
        if dead or time.monotonic() - began > START_SECONDS:
            logs = [*folder.glob("*.log"), folder / "munge" / "log"]
            tails = [f"{p.name}: {p.read_text()[-1000:]}" for p in logs if p.exists()]
            why = f"ended: {dead}" if dead else f"nothing after {START_SECONDS:.0f} s"
            raise NoSlurmError(f"Slurm does not start ({why})\n" + "\n".join(tails))
        time.sleep(0.2)


def _stop(daemons: list[subprocess.Popen[bytes]], environment: dict[str, str]) -> None:
    """Cancel every job, wait until its processes are gone, end the daemons, authentication last."""
    if len(daemons) > 1 and all(daemon.poll() is None for daemon in daemons):
        jobs = ["squeue", "--noheader", "--format=%A"]
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            left = subprocess.run(jobs, env=environment, capture_output=True, text=True)
            if left.returncode or not (numbers := set(left.stdout.split())):
                break
            cancel = ["scancel", "--quiet", *numbers]
            subprocess.run(cancel, env=environment, capture_output=True)
            time.sleep(0.5)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def main() -> int:
    """Run and return the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--install", action="store_true", help="install Slurm if it is missing")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="of each node")
    parser.add_argument("command", nargs="+", help="what to run, behind a --")
    options = parser.parse_args()
    try:
        if options.install:
            install()
        with cluster(nodes=options.nodes, cpus=options.cpus) as environment:
            return subprocess.run(options.command, env=environment).returncode
    except NoSlurmError as error:
        print(f"no Slurm: {error}", file=sys.stderr)
        return NO_SLURM


if __name__ == "__main__":
    sys.exit(main())
