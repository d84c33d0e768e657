"""Checks what this machine has and lacks for a run; each finding names the command that fixes it.

Whatever may crash, hang or be missing is tried in a subprocess, so the checks always finish. They
cover what users of Horovod and MPI report most; the error messages that they recognize are those of
Horovod 0.28.1 and Open MPI 4 and 5.
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
_TIMEOUT_SECONDS = 60
_SMALL_SHARED_MEMORY = 512 * 2**20

# Imports a module; reports the values of its named functions or attributes and the loaded MPI
# libraries. At its end there is no search for garbage, which takes 0.3 s with torch.
_MODULE_SCRIPT = """
import gc, importlib, json, os, sys
report = {}
try:
    module = importlib.import_module(sys.argv[1])
    for name in sys.argv[2:]:
        value = getattr(module, name)
        report[name] = value() if callable(value) else value
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            paths = [line.split()[-1] for line in maps]
            libraries = {path for path in paths if "libmpi" in path.split("/")[-1]}
            report["libraries"] = sorted(libraries)
except BaseException as error:
    report["error"] = f"{type(error).__name__}: {error}"
print("REPORT" + json.dumps(report, default=str))
gc.freeze()
"""

# Opens both channels as a run does; reports the workers that this one sees
_LAUNCH_SCRIPT = """
import gc, json, os, socket
from hvdlarge.comm.launcher import bound_cores, detect, starting_settings
from hvdlarge.comm.interfaces import WorldMismatchError
from hvdlarge.comm.connect import open_control, open_tensors
from hvdlarge.exits import RunExit
launch = detect(os.environ)
os.environ.update(starting_settings(os.environ, launch.local_size, len(bound_cores())))
report = {"host": socket.gethostname(), "cores": bound_cores()}
try:
    control = open_control(launch)
    tensors = open_tensors(launch, control)
    report["size"] = control.size
    answers = control.allgather(json.dumps(report).encode())
    report["workers"] = [json.loads(answer) for answer in answers]
    tensors.close()
    control.close()
except (WorldMismatchError, RunExit, OSError) as error:
    report["error"] = str(error)
if launch.is_local_leader:
    print("REPORT" + json.dumps(report))
gc.freeze()
"""


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    level: Level
    text: str
    fix: str = ""  # the command that fixes it; empty if there is nothing to fix


def run_checks(environ: Mapping[str, str], launch: Launch | None) -> Iterator[Finding]:
    """Run all checks, each after those that it depends on.

    Args:
        environ: the environment of this process.
        launch: of this process; None without a launcher: then two workers are started on trial.
    """
    yield _python()
    torch = _try_module("torch", "__version__")
    yield _torch(torch)
    mpi4py = _try_module("mpi4py.MPI", "Get_library_version", MPI4PY_RC_INITIALIZE="0")
    yield from _mpi(mpi4py)
    horovod = (
        _try_module("horovod.torch", "mpi_built", "nccl_built", "cuda_built", "rocm_built")
        if "error" not in torch
        else None
    )
    yield from _horovod(horovod, torch, mpi4py)
    yield from _variables(environ)
    if "error" not in mpi4py and horovod is not None and horovod.get("mpi_built"):
        yield from _launch(launch)
    yield from _gpus(torch, horovod)
    yield from _system()


def join_launch_check() -> None:
    """Take part in the check of the launch, on the ranks that do not report."""
    # Longer than the reporting rank's timeout, as that runs other checks first
    _run_script(_LAUNCH_SCRIPT, environ={}, timeout=3 * _TIMEOUT_SECONDS)


def _python() -> Finding:
    return Finding("Python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})")


def _torch(torch: Mapping[str, Any]) -> Finding:
    if "error" in torch:
        return Finding(
            "torch", "error", f"does not load: {torch['error']}", "python -m pip install torch"
        )
    version = torch["__version__"]
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (2, 11):
        return Finding(
            "torch",
            "error",
            f"{version}; 2.11 or later is needed",
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
        output = _output(["mpirun", "--version"])
        launcher = _vendor_and_version(output)
        yield Finding(
            "MPI launcher",
            "ok",
            f"{' '.join(launcher) or output.strip()[:80]} ({shutil.which('mpirun')})",
        )
    if "error" in mpi4py:
        yield Finding("mpi4py", "error", f"does not load: {mpi4py['error']}", _BUILD)
        return
    library = _vendor_and_version(mpi4py["Get_library_version"])
    if launcher and library and launcher != library:
        text = (
            f"uses {' '.join(library)}, but mpirun is that of {' '.join(launcher)}: every worker "
            "would see a world size of 1"
        )
        yield Finding(
            "mpi4py", "error", text, f"{_BUILD}  (with the MPI that you launch with first on PATH)"
        )
    else:
        name = " ".join(library) or "an MPI that the doctor does not know"
        yield Finding("mpi4py", "ok", f"on {name}")


def _vendor_of_mpirun() -> str | None:
    """The vendor of the mpirun on PATH; None if there is none, or if it is not recognized."""
    if shutil.which("mpirun") is None:
        return None
    return next(iter(_vendor_and_version(_output(["mpirun", "--version"]))), None)


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not answer ({type(error).__name__})"


def _vendor_and_version(text: str) -> tuple[str, ...]:
    """Vendor and version of an MPI from its version message; empty if it is not recognized.

    >>> _vendor_and_version("mpirun (Open MPI) 4.1.4")
    ('Open MPI', '4.1.4')
    >>> _vendor_and_version("Open MPI v4.1.4, ident: 4.1.4")
    ('Open MPI', '4.1.4')
    >>> _vendor_and_version("HYDRA build details: Version: 4.2.0 Release Date")
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
    horovod: Mapping[str, Any] | None, torch: Mapping[str, Any], mpi4py: Mapping[str, Any]
) -> Iterator[Finding]:
    if horovod is None:
        return  # horovod.torch cannot be imported without torch
    if "error" in horovod:
        yield Finding("Horovod", "error", *_explain_horovod_error(horovod["error"]))
        return
    built_with = _horovods_torch_version()
    if built_with is not None and built_with != torch["__version__"]:
        yield Finding(
            "Horovod",
            "error",
            f"was built with torch {built_with}, but torch {torch['__version__']} is installed",
            _BUILD,
        )
    elif not horovod["mpi_built"]:
        yield Finding("Horovod", "error", "was built without MPI", _BUILD)
    else:
        flags = ", ".join(
            name.removesuffix("_built")
            for name in horovod
            if name.endswith("_built") and horovod[name]
        )
        yield Finding(
            "Horovod",
            "ok",
            f"built with {flags}" + (f" against torch {built_with}" if built_with else ""),
        )
    of_horovod, of_mpi4py = (
        {
            library
            for library in module.get("libraries", ())
            if re.match(r"libmpi\.so", Path(library).name)
        }
        for module in (horovod, mpi4py)
    )
    if of_horovod and of_mpi4py and of_horovod != of_mpi4py:
        text = (
            f"Horovod loads {', '.join(sorted(of_horovod))}, mpi4py "
            f"{', '.join(sorted(of_mpi4py))}: both must load the same MPI"
        )
        yield Finding("one MPI", "error", text, _BUILD)


