"""Several hosts on this machine: namespaces with a name, an address, a core and an ssh server each.

They share files, but not /run and /dev/shm. Nothing reaches the machine's own network: even the
switch that joins them is in a namespace, so that two sets of hosts do not meet either.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

PROGRAMS = ("ip", "tc", "unshare", "nsenter", "taskset", "ssh", "ssh-keygen", "sshd")
PACKAGES = "iproute2 util-linux openssh-client openssh-server"
SSHD_SECONDS = 30.0
# The programs of the administrator too, which another user's PATH may leave out
PATH = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
OWN_NAMESPACES = ["--net", "--uts", "--ipc", "--mount"]
SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
"""
SSH_CONFIG = """\
IdentityFile {folder}/user_key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
BatchMode yes
ConnectTimeout 10
ServerAliveInterval 5
"""
# What a host's namespaces need the permission for
TRIAL = """\
ip link add one type veth peer name two
ip link add three type bridge
ip link set one up
tc qdisc replace dev one root tbf rate 10mbit burst 16kb latency 1s
hostname trial
mount -t tmpfs tmpfs /run
mount --bind /etc/hosts /etc/ssh/ssh_config
"""


def find(program):
    """The path of a program."""
    return shutil.which(program, path=PATH)


def missing():
    """Why there can be no hosts here; empty if there can."""
    absent = [program for program in PROGRAMS if find(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: {PACKAGES})"
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    command = [find("unshare"), *OWN_NAMESPACES, "sh", "-ec", TRIAL]
    tried = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PATH": PATH}
    )
    return f"no hosts in namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def die_with_parent():
    """In a child: be killed when this program is (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def checked(command):
    """The output of a command; AssertionError if it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


class Holder:
    """A process that keeps new namespaces alive; `script` runs in them first."""

    def __init__(self, namespaces, script):
        self.process = subprocess.Popen(
            [
                find("unshare"),
                *namespaces,
                "sh",
                "-ec",
                f"{script}\necho ready; exec sleep infinity",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PATH": PATH},
            preexec_fn=die_with_parent,
        )
        self.pid = self.process.pid

    def wait_until_ready(self):
        """AssertionError if the script fails."""
        if self.process.stdout.readline() != "ready\n":
            raise AssertionError(self.process.communicate()[1])

    def entered(self, namespaces, *command):
        """The command line that runs a command in the namespaces."""
        return [find("nsenter"), "-t", str(self.pid), *namespaces, *map(str, command)]

    def processes(self):
        """Process ids of all in the network namespace but this holder."""
        network = os.readlink(f"/proc/{self.pid}/ns/net")
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if os.readlink(place / "ns/net") == network and int(place.name) != self.pid:
                    found.append(int(place.name))
        return found

    def end(self):
        """Kill all in the namespaces, also what is started meanwhile."""
        # A holder that ended before it had namespaces is still in those of this program
        if self.process.poll() is None and (
            os.readlink(f"/proc/{self.pid}/ns/net") != os.readlink("/proc/self/ns/net")
        ):
            deadline = time.monotonic() + 5
            while (pids := self.processes()) and time.monotonic() < deadline:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)
        self.process.kill()
        self.process.communicate()


