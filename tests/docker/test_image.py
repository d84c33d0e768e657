"""The image for CPUs, and the last stage of the one for GPUs: what is in them, the main job in one container, and on hosts as on Kubernetes."""

import json
import os
import re
import shutil
import subprocess
import tarfile
import time

import pytest
import yaml
from support import hosts as network
from support import images
from support.launching import ROOT


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_the_main_job_trains_as_mpiuser(bench, image, shared):
    ended = bench.run(image, "sh", "-c", "id; pwd; umask")
    assert ended.out.split("\n")[:2] == [
        "uid=1000(mpiuser) gid=1000(mpiuser) groups=1000(mpiuser)",
        "/home/mpiuser",
    ]
    train = ["mpirun", "--oversubscribe", "-np", "2", "hvdlarge", "train", "digits"]
    ended = bench.run(image, *train, "run_dir=/shared/run")
    assert ended.code == 0, ended.text
    found = summary(shared / "run")
    assert (found["steps"], found["world_size"], found["growths"]) == (524, 2, 4)
    assert found["accuracy"] >= 0.98
    assert (shared / "run/summary.json").stat().st_uid == 1000
    print(f"\nimage: {images.size(image):,.0f} MB; main job: accuracy {found['accuracy']:.4f}")


def test_the_doctor_is_what_runs_by_default(bench, image):
    ended = bench.run(image)
    assert ended.code == 0, ended.text
    assert re.search(r"^ok +Horovod", ended.out, re.MULTILINE), ended.out


def test_no_layer_holds_a_key(image, tmp_path):
    """In what was removed again too: a later layer hides it only."""
    images.buildah("push", "--disable-compression", image, f"dir:{tmp_path}/layers", seconds=600)
    layers = [path for path in (tmp_path / "layers").iterdir() if tarfile.is_tarfile(path)]
    names = set()
    for layer in layers:
        with tarfile.open(layer) as archive:
            for member in archive:
                names.add(member.name)
                if not (member.isfile() and member.name.startswith(("etc/", "home/", "root/"))):
                    continue
                assert b"PRIVATE KEY" not in archive.extractfile(member).read(), member.name
    shutil.rmtree(tmp_path / "layers")
    assert {"usr/sbin/sshd", "home/mpiuser"} <= names
    kept = re.compile(r"(^|/)(ssh_host_\w+|id_(rsa|dsa|ecdsa|ed25519)(\.pub)?|authorized_keys)$")
    assert not [name for name in names if kept.search(name)]


def test_a_hostfile_is_waited_for(bench, image, shared):
    (shared / "hostfile").write_text("localhost slots=2\n127.0.0.2 slots=2\n")
    settings = {"HVDLARGE_HOSTS_SECONDS": 1, "HVDLARGE_SSH_PORT": 2}
    for file, code, message in (
        ("/shared/hostfile", 1, "no answer on port 2 after 1 s from: 127.0.0.2"),
        ("/shared/none", 1, "there is no hostfile /shared/none"),
    ):
        environ = {**settings, "OMPI_MCA_orte_default_hostfile": file}
        ended = bench.run(image, "echo", "ran", environ=environ)
        assert (ended.code, ended.out) == (code, ""), ended.text
        assert message in ended.err


@pytest.fixture
def three_hosts(tmp_path):
    """Hosts with nothing but a network."""
    if reason := network.missing():
        pytest.skip(reason)
    with network.Hosts(tmp_path / "hosts", 3) as found:
        for host in found.hosts:
            host.stop_sshd()
        yield found.hosts


@pytest.fixture
def secret(tmp_path):
    """A key as the MPI operator makes and mounts it: of root, readable by all."""
    folder = tmp_path / "secret"
    folder.mkdir()
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", ""]
    subprocess.run([*command, "-f", folder / "id_rsa"], check=True)
    shutil.copy(folder / "id_rsa.pub", folder / "authorized_keys")
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder, "/home/mpiuser/.ssh"


def test_the_pods_of_the_mpijob_train_together(bench, image, shared, three_hosts, secret, tmp_path):
    """A launcher and two workers, the last of which comes late, with what docker/templates/mpijob.yaml starts in them."""
    job = yaml.safe_load((ROOT / "docker/templates/mpijob.yaml").read_text())
    launcher, worker = (
        job["spec"]["mpiReplicaSpecs"][kind]["template"]["spec"]["containers"][0]["args"]
        for kind in ("Launcher", "Worker")
    )
    launcher = ["2" if word == "8" else word for word in launcher]
    shutil.copy(ROOT / "jobs/digits.yaml", shared / "job.yaml")
    (tmp_path / "hostfile").write_text("b slots=1\nc slots=1\n")
    environ = {
        # Of the operator for Open MPI
        "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
        "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
        "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
        "OMPI_MCA_orte_set_default_slots": "1",
        # The three share the cores of one machine, which no process knows
        "OMPI_MCA_mca_base_env_list": "OMP_NUM_THREADS=1",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    a, b, c = three_hosts
    bench.begin(image, *worker, host=b, mounts=[secret])
    process = bench.begin(
        image,
        *launcher,
        *("run_dir=/shared/run", "epochs=4", "batch.growth.every_epochs=1"),
        host=a,
        mounts=[secret, (tmp_path / "hostfile", "/etc/mpi/hostfile")],
        environ=environ,
    )
    while "waiting" not in (said := process.stderr.readline()):
        assert process.poll() is None, said
    time.sleep(2)
    assert process.poll() is None
    bench.begin(image, *worker, host=c, mounts=[secret])
    ended = bench.end(process, 300)
    assert ended.code == 0, ended.text
    assert "2 workers on b:1,c:1" in ended.text
    found = summary(shared / "run")
    assert (found["epochs"], found["world_size"], found["growths"]) == (4, 2, 3)
    # A session has the PATH of the image, so that ranks of a plain mpirun are found too
    script = "echo $(uname -n) $(command -v hvdlarge)"
    said = bench.run(
        *(image, "mpirun", "-np", "2", "sh", "-c", script),
        host=a,
        mounts=[secret, (tmp_path / "hostfile", "/etc/mpi/hostfile")],
        environ=environ,
    )
    assert sorted(said.out.splitlines()) == [
        "b /opt/hvdlarge/bin/hvdlarge",
        "c /opt/hvdlarge/bin/hvdlarge",
    ], said.text
    environment = json.loads((shared / "run/environment.json").read_text())
    assert [place["host"] for place in environment["workers"]] == ["b", "c"]


def test_the_last_stage_of_the_gpu_image_compiles_models(bench, image, shared, tmp_path):
    """On the base of the other image, and with its Horovod: there is no CUDA here."""
    text = (ROOT / "docker/Dockerfile.gpu").read_text()
    last = text[text.index("FROM ${BASE_IMAGE}\n") :]
    file = tmp_path / "Dockerfile"
    assert last.count("--from=build ") == 1
    file.write_text("ARG BASE_IMAGE\n" + last.replace("--from=build ", f"--from={image} "))
    name = images.build(tmp_path, file, f"{images.IMAGE}-gpu-stage")
    ended = bench.run(name, "sh", "-c", "id -un; echo $NVIDIA_VISIBLE_DEVICES")
    assert ended.out == "mpiuser\nall\n", ended.text
    train = ["hvdlarge", "train", "digits", "epochs=1", "model.compile=true", "run_dir=/shared/run"]
    ended = bench.run(name, *train)
    assert ended.code == 0, ended.text
    assert summary(shared / "run")["steps"] == 45
    assert os.path.exists(shared / "run/checkpoints/last.pt")