def _explain_horovod_error(error: str) -> tuple[str, str]:
    """What is wrong, and the command that fixes it."""
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
            f"cannot find its MPI: {error}",
            "module load openmpi  (or LD_LIBRARY_PATH of the MPI that it was built with)",
        )
    if "packaging" in error or "distutils" in error:
        return (
            f"needs a missing packaging module of Python: {error}",
            "python -m pip install setuptools packaging",
        )
    return f"does not load: {error}", _BUILD


def _horovods_torch_version() -> str | None:
    """The torch that Horovod was built with; None if Horovod does not record it."""
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
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if is_root and not allowed and _vendor_of_mpirun() == "Open MPI":
        text = "Open MPI's mpirun refuses to run as root"
        yield Finding(
            "root",
            "warning",
            text,
            "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
        )


def _launch(launch: Launch | None) -> Iterator[Finding]:
    """Whether workers see each other, and how many cores they have."""
    if launch is not None:
        workers, report = launch.size, _run_script(_LAUNCH_SCRIPT, environ={})
        name = f"{workers} workers by {launch.launcher}"
    elif shutil.which("mpirun") is None:
        return
    else:
        name = "a trial of 2 workers"
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        workers, report = 2, _run_script(_LAUNCH_SCRIPT, root, ("mpirun", "-np", "2"))
        if "slots" in report.get("error", ""):
            error = report["error"]
            command = ("mpirun", "--oversubscribe", "-np", "2")
            report = _run_script(_LAUNCH_SCRIPT, root, command)
            if "error" not in report:
                yield Finding(
                    name,
                    "warning",
                    f"mpirun finds too few slots on this host ({error})",
                    "mpirun --oversubscribe -np 2 …",
                )
    if "error" in report:
        yield Finding(name, "error", report["error"], _fix_for_launch(report["error"]))
        return
    if report["size"] != workers:
        yield Finding(name, "error", f"MPI sees {report['size']} of {workers} workers", _BUILD)
        return
    yield Finding(name, "ok", f"Horovod and MPI both see {workers}")
    yield from _cores(report["workers"], launch)


