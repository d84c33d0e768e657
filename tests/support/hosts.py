"""Several hosts on this machine: network namespaces with a name and an address of their own, joined by a bridge, each with an ssh server.

They share files and cores. Nothing reaches the machine's own network: the bridge is in a namespace too. What was started ends with the hosts.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

PROGRAMS = ("ip", "tc", "unshare", "nsenter", "ssh", "ssh-keygen", "sshd")
PORT = 2222
SSHD = """\
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitUserEnvironment no
AcceptEnv *
"""


def find(program):
    """The path of a program, in the folders of the administrator too."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def missing():
    """Why there can be no hosts here; empty if there can."""
    absent = [program for program in PROGRAMS if find(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: iproute2 util-linux openssh-client openssh-server)"
    if os.geteuid() != 0:
        return "network namespaces need root here"
    tried = subprocess.run(
        [find("unshare"), "--net", "--uts", "--mount", "true"], capture_output=True, text=True
    )
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


class Host:
    """One of them."""

    def __init__(self, hosts, name, number):
        self.hosts, self.name, self.address = hosts, name, f"10.77.0.{number}"
        # A process that holds the namespaces, with a name of its own and the /etc/hosts of all
        script = f"hostname {name}; mount --bind {hosts.folder}/hosts /etc/hosts; exec sleep 100000"
        self.holder = subprocess.Popen(
            [find("unshare"), "--net", "--uts", "--mount", "sh", "-c", script]
        )
        self.sshd = None

    def inside(self, *command):
        """The command line that runs a command on this host."""
        return [
            find("nsenter"),
            "-t",
            str(self.holder.pid),
            "--net",
            "--uts",
            "--mount",
            *map(str, command),
        ]

    def run(self, *command):
        """Run a command there; AssertionError if it fails."""
        done = subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def start_sshd(self):
        """Start the ssh server."""
        with (self.hosts.folder / f"sshd-{self.name}.log").open("a") as log:
            command = [find("sshd"), "-D", "-e", "-f", f"{self.hosts.folder}/sshd_config"]
            self.sshd = subprocess.Popen(
                self.inside(*command), stdout=log, stderr=log, start_new_session=True
            )

    def stop_sshd(self):
        """End the ssh server: no new connection is taken."""
        self.sshd.terminate()
        self.sshd.wait()

    def slow(self, *rule):
        """Slow the host's link: slow("rate", "100mbit", "delay", "2ms")."""
        self.run(find("tc"), "qdisc", "replace", "dev", "eth0", "root", "netem", *rule)

    def cut(self):
        """Take the host off the network, as a pulled cable does."""
        self.run(find("ip"), "link", "set", "eth0", "down")

    def join(self):
        """Put the host on the network again."""
        self.run(find("ip"), "link", "set", "eth0", "up")

    def processes(self):
        """Process ids of all in the host's network but its holder."""
        network = os.readlink(f"/proc/{self.holder.pid}/ns/net")
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(place / "ns/net") == network and int(place.name) != self.holder.pid:
                    found.append(int(place.name))
        return found

    def end(self):
        """End all that runs there."""
        for pid in [*self.processes(), self.holder.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.holder.wait()
        if self.sshd is not None:
            self.sshd.wait()


class Hosts:
    """A context manager of so many hosts, named a, b, c, …"""

    def __init__(self, folder, count):
        self.folder, self.count, self.hosts = Path(folder), count, []

    def __enter__(self):
        self.folder.mkdir(parents=True)
        names = [chr(ord("a") + number) for number in range(self.count)]
        lines = [
            "127.0.0.1 localhost",
            *(f"10.77.0.{2 + i} {name}" for i, name in enumerate(names)),
        ]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        for key in ("host_key", "user_key"):
            command = [find("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key]
            subprocess.run(command, check=True)
        (self.folder / "sshd_config").write_text(SSHD.format(port=PORT, folder=self.folder))
        Path("/run/sshd").mkdir(
            exist_ok=True
        )  # where sshd gives up its rights; Debian makes it at the service's start
        self.switch = subprocess.Popen([find("unshare"), "--net", "sleep", "100000"])
        try:
            self._join(names)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _join(self, names):
        self.hosts = [Host(self, name, 2 + number) for number, name in enumerate(names)]
        self._wait_for_namespaces()
        in_switch = [find("nsenter"), "-t", str(self.switch.pid), "--net", find("ip")]
        self._ip(in_switch, "link", "add", "bridge", "type", "bridge")
        self._ip(in_switch, "link", "set", "bridge", "up")
        for host in self.hosts:
            port = f"port-{host.name}"
            self._ip(
                in_switch,
                "link",
                "add",
                port,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                host.holder.pid,
            )
            self._ip(in_switch, "link", "set", port, "master", "bridge", "up")
            host.run(find("ip"), "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                host.run(find("ip"), "link", "set", device, "up")
            host.start_sshd()
        deadline = time.monotonic() + 30
        for host in self.hosts:
            while subprocess.run(self.ssh(host, "true"), capture_output=True).returncode:
                assert time.monotonic() < deadline, f"no ssh to {host.name}"
                time.sleep(0.2)

    @staticmethod
    def _ip(command, *arguments):
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"

    def _wait_for_namespaces(self):
        own = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + 20
        for pid in [self.switch.pid, *(host.holder.pid for host in self.hosts)]:
            while (
                os.readlink(f"/proc/{pid}/ns/net") == own
                or b"sleep" not in Path(f"/proc/{pid}/cmdline").read_bytes()
            ):
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def __exit__(self, *_):
        for host in self.hosts:
            host.end()
        self.switch.kill()
        self.switch.wait()

    @property
    def ssh_options(self):
        """Of ssh, for a connection from one host to another."""
        return (
            f"-p {PORT} -i {self.folder}/user_key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "
            "-o LogLevel=ERROR -o BatchMode=yes -o ConnectTimeout=10"
        )

    def ssh(self, host, *command):
        """The command line that runs a command by ssh, from the first host."""
        return self.hosts[0].inside(find("ssh"), *self.ssh_options.split(), host.name, *command)
