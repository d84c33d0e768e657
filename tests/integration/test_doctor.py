"""The doctor on this machine as it is, and on set-ups that are broken on purpose: each names its fix."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import MPIRUN, environment

DOCTOR = [sys.executable, "-m", "hvdlarge.doctor"]
BUILD = "docker/install-horovod.sh python"
# Packages named in HIDE are not there, as far as any import can tell. Without torch nothing waits for its import, and without it
# or mpi4py there is no trial of workers.
HIDING = """
import os, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in os.environ.get("HIDE", "").split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture
def doctor(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(HIDING)

    def run_checks(before=(), **environ):
        site = f"{tmp_path / 'site'}{os.pathsep}{environ.pop('PYTHONPATH', '')}"
        done = subprocess.run(
            [*before, *DOCTOR, "--json"],
            cwd=tmp_path,
            env=environment(PYTHONPATH=site, **environ),
            capture_output=True,
            text=True,
            timeout=600,
        )
        report = json.loads(done.stdout[done.stdout.index("{") :])
        found = {finding["name"]: finding for finding in report["findings"]}
        assert done.returncode == (
            3 if any(finding["level"] == "error" for finding in found.values()) else 0
        ), done.stderr
        return found

    return run_checks


def test_nothing_stands_in_the_way_here(doctor):
    found = doctor()
    assert not [finding for finding in found.values() if finding["level"] == "error"]
    assert found["a trial of 2 workers"]["text"] == "Horovod and MPI both see 2"
    assert found["Horovod"]["text"].startswith("built with mpi")


def test_the_report_in_words_names_the_error_and_its_fix(tmp_path):
    done = subprocess.run(
        DOCTOR,
        cwd=tmp_path,
        env=environment(HOROVOD_ELASTIC="1"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 3
    assert "ERROR    HOROVOD_ELASTIC: elastic Horovod is not supported" in done.stdout
    assert "fix: python -m hvdlarge.launch -np N job.yaml" in done.stdout
    assert "errors: 1, warnings: " in done.stdout


def test_under_a_launcher_one_worker_reports_on_that_launch(doctor):
    found = doctor([*MPIRUN, "-np", "3"])
    assert found["3 workers by Open MPI"]["text"] == "Horovod and MPI both see 3"


@pytest.mark.parametrize(
    "before", [[], [*MPIRUN, "-np", "2"]], ids=["alone", "launcher without Horovod"]
)
def test_missing_horovod_is_an_error_with_its_fix(doctor, before):
    found = doctor(before, HIDE="horovod")
    assert found["Horovod"]["level"] == "error"
    assert "is not installed" in found["Horovod"]["text"]
    assert found["Horovod"]["fix"] == BUILD


def test_missing_mpi4py_is_reported_with_its_fix(doctor):
    found = doctor(HIDE="mpi4py torch")
    assert "No module named 'mpi4py'" in found["mpi4py"]["text"]
    assert found["mpi4py"]["fix"] == BUILD


def test_missing_torch_is_reported_with_its_fix(doctor):
    found = doctor(HIDE="torch")
    assert "No module named 'torch'" in found["torch"]["text"]
    assert found["torch"]["fix"] == "python -m pip install torch"
    assert "Horovod" not in found


def test_missing_packages_together_are_two_errors(doctor):
    found = doctor(HIDE="torch horovod mpi4py numpy", PATH=str(Path(sys.executable).parent))
    assert {name for name, finding in found.items() if finding["level"] == "error"} == {
        "torch",
        "mpi4py",
    }


@pytest.fixture
def own_horovod(tmp_path):
    """A copy of Horovod that comes before the installed one, to be broken."""
    import horovod

    shutil.copytree(Path(horovod.__file__).parent, tmp_path / "own/horovod")
    return tmp_path / "own/horovod"


def test_horovod_built_with_another_torch_is_reported_with_its_fix(doctor, own_horovod):
    record = own_horovod / "metadata.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"pytorch": "2.5.1"}))
    found = doctor(PYTHONPATH=str(own_horovod.parent), HIDE="mpi4py")
    assert "was built with torch 2.5.1, but torch 2." in found["Horovod"]["text"]
    assert found["Horovod"]["fix"] == BUILD


def test_horovod_without_its_torch_part_is_reported_with_its_fix(doctor, own_horovod):
    for library in (own_horovod / "torch").glob("mpi_lib*.so"):
        library.unlink()
    found = doctor(PYTHONPATH=str(own_horovod.parent))
    assert found["Horovod"]["text"] == "was installed without its torch part"
    assert found["Horovod"]["fix"] == BUILD


def test_horovod_that_misses_a_symbol_of_torch_is_reported_with_its_fix(doctor, own_horovod):
    """As after a change of torch: one name that Horovod wants of torch is given another spelling."""
    (library,) = (own_horovod / "torch").glob("mpi_lib*.so")
    wanted = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout.split()
    name = next(word for word in wanted if word.startswith("_ZN2at")).encode()
    content = library.read_bytes()
    at = content.index(b"\0" + name + b"\0") + 1
    library.write_bytes(
        content[:at] + name.replace(b"_ZN2at", b"_ZN2aX") + content[at + len(name) :]
    )
    found = doctor(PYTHONPATH=str(own_horovod.parent))
    assert "was built against another torch" in found["Horovod"]["text"]
    assert found["Horovod"]["fix"] == BUILD


def test_missing_mpirun_is_reported_with_its_fix(doctor):
    found = doctor(PATH=str(Path(sys.executable).parent), HIDE="torch")
    assert "mpirun is not on PATH" in found["MPI launcher"]["text"]
    assert found["MPI launcher"]["fix"].startswith("docker/install-system.sh python")


def test_mpirun_of_another_mpi_is_reported_with_its_fix(doctor, tmp_path):
    other = tmp_path / "bin/mpirun"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho 'HYDRA build details:'; echo '    Version:      4.2.0'\n")
    other.chmod(0o755)
    path = os.pathsep.join(
        [str(other.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    found = doctor(PATH=path, HIDE="torch")
    assert "uses Open MPI" in found["mpi4py"]["text"]
    assert "mpirun is that of MPICH 4.2.0" in found["mpi4py"]["text"]
    assert found["mpi4py"]["fix"].startswith(BUILD)


def test_two_workers_on_one_core_are_a_warning(doctor):
    core = min(os.sched_getaffinity(0))
    found = doctor(["taskset", "-c", str(core), *MPIRUN, "-np", "2", "--bind-to", "none"])
    assert found["cores"]["level"] == "warning"
    assert found["cores"]["text"].startswith("2 workers share 1 core")
    assert found["cores"]["fix"].startswith("mpirun")


def test_a_launch_that_mpi_does_not_know_of_is_an_error(doctor):
    """As under `horovodrun --gloo`: each worker would be alone."""
    found = doctor(
        HOROVOD_RANK="0", HOROVOD_SIZE="2", HOROVOD_LOCAL_RANK="0", HOROVOD_LOCAL_SIZE="2"
    )
    (world,) = (
        finding
        for name, finding in found.items()
        if name.startswith("2 workers by horovodrun --gloo")
    )
    assert world["level"] == "error"
    assert "MPI sees 1" in world["text"]


def test_root_that_may_not_launch_is_reported_with_its_fix(doctor, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("this user is not root")
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.delenv(name, raising=False)
    found = doctor()
    assert (
        found["root"]["fix"] == "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    )
    assert found["a trial of 2 workers"]["level"] == "ok"  # the trial allows it to itself


def in_a_namespace(*commands):
    """Run what follows in a mount and host name namespace of its own, after some commands."""
    return ["unshare", "--mount", "--uts", "sh", "-c", " && ".join([*commands, 'exec "$@"']), "sh"]


def test_small_shared_memory_is_reported_with_its_fix(doctor):
    namespace = in_a_namespace("mount -t tmpfs -o size=64m tmpfs /dev/shm")
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this user cannot make a mount namespace")
    found = doctor(namespace, HIDE="mpi4py torch")
    assert found["/dev/shm"]["text"].startswith("64 MiB")
    assert "--shm-size" in found["/dev/shm"]["fix"]


def test_a_host_without_an_address_is_a_warning(doctor):
    namespace = in_a_namespace("hostname nowhere-to-be-found")
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("this user cannot give itself another host name")
    found = doctor(namespace, HIDE="mpi4py torch")
    assert found["host name"]["level"] == "warning"
    assert found["host name"]["fix"] == "echo 127.0.1.1 nowhere-to-be-found >> /etc/hosts"
