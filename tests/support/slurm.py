"""A Slurm cluster of this machine alone: a controller and a slurmd for each node, with munge, in a folder of its own.

The nodes share the machine's cores and address and differ in name and port. Everything that was started ends with the cluster, by its process id.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel")
# Cores and GPUs are declared, not there: as many as the batch files ask for, so that Slurm can judge them as they are.
# PMIx keeps its files in TmpFS: nodes that share a folder would take each other's. A job that is put back into the queue waits until the credential
# of its first start has expired, by default two minutes.
CONF = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MpiDefault=pmix
JobRequeue=1
MinJobAge=3600
SlurmdParameters=config_overrides
TmpFS={folder}/tmp-%n
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{last}] CPUs=32 RealMemory=2000 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing():
    """Why there can be no cluster here; empty if there can."""
    absent = [program for program in PROGRAMS if find(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd must be started by root"


def find(program):
    """The path of a program, in the folders of the administrator too."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
    """A context manager; `environ` is what the client commands need."""

    def __init__(self, folder, nodes=2):
        self.folder, self.nodes = Path(folder), nodes
        self.environ = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.processes = {}

    def __enter__(self):
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o755)
        for name in ("state", *(f"tmp-n{i + 1}" for i in range(self.nodes))):
            (self.folder / name).mkdir()
        ports = free_ports(1 + self.nodes)
        values = {
            "host": socket.gethostname(),
            "user": "root",
            "folder": self.folder,
            "ports": ports,
            "last": ports[-1],
            "nodes": self.nodes,
        }
        (self.folder / "slurm.conf").write_text(CONF.format(**values))
        for number in range(4):
            (self.folder / f"gpu{number}").touch()  # what Slurm takes for a device
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D")
            for node in range(1, self.nodes + 1):
                self.start_node(f"n{node}")
            self.wait_until(lambda: self.states() == {"idle": self.nodes}, 60, "the nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        with contextlib.suppress(Exception):
            self.run("scancel", "--state=RUNNING", "--state=PENDING", timeout=20)
            self.wait_until(lambda: not self.run("squeue", "-h").stdout, 30, "no job is left")
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            if process.poll() is None:
                process.kill()
                process.wait()

    def _start_munge(self):
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        places = [
            f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "log", "pid", "seed")
        ]
        socket_file = self.folder / "munge.socket"
        self._start(
            "munged", "munged", "--foreground", "--force", f"--socket={socket_file}", *places
        )
        self.wait_until(socket_file.exists, 20, "munge answers")

    def _start(self, name, program, *arguments):
        with (self.folder / f"{name}.output").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [find(program), *arguments],
                env=self.environ,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )

    def start_node(self, name):
        """Start the slurmd of a node."""
        self._start(name, "slurmd", "-D", "-N", name)

    def lose_node(self, name):
        """Kill a node as a power cut does: its slurmd and all that this has started."""
        for pid in [self.processes[name].pid, *self.steps_of(name)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.processes.pop(name).wait()

    def steps_of(self, name):
        """Process ids of the step managers of a node and of all below them, children last."""
        children, managers = {}, []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, IndexError):
                pid = int(status.parent.name)
                parent = int(status.read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(pid)
                environ = (status.parent / "environ").read_bytes()
                command = (status.parent / "cmdline").read_bytes()
                if b"slurmstepd" in command and f"SLURM_CONF={self.folder}".encode() in environ:
                    managers.append((pid, command))
        found = [pid for pid, command in managers if self._node_of(pid) == name]
        for pid in found:
            found.extend(children.get(pid, []))
        return found

    def _node_of(self, manager):
        """The node of a step manager: the one whose spool folder or temporary folder it has open."""
        for descriptor in Path(f"/proc/{manager}/fd").glob("*"):
            with contextlib.suppress(OSError):
                target = os.readlink(descriptor)
                for node in range(1, self.nodes + 1):
                    if target.startswith(
                        (f"{self.folder}/spool-n{node}", f"{self.folder}/slurmd-n{node}")
                    ):
                        return f"n{node}"
        return None

    def run(self, *command, timeout=300, **environ):
        """Run a client command to its end."""
        return subprocess.run(
            [find(command[0]), *map(str, command[1:])],
            env={**self.environ, **environ},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def states(self):
        """Number of nodes in each state."""
        counts = {}
        for line in self.run("sinfo", "-h", "-N", "-o", "%t").stdout.split():
            counts[line] = counts.get(line, 0) + 1
        return counts

    def submit(self, *arguments):
        """The number of a batch job that was submitted."""
        done = self.run("sbatch", "--parsable", *arguments)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def job(self, number):
        """What the controller knows of a job."""
        text = self.run("scontrol", "show", "job", number, "-o").stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for_job(self, number, seconds=300):
        """Wait for the end of a job; returns what the controller knows of it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait_until(
            lambda: self.job(number)["JobState"] in ended, seconds, f"job {number} ended"
        )
        return self.job(number)

    def wait_until(self, condition, seconds, what):
        """Wait for a condition; AssertionError with the daemons' last words if it does not come."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.output")])
                words = "\n".join(f"{log.name}: {log.read_text()[-800:]}" for log in logs)
                raise AssertionError(f"not within {seconds} s: {what}\n{words}")
            time.sleep(0.2)


def free_ports(count):
    """Consecutive ports of which none is in use."""
    for first in range(17001, 30000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("", port))
            except OSError:
                continue
            return list(range(first, first + count))
    raise OSError("no free ports")
