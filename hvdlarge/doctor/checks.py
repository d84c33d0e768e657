"""What this machine has and lacks for a run: each finding with the one command that mends it.

Everything that may crash, hang or be missing is looked at in a process of its own, so an
examination always comes to its end. What is looked for is what users of Horovod and MPI report
most; the messages are those of Horovod 0.28.1 and Open MPI 4 and 5.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hvdlarge.comm.launcher import Launch

Level = Literal["ok", "warning", "error"]
_BUILD = "docker/install-horovod.sh python"
_SYSTEM = "docker/install-system.sh python"
_PATIENCE_SECONDS = 60
_SMALL_SHARED_MEMORY = 512 * 2**20

# Imports one module and says what its named functions return and which MPI libraries the process
# has loaded.
_LOOK = """
import importlib, json, os, sys
found = {}
try:
    module = importlib.import_module(sys.argv[1])
    for name in sys.argv[2:]:
        value = getattr(module, name)
        found[name] = value() if callable(value) else value
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            paths = [line.split()[-1] for line in maps]
            found["libraries"] = sorted({path for path in paths if "libmpi" in path.split("/")[-1]})
except BaseException as error:
    found["error"] = f"{type(error).__name__}: {error}"
print("FOUND" + json.dumps(found, default=str))
"""

# Opens both channels as a run does, and says what each side sees.
_WORLD = """
import json, os, socket
from hvdlarge.comm.launcher import bound_cores, detect, starting_settings
from hvdlarge.comm.interfaces import WorldMismatchError
from hvdlarge.comm.connect import open_control, open_tensors
launch = detect(os.environ)
os.environ.update(starting_settings(os.environ, launch.local_size, len(bound_cores())))
found = {"host": socket.gethostname(), "cores": bound_cores()}
try:
    control = open_control(launch)
    tensors = open_tensors(launch, control)
    found["size"] = control.size
    found["workers"] = [json.loads(text) for text in control.allgather(json.dumps(found).encode())]
    tensors.close()
    control.close()
except (WorldMismatchError, OSError) as error:
    found["error"] = str(error)
if launch.is_local_leader:
    print("FOUND" + json.dumps(found))