def _cores(workers: Sequence[Mapping[str, Any]], launch: Launch | None) -> Iterator[Finding]:
    workers_of: dict[tuple[int, ...], int] = {}  # number of workers by the cores they are bound to
    local = [worker for worker in workers if worker["host"] == socket.gethostname()]
    for worker in local:
        workers_of[tuple(worker["cores"])] = workers_of.get(tuple(worker["cores"]), 0) + 1
    if not local:  # as on a login node, which launches on others
        yield Finding("cores", "ok", "no worker runs on this host: its cores were not checked")
        return
    cores, sharing = min(workers_of.items(), key=lambda entry: len(entry[0]) / entry[1])
    count = "1 core" if len(cores) == 1 else f"{len(cores)} cores"
    if sharing > len(cores):
        available = os.cpu_count() or 1
        enough = available >= len(local)
        fix = "mpirun --bind-to none …" if enough else f"mpirun -np {available} …"
        yield Finding("cores", "warning", f"{sharing} workers share {count}", fix)
        return
    yield Finding("cores", "ok", f"{count} for {sharing} {'worker' if sharing == 1 else 'workers'}")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if launch is not None and threads.isdigit() and int(threads) * sharing > len(cores):
        text = f"OMP_NUM_THREADS={threads} for {sharing} workers on {count}"
        yield Finding(
            "threads",
            "warning",
            text,
            "unset OMP_NUM_THREADS  (the engine sets torch's threads from the cores)",
        )


def _fix_for_launch(error: str) -> str:
    if "as root" in error:
        return "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    if "did not answer" in error:
        return "mpirun --mca btl_tcp_if_include lo …  (or the interface that the hosts share)"
    return _BUILD


def _gpus(
    torch: Mapping[str, Any],
    horovod: Mapping[str, Any] | None,
    device_folder: Path = Path("/dev"),
) -> Iterator[Finding]:
    devices = list(device_folder.glob("nvidia[0-9]*"))
    if not devices and (device_folder / "kfd").exists():
        text = "AMD GPUs on this host (/dev/kfd): runs on ROCm are untested"
        yield Finding("GPUs", "warning", text)
        return
    if not devices:
        yield Finding("GPUs", "ok", "none on this host: runs use the CPU")
        return
    if "error" in torch:
        return
    cuda = _try_module("torch.cuda", "is_available")
    gpus = f"{len(devices)} {'GPU' if len(devices) == 1 else 'GPUs'}"
    if not cuda.get("is_available"):
        text = f"{gpus} on this host, but this torch cannot use them"
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
        text = f"{gpus}, but Horovod was built without NCCL: gradients go through the host"
        yield Finding(
            "GPUs",
            "warning",
            text,
            f"CUDA_HOME=/usr/local/cuda HOROVOD_GPU_OPERATIONS=NCCL {_BUILD}",
        )
    else:
        yield Finding("GPUs", "ok", gpus)


def _system() -> Iterator[Finding]:
    yield from _shared_memory(Path("/dev/shm"))
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
        text = f"{socket.gethostname()} has no address: launchers resolve the host by its name"
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


def _shared_memory(folder: Path) -> Iterator[Finding]:
    """Whether loader processes and MPI have room to pass data on this host."""
    if not folder.is_dir():
        return
    usage = shutil.disk_usage(folder)
    if usage.total < _SMALL_SHARED_MEMORY:
        text = f"{usage.total // 2**20} MiB: loader processes and MPI on one host need more"
        fix = "docker run --shm-size=2g …  (or: mount -o remount,size=2g /dev/shm)"
        yield Finding(str(folder), "warning", text, fix)
    elif usage.free < _SMALL_SHARED_MEMORY:
        text = (
            f"{usage.free // 2**20} MiB of {usage.total / 2**30:.1f} GiB are free: loader "
            "processes and MPI on one host need more"
        )
        fix = f"ls -l {folder}  (files of processes that were killed may be removed)"
        yield Finding(str(folder), "warning", text, fix)
    else:
        yield Finding(str(folder), "ok", f"{usage.total / 2**30:.1f} GiB")


def _try_module(module: str, *names: str, **environ: str) -> dict[str, Any]:
    return _run_script(_MODULE_SCRIPT, environ, arguments=(module, *names))


def _run_script(
    script: str,
    environ: Mapping[str, str],
    launcher: Sequence[str] = (),
    arguments: Sequence[str] = (),
    timeout: float = _TIMEOUT_SECONDS,
) -> dict[str, Any]:
    """The report of a script run in a subprocess; its key `error` if the script fails."""
    command = [*launcher, sys.executable, "-c", script, *arguments]
    try:
        result = subprocess.run(
            command,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"did not answer within {timeout:g} s"}
    for line in result.stdout.splitlines():
        if line.startswith("REPORT"):
            return json.loads(line.removeprefix("REPORT"))
    output = (result.stderr + result.stdout).splitlines()
    lines = [line.strip() for line in output if line.strip(" -=*")]
    return {"error": " ".join(lines)[:300] or f"ended with exit code {result.returncode}"}
