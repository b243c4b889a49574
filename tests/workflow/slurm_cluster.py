"""A Slurm cluster of one node with two GPUs, made of Debian's daemons, a folder, and files in the GPUs' place.

It lives in a mount namespace of its own, since a job's steps read /etc/slurm/slurm.conf whatever SLURM_CONF says: the
machine's own Slurm, if it has one, is neither changed nor used.
"""

import contextlib
import math
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "unshare", "nsenter")
# The shipped profile asks for what a GPU node has; nothing here is measured against the real machine.
SLURM_CONF = """
ClusterName=fourfold
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
Prolog={folder}/record
Epilog={folder}/record
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=400000 Gres=gpu:2
PartitionName=cpu Nodes={host} Default=YES MaxTime=INFINITE
PartitionName=gpu Nodes={host} MaxTime=INFINITE
"""
RECORD = """#!/bin/sh
echo "$(date +%s.%N) $SLURM_SCRIPT_CONTEXT $SLURM_JOB_ID $SLURM_JOB_GPUS" >>{folder}/allocations
"""


@dataclass
class Job:
    """What Slurm's controller keeps of a job."""

    number: int
    comment: str
    partition: str
    state: str
    memory: int
    """MB"""

    gpus: int

    @property
    def rule(self) -> str:
        """The rule that the job runs, from the comment that Snakemake's plugin writes."""
        return re.sub(r"_wildcards_.*", "", self.comment.removeprefix("rule_"))


@dataclass
class Allocation:
    """What the node had for a job, and when: times in seconds since 1970, GPUs by their index."""

    number: int
    begin: float
    end: float
    gpus: list[str]


@dataclass
class Cluster:
    """A running cluster."""

    folder: Path
    host: str
    namespace: list[str]
    """Command that starts another one inside the cluster's namespace."""

    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def call(self, *command: str) -> str:
        """Runs one of Slurm's commands; returns what it prints."""
        done = subprocess.run([*self.namespace, *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def jobs(self) -> list[Job]:
        """All jobs that the controller remembers."""
        lines = self.call("scontrol", "--oneliner", "show", "jobs").splitlines()
        return [parse_job(line) for line in lines if line.startswith("JobId=")]

    def allocations(self) -> list[Allocation]:
        """What the node wrote down when each job that it ran began and ended."""
        running: dict[str, Allocation] = {}
        ended = []
        for line in (self.folder / "allocations").read_text().splitlines():
            at, context, number, gpus = line.split(" ")
            if context == "prolog_slurmd":
                running[number] = Allocation(int(number), float(at), math.inf, gpus.split(",") if gpus else [])
            else:
                running[number].end = float(at)
                ended.append(running.pop(number))
        return [*ended, *running.values()]

    def start(self, *command: str) -> None:
        """Starts a daemon that stays in the foreground."""
        with (self.folder / f"{command[0]}.output").open("wb") as output:
            self.daemons.append(
                subprocess.Popen(
                    [*self.namespace, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                )
            )

    def stop(self) -> None:
        """Ends jobs and daemons."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.call("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def parse_job(line: str) -> Job:
    """Reads a line of `scontrol --oneliner show jobs`."""
    facts = dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", line))
    gpus = re.search(r"TresPerJob=gres:gpu:(\d+)", line)
    asked = re.search(r"\bmem=([\d.]+)([MG])", line)
    return Job(
        number=int(facts["JobId"]),
        comment=facts.get("Comment", ""),
        partition=facts["Partition"],
        state=facts["JobState"],
        memory=round(float(asked[1]) * {"M": 1, "G": 1024}[asked[2]]) if asked else 0,
        gpus=int(gpus[1]) if gpus else 0,
    )


def why_not() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.getuid() != 0:
        return "only root may mount and start Slurm's daemons"
    missing = [program for program in PROGRAMS if shutil.which(program, path=search_path()) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    return f"no mount namespace: {tried.stderr.strip()}" if tried.returncode else None


def search_path() -> str:
    """Where programs are looked for; daemons lie where only root looks."""
    return os.pathsep.join([*os.get_exec_path(), "/usr/sbin", "/sbin"])


@contextlib.contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """Starts a cluster, and ends it with all of its jobs."""
    # Not a folder of pytest's: the path of a socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    host = socket.gethostname().partition(".")[0]
    write_config(folder, host)
    mounts = f"""
        mount --bind {folder}/etc /etc/slurm &&
        for gpu in {folder}/nvidia?; do mount --bind /dev/null $gpu || exit; done &&
        echo ready && exec sleep infinity"""
    os.makedirs("/etc/slurm", exist_ok=True)
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", mounts], stdout=subprocess.PIPE) as keeper:
        try:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == b"ready\n"
            cluster = Cluster(folder, host, ["nsenter", f"--target={keeper.pid}", "--mount", "--wd=.", "--"])
            try:
                start_daemons(cluster)
                yield cluster
            finally:
                cluster.stop()
        finally:
            keeper.kill()
    shutil.rmtree(folder)


def write_config(folder: Path, host: str) -> None:
    """The files that the daemons read."""
    for name in ("etc", "state", "spool"):
        (folder / name).mkdir()
    controller_port, node_port = free_ports(2)
    facts = {"host": host, "folder": folder, "controller_port": controller_port, "node_port": node_port}
    (folder / "etc" / "slurm.conf").write_text(SLURM_CONF.format(**facts))
    gpus = [folder / f"nvidia{i}" for i in range(2)]
    for gpu in gpus:
        gpu.touch()
    lines = [f"Name=gpu File={gpu} Flags=nvidia_gpu_env\n" for gpu in gpus]
    (folder / "etc" / "gres.conf").write_text("".join(lines))
    (folder / "record").write_text(RECORD.format(folder=folder))
    (folder / "record").chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)


def free_ports(count: int) -> Sequence[int]:
    """Ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start_daemons(cluster: Cluster) -> None:
    """Starts munge, controller and node, and waits until the node is ready for jobs."""
    folder = cluster.folder
    files = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munge.log", "pid-file": "munge.pid"}
    options = [f"--{name}={folder / file}" for name, file in {**files, "seed-file": "munge.seed"}.items()]
    cluster.start("munged", "--foreground", "--force", *options)
    wait_for(lambda: (folder / "munge.socket").exists(), cluster)
    cluster.start("slurmctld", "-D")
    cluster.start("slurmd", "-D")

    def ready() -> bool:
        states = subprocess.run([*cluster.namespace, "sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
        return set(states.stdout.split()) == {"idle"}

    wait_for(ready, cluster)


def wait_for(condition: Callable[[], bool], cluster: Cluster, seconds: float = 30) -> None:
    """Waits until a condition holds; fails with the end of the daemons' logs when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in cluster.daemons):
            logs = sorted(cluster.folder.glob("*.log")) + sorted(cluster.folder.glob("*.output"))
            raise AssertionError("\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in logs))
        time.sleep(0.1)