"""


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    level: Level
    text: str
    fix: str = ""  # the command that mends it; empty where nothing needs mending


def run_checks(environ: Mapping[str, str], launch: Launch | None) -> Iterator[Finding]:
    """Look at everything, in the order in which it is needed.

    Args:
        environ: the environment of this process.
        launch: the launch that this process belongs to; None without a launcher, then a launch of
            two workers is tried.
    """
    yield _python()
    torch = _look("torch", "__version__")
    yield _torch(torch)
    mpi4py = _look("mpi4py.MPI", "Get_library_version", MPI4PY_RC_INITIALIZE="0")
    yield from _mpi(mpi4py)
    horovod = (
        _look("horovod.torch", "mpi_built", "nccl_built", "cuda_built", "rocm_built")
        if "error" not in torch
        else None
    )
    yield from _horovod(horovod, torch, mpi4py)
    yield from _variables(environ)
    if "error" not in mpi4py and horovod is not None and "error" not in horovod:
        yield from _world(launch)
    yield from _gpus(torch, horovod)
    yield from _system()


def observe(launch: Launch) -> None:
    """What the ranks do that do not report: take part in the trial of the world. Every such rank
    calls this together.
    """
    # The one that reports looks at other things first
    _ask(_WORLD, environ={}, patience=3 * _PATIENCE_SECONDS)


def _python() -> Finding:
    return Finding("Python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})")


def _torch(found: Mapping[str, Any]) -> Finding:
    if "error" in found:
        return Finding(
            "torch", "error", f"does not load: {found['error']}", "python -m pip install torch"
        )
    version = found["__version__"]
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (2, 10):
        return Finding(
            "torch",
            "error",
            f"{version}; 2.10 or later is needed",
            "python -m pip install --upgrade torch",
        )
    return Finding("torch", "ok", version)


def _mpi(mpi4py: Mapping[str, Any]) -> Iterator[Finding]:
    launcher = None
    if shutil.which("mpirun") is None:
        text = "mpirun is not on PATH: only runs on one worker are possible"
        yield Finding(
            "MPI launcher", "warning", text, f"{_SYSTEM}  (on a cluster: module load openmpi)"
        )
    else:
        said = _output(["mpirun", "--version"])
        launcher = _vendor_of(said)
        yield Finding(
            "MPI launcher",
            "ok",
            f"{' '.join(launcher) or said.strip()[:80]} ({shutil.which('mpirun')})",
        )
    if "error" in mpi4py:
        yield Finding("mpi4py", "error", f"does not load: {mpi4py['error']}", _BUILD)
        return
    library = _vendor_of(mpi4py["Get_library_version"])
    if launcher and library and launcher != library:
        text = (
            f"uses {' '.join(library)}, but mpirun is that of {' '.join(launcher)}: every worker "
            "would be alone in its world"
        )
        yield Finding(
            "mpi4py", "error", text, f"{_BUILD}  (with the MPI that you launch with first on PATH)"
        )
    else:
        yield Finding("mpi4py", "ok", f"on {' '.join(library)}")


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not answer ({type(error).__name__})"


def _vendor_of(text: str) -> tuple[str, ...]:
    """Vendor and version of an MPI from what it says about itself.

    >>> _vendor_of("mpirun (Open MPI) 4.1.4"), _vendor_of("Open MPI v4.1.4, ident: 4.1.4")
    (('Open MPI', '4.1.4'), ('Open MPI', '4.1.4'))
    >>> _vendor_of("HYDRA build details: Version: 4.2.0 Release Date")
    ('MPICH', '4.2.0')
    """
    for vendor, pattern in (
        ("Open MPI", r"Open MPI\)? v?([0-9.]+)"),
        ("Intel MPI", r"Intel\(R\) MPI Library.*?([0-9]+(?:\.[0-9]+)+)"),
        ("MPICH", r"(?:MPICH|HYDRA).*?Version:\s*([0-9][0-9.]*)"),
    ):
        match = re.search(pattern, text, re.DOTALL)
        if match:
            return vendor, match[1].rstrip(".")
    return ()


def _horovod(
    found: Mapping[str, Any] | None, torch: Mapping[str, Any], mpi4py: Mapping[str, Any]
) -> Iterator[Finding]:
    if found is None:
        return  # without torch there is nothing to see
    if "error" in found:
        yield Finding("Horovod", "error", *_why_horovod_does_not_load(found["error"]))
        return
    built_with = _torch_that_horovod_was_built_with()
    if built_with is not None and built_with != torch["__version__"]:
        yield Finding(
            "Horovod",
            "error",
            f"was built with torch {built_with}, here is {torch['__version__']}",
            _BUILD,
        )
    elif not found["mpi_built"]:
        yield Finding("Horovod", "error", "was built without MPI", _BUILD)
    else:
        flags = ", ".join(
            name.removesuffix("_built") for name in found if name.endswith("_built") and found[name]
        )
        yield Finding(
            "Horovod",
            "ok",
            f"built with {flags}" + (f" against torch {built_with}" if built_with else ""),
        )
    theirs, ours = (
        {
            library
            for library in maps.get("libraries", ())
            if re.match(r"libmpi\.so", Path(library).name)
        }
        for maps in (found, mpi4py)
    )
    if theirs and ours and theirs != ours:
        text = (
            f"Horovod loads {', '.join(sorted(theirs))}, mpi4py {', '.join(sorted(ours))}: they "
            "would not meet"
        )
        yield Finding("one MPI", "error", text, _BUILD)


def _why_horovod_does_not_load(error: str) -> tuple[str, str]:
    """What is wrong, and the command that mends it."""
    if error.startswith("ModuleNotFoundError: No module named 'horovod"):
        return "is not installed: only runs on one worker are possible", _BUILD
    if (
        "has not been built" in error
        or "no attribute 'mpi_built'" in error
        or "No module named 'horovod.torch.mpi_lib" in error
    ):
        return "was installed without its torch part", _BUILD
    if "undefined symbol" in error:
        return (
            f"was built against another torch ({error.rsplit(':', 1)[-1].strip()[:60]} is missing)",
            _BUILD,
        )
    if "libmpi" in error:
        return (
            f"does not find its MPI: {error}",
            "module load openmpi  (or LD_LIBRARY_PATH of the MPI that it was built with)",
        )
    if "packaging" in error or "distutils" in error:
        return (
            f"misses a part of Python's packaging: {error}",
            "python -m pip install setuptools packaging",
        )
    return f"does not load: {error}", _BUILD


def _torch_that_horovod_was_built_with() -> str | None:
    for folder in sys.path:
        record = Path(folder or ".") / "horovod" / "metadata.json"
        if record.is_file():
            try:
                return str(json.loads(record.read_text(encoding="utf-8"))["pytorch"])
            except (OSError, ValueError, KeyError):
                return None
    return None


def _variables(environ: Mapping[str, str]) -> Iterator[Finding]:
    if environ.get("HOROVOD_ELASTIC") == "1":
        yield Finding(
            "HOROVOD_ELASTIC",
            "error",
            "elastic Horovod is not supported",
            "python -m hvdlarge.launch -np N job.yaml",
        )
    allowed = all(environ.get(f"OMPI_ALLOW_RUN_AS_ROOT{end}") == "1" for end in ("", "_CONFIRM"))
    if hasattr(os, "geteuid") and os.geteuid() == 0 and not allowed and shutil.which("mpirun"):
        text = "Open MPI's mpirun refuses to run as root"
        yield Finding(
            "root",
            "warning",
            text,
            "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
        )


def _world(launch: Launch | None) -> Iterator[Finding]:
    """Workers that see each other, and the cores they have."""
    if launch is not None:
        workers, found = launch.size, _ask(_WORLD, environ={})
        name = f"{workers} workers by {launch.launcher}"
    elif shutil.which("mpirun") is None:
        return
    else:
        name = "a trial of 2 workers"
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        workers, found = 2, _ask(_WORLD, environ=root, before=("mpirun", "-np", "2"))
        if "slots" in found.get("error", ""):
            slots = found["error"]
            found = _ask(_WORLD, environ=root, before=("mpirun", "--oversubscribe", "-np", "2"))
            if "error" not in found:
                yield Finding(
                    name,
                    "warning",
                    f"mpirun finds too few slots here ({slots})",
                    "mpirun --oversubscribe -np 2 …",
                )
    if "error" in found:
        yield Finding(name, "error", found["error"], _cure_of_a_world(found["error"]))
        return
    if found["size"] != workers:
        yield Finding(name, "error", f"MPI sees {found['size']} of {workers} workers", _BUILD)
        return
    yield Finding(name, "ok", f"Horovod and MPI both see {workers}")
    yield from _cores(found["workers"], launch)


def _cores(workers: Sequence[Mapping[str, Any]], launch: Launch | None) -> Iterator[Finding]:
    by_binding: dict[tuple[int, ...], int] = {}
    here = [worker for worker in workers if worker["host"] == socket.gethostname()]
    for worker in here:
        by_binding[tuple(worker["cores"])] = by_binding.get(tuple(worker["cores"]), 0) + 1
    cores, sharing = min(by_binding.items(), key=lambda entry: len(entry[0]) / entry[1])
    one = "1 core" if len(cores) == 1 else f"{len(cores)} cores"
    if sharing > len(cores):
        enough = os.cpu_count() or 1
        fix = "mpirun --bind-to none …" if enough >= len(here) else f"mpirun -np {enough} …"
        yield Finding(
            "cores", "warning", f"{sharing} workers share {one}: each waits for the other", fix
        )
        return
    yield Finding("cores", "ok", f"{one} for {sharing} {'worker' if sharing == 1 else 'workers'}")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if launch is not None and threads.isdigit() and int(threads) * sharing > len(cores):
        text = f"OMP_NUM_THREADS={threads} for {sharing} workers on {one}"
        yield Finding(
            "threads",
            "warning",
            text,
            "unset OMP_NUM_THREADS  (the engine sets torch's threads from the cores)",
        )


def _cure_of_a_world(error: str) -> str:
    if "root" in error:
        return "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    if "did not answer" in error:
        return "mpirun --mca btl_tcp_if_include lo …  (or the interface that your hosts share)"
    return _BUILD


def _gpus(torch: Mapping[str, Any], horovod: Mapping[str, Any] | None) -> Iterator[Finding]:
    there = list(Path("/dev").glob("nvidia[0-9]*"))
    if not there:
        yield Finding("GPUs", "ok", "none on this host: runs are on the CPU")
        return
    if "error" in torch:
        return
    seen = _look("torch.cuda", "is_available", "device_count")
    gpus = f"{len(there)} {'GPU' if len(there) == 1 else 'GPUs'}"
    if not seen.get("is_available"):
        text = f"{gpus} on this host, but this torch does not use them"
        yield Finding(
            "GPUs",
            "warning",
            text,
            "python -m pip install --force-reinstall torch  (the CUDA build), then " + _BUILD,
        )
    elif (
        horovod is not None
        and "error" not in horovod
        and not (horovod["cuda_built"] or horovod["rocm_built"])
    ):
        text = f"{gpus}, but Horovod was built without CUDA"
        yield Finding(
            "GPUs", "error", text, f"CUDA_HOME=/usr/local/cuda HOROVOD_GPU_OPERATIONS=NCCL {_BUILD}"
        )
    elif horovod is not None and "error" not in horovod and not horovod["nccl_built"]:
        text = f"{gpus}, but Horovod was built without NCCL: gradients go by way of the host"
        yield Finding(
            "GPUs",
            "warning",
            text,
            f"CUDA_HOME=/usr/local/cuda HOROVOD_GPU_OPERATIONS=NCCL {_BUILD}",
        )
    else:
        yield Finding("GPUs", "ok", gpus)


def _system() -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        if size < _SMALL_SHARED_MEMORY:
            text = f"{size // 2**20} MiB: loader processes and MPI on one host need more"
            yield Finding(
                "/dev/shm",
                "warning",
                text,
                "docker run --shm-size=2g …  (or: mount -o remount,size=2g /dev/shm)",
            )
        else:
            yield Finding("/dev/shm", "ok", f"{size / 2**30:.1f} GiB")
    if Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        if limit != resource.RLIM_INFINITY:
            text = f"{limit // 1024} KiB may be locked: InfiniBand needs it unlimited"
            yield Finding(
                "memlock",
                "warning",
                text,
                "ulimit -l unlimited  (docker run --cap-add=IPC_LOCK --ulimit memlock=-1)",
            )
        else:
            yield Finding("memlock", "ok", "unlimited")
    try:
        socket.gethostbyname(socket.gethostname())
        yield Finding("host name", "ok", socket.gethostname())
    except OSError:
        text = f"{socket.gethostname()} has no address: launchers look this host up by its name"
        yield Finding(
            "host name", "warning", text, f"echo 127.0.1.1 {socket.gethostname()} >> /etc/hosts"
        )
    if shutil.which("ssh") is None:
        yield Finding(
            "ssh",
            "warning",
            "is not on PATH: needed for more than one host, except under Slurm",
            "apt-get install openssh-client",
        )
    else:
        yield Finding("ssh", "ok", str(shutil.which("ssh")))


def _look(module: str, *names: str, **environ: str) -> dict[str, Any]:
    return _ask(_LOOK, environ, arguments=(module, *names))


def _ask(
    script: str,
    environ: Mapping[str, str],
    before: Sequence[str] = (),
    arguments: Sequence[str] = (),
    patience: float = _PATIENCE_SECONDS,
) -> dict[str, Any]:
    """What a script finds in a process of its own; `error` where it finds nothing."""
    command = [*before, sys.executable, "-c", script, *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            timeout=patience,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"did not answer within {patience:g} s"}
    for line in done.stdout.splitlines():
        if line.startswith("FOUND"):
            return json.loads(line.removeprefix("FOUND"))
    said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip(" -=*")]
    return {"error": " ".join(said)[:300] or f"ended with exit code {done.returncode}"}
