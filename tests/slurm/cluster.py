"""A real Slurm on this machine: munged, slurmctld and two slurmd (nodes n1 and n2), in one temporary folder.

    with Cluster(folder) as cluster:
        job = cluster.output("sbatch", "--parsable", "job.sbatch")

Two slurmd on one host are two nodes when their names differ (`slurmd -N n1`) and each has a port and folders of its
own. Everything listens on free ports and on the loopback interface; job ids begin anywhere, since a run's port is made
from its job's. The daemons are children of this process, asked to end when the context is left and killed if they do
not, however the body ended.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from time_limit import LIMIT_SECONDS

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("n1", "n2")
# Seconds. CRED_EXPIRE is also what a requeued job waits before it may start again (slurm.conf(5), AuthInfo).
CRED_EXPIRE, KILL_WAIT = 5, 20
DEVICES = ("null", "zero", "full", "random")
MOST_CRASHES = 2  # of a slurmd; Debian's 22.05 was seen to

CONFIGURATION = """\
ClusterName=test
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={cred_expire}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
KillWait={kill_wait}
InactiveLimit=0
MinJobAge=600
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=4096 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4 RealMemory=4096 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


def missing() -> str:
    """Why a Slurm cannot be started here; empty if it can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if absent:
        return f"no Slurm here ({', '.join(absent)} not found): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "a Slurm of one's own needs root"


class Cluster:
    """Starts with the context and ends with it; `log` tells what the daemons said.

    `gpus`: of a node, at most four, by name only.
    """

    def __init__(self, folder: Path, gpus: int = 0) -> None:
        self.folder, self.gpus = folder, gpus
        self.environment = os.environ | {"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._crashes = 0

    def __enter__(self) -> "Cluster":
        with ExitStack() as undo:
            undo.callback(self._stop)
            self._start_munge()
            self._start_slurm()
            undo.pop_all()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            subprocess.run(
                ["scancel", "--user=root"],
                env=self.environment, capture_output=True, timeout=LIMIT_SECONDS, check=False,
            )  # fmt: skip
            self._wait(lambda: not self.output("squeue", "--noheader"), KILL_WAIT + 15, required=False)
        finally:
            self._stop()

    def output(self, *command: str) -> str:
        """Standard output of a Slurm command. Raises AssertionError with its error output."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`; of an array, those of the task that is named (JOB_TASK)."""
        words = self.output("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def await_end(self, job: str, seconds: float) -> dict[str, str]:
        """The job's fields when it has ended for good. Raises AssertionError after `seconds`."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self._wait(lambda: self.job(job)["JobState"] in ended, seconds, what=f"job {job}")
        return self.job(job)

    def log(self) -> str:
        """The last lines of every daemon's log."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-15:]) for log in logs)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(parents=True)
        # munged refuses a socket in a folder that others cannot reach, and a key that others can read.
        for parent in (folder, *folder.parents):
            if parent.stat().st_mode & 0o001 == 0 and parent.stat().st_uid == os.geteuid():
                parent.chmod(parent.stat().st_mode | 0o011)
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = ("socket", "pid-file", "log-file", "seed-file")
        options = [f"--{name}={folder / name.removesuffix('-file')}" for name in files]
        self._spawn("munged", "--foreground", "--force", f"--key-file={key}", *options)
        self._wait((folder / "socket").exists, LIMIT_SECONDS, what="munged")

    def _start_slurm(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        controller, first, second = free_ports(3)
        text = CONFIGURATION.format(
            host=socket.gethostname(), folder=self.folder, cred_expire=CRED_EXPIRE, kill_wait=KILL_WAIT,
            controller=controller, first=first, second=second, first_job=random.randrange(1, 100_000),
        )  # fmt: skip
        if self.gpus:
            text = f"GresTypes=gpu\n{text.replace('State=UNKNOWN', f'State=UNKNOWN Gres=gpu:h100:{self.gpus}')}"
            # Each has a device file, and these are there on every machine.
            lines = [f"NodeName=n[1-2] Name=gpu Type=h100 File=/dev/{name}" for name in DEVICES[: self.gpus]]
            (self.folder / "gres.conf").write_text("\n".join(["AutoDetect=off", *lines, ""]))
        (self.folder / "slurm.conf").write_text(text)
        self._spawn("slurmctld", "-D")
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node)
        self._wait(lambda: self._idle_nodes() == len(NODES), LIMIT_SECONDS, what="two idle nodes")

    def _idle_nodes(self) -> int:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"],
            env=self.environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
        )  # fmt: skip
        return done.stdout.split().count("idle")

    def _spawn(self, *command: str) -> None:
        name = self.folder / f"{command[0]}-{len(self._daemons)}-{self._crashes}.log"
        with name.open("wb") as output:
            process = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )
        self._daemons.append(process)

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def _see_to_daemons(self) -> None:
        """Starts a slurmd that crashed again, as a site's service manager would; anything else that ended is fatal."""
        for daemon in [daemon for daemon in self._daemons if daemon.poll() is not None]:
            command = tuple(map(str, daemon.args)) if isinstance(daemon.args, tuple) else ()
            self._crashes += 1
            crashed = command[:1] == ("slurmd",) and daemon.returncode == -signal.SIGSEGV
            assert crashed, f"{command} ended with {daemon.returncode}\n{self.log()}"
            assert self._crashes <= MOST_CRASHES, f"{command} keeps crashing\n{self.log()}"
            warnings.warn(f"{' '.join(command)} crashed and was started again", stacklevel=1)
            self._daemons.remove(daemon)
            self._spawn(*command)

    def _wait(self, condition: object, seconds: float, *, what: str = "", required: bool = True) -> None:
        assert callable(condition)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return
            self._see_to_daemons()
            time.sleep(0.2)
        assert not required, f"{what}: not after {seconds} s\n{self.log()}"


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _path() -> str:
    """PATH with the folders of daemons, which users other than root may lack."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