class Host:
    """One of them."""

    def __init__(self, hosts, name, number, core):
        self.hosts, self.name, self.address, self.core = hosts, name, f"10.77.0.{number}", core
        script = [
            f"hostname {name}",
            f"mount --bind {hosts.folder}/hosts /etc/hosts",
            f"mount --bind {hosts.folder}/ssh_config /etc/ssh/ssh_config",
            "mount -t tmpfs tmpfs /dev/shm",
            "mount -t tmpfs tmpfs /run",
            "mkdir /run/sshd",  # where sshd gives up its rights
        ]
        self.holder = Holder(OWN_NAMESPACES, "\n".join(script))
        self.sshd = None

    def inside(self, *command, folder="/"):
        """The command line that runs a command on this host."""
        # On one core, as Open MPI and torch would not know that other hosts use the rest
        place = ["env", f"--chdir={folder}", find("taskset"), "--cpu-list", self.core]
        return self.holder.entered(OWN_NAMESPACES, *place, *command)

    def run(self, *command):
        """The output of a command there; AssertionError if it fails."""
        return checked(self.inside(*command))

    def start_sshd(self):
        """Start the ssh server."""
        command = [find("sshd"), "-D", "-e", "-f", self.hosts.folder / "sshd_config"]
        with (self.hosts.folder / f"sshd-{self.name}.log").open("a") as log:
            self.sshd = subprocess.Popen(
                self.inside(*command),
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        deadline = time.monotonic() + SSHD_SECONDS
        while subprocess.run(self.inside("ssh", self.name, "true"), capture_output=True).returncode:
            assert time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.1)

    def stop_sshd(self):
        """End the ssh server: new connections are refused."""
        self.sshd.terminate()
        self.sshd.wait()

    @contextlib.contextmanager
    def slowed(self, rate):
        """Limit what the host sends for a while, to "10mbit" (per second)."""
        link = ["dev", "eth0", "root"]
        limit = ["tbf", "rate", rate, "burst", "16kb", "latency", "1s"]
        self.run(find("tc"), "qdisc", "replace", *link, *limit)
        try:
            yield
        finally:
            self.run(find("tc"), "qdisc", "del", *link)

    @contextlib.contextmanager
    def off_the_network(self):
        """Take the host off the network for a while, as a pulled cable does."""
        port = ["link", "set", f"port-{self.name}"]
        self.hosts.at_switch(*port, "down")
        try:
            yield
        finally:
            self.hosts.at_switch(*port, "up")

    def processes(self):
        """Process ids and command lines of all that runs on the host but its ssh server.

        A connection's part of that server outlives a client that was cut off.
        """
        found = {}
        for pid in self.holder.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if words and "sshd" not in words.split()[0]:  # zombies have no words
                    found[pid] = words
        return found

    def end_runs(self):
        """Kill all that runs there but the ssh server that listens."""
        for pid in self.holder.processes():
            if pid == self.sshd.pid:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self):
        """End all that runs there."""
        self.holder.end()
        if self.sshd is not None:
            self.sshd.wait()


class Hosts:
    """A context manager of so many hosts, named a, b, c, …; it writes files into `folder`."""

    def __init__(self, folder, count):
        self.folder, self.count, self.hosts, self.switch = Path(folder), count, [], None

    def __enter__(self):
        self.folder.mkdir(parents=True)
        names = [chr(ord("a") + number) for number in range(self.count)]
        lines = [f"10.77.0.{2 + number} {name}" for number, name in enumerate(names)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        for key in ("host_key", "user_key"):
            kind = ["-q", "-t", "ed25519", "-N", ""]
            checked([find("ssh-keygen"), *kind, "-f", self.folder / key])
        try:
            self._join(names)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _join(self, names):
        bridge = "ip link add bridge type bridge\nip link set bridge up"
        self.switch = Holder(["--net"], bridge)
        cores = sorted(os.sched_getaffinity(0))
        for number, name in enumerate(names):
            self.hosts.append(Host(self, name, 2 + number, cores[number % len(cores)]))
        self.switch.wait_until_ready()
        for host in self.hosts:
            host.holder.wait_until_ready()
            peer = ["peer", "name", "eth0", "netns", host.holder.pid]
            self.at_switch("link", "add", f"port-{host.name}", "type", "veth", *peer)
            self.at_switch("link", "set", f"port-{host.name}", "master", "bridge", "up")
            host.run(find("ip"), "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                host.run(find("ip"), "link", "set", device, "up")
            host.start_sshd()

    def at_switch(self, *arguments):
        """Run `ip` where the hosts' links meet."""
        checked(self.switch.entered(["--net"], find("ip"), *arguments))

    def __exit__(self, *_):
        for host in self.hosts:
            host.end()
        if self.switch is not None:
            self.switch.end()
