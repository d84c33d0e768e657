"""The main job on several hosts, by every launcher; a slow link; hosts that are not alike; hosts that are lost."""

import json
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from support.cluster import JOB, distance, used_hosts, weights
from support.launching import ROOT, TRAIN


@pytest.mark.short
def test_a_short_run_on_two_hosts(cluster):
    ended = cluster.train("a:1,b:1", "jobs/digits.yaml", "epochs=1", "batch.growth={policy: none}")
    assert ended.code == 0, ended.text
    assert "2 workers on 2 hosts by Open MPI" in ended.text
    assert used_hosts(cluster) == ["a", "b"]


def test_the_main_job_by_horovodrun(cluster):
    """README's command, with hosts; horovodrun itself reaches them by ssh."""
    launch = ["horovodrun", "-np", 2, "-H", "a:1,b:1"]
    process = cluster.begin(*launch, *TRAIN, "jobs/digits.yaml", HOME=str(cluster.folder))
    ended = cluster.end(process)
    assert ended.code == 0, ended.text
    summary = json.loads((cluster.folder / "runs/digits/summary.json").read_text())
    assert (summary["world_size"], summary["steps"], summary["growths"]) == (2, 524, 4)
    assert summary["accuracy"] >= 0.98
    assert used_hosts(cluster) == ["a", "b"]


def test_the_template_for_a_hostfile(cluster):
    (cluster.folder / "hosts").write_text("# two hosts\na slots=1\nb   slots=2\n")
    process = cluster.begin(
        ROOT / "docker/templates/hostfile.sh", "hosts", *JOB, HVDLARGE_PYTHON=sys.executable
    )
    ended = cluster.end(process)
    assert ended.code == 0, ended.text
    assert used_hosts(cluster) == ["a", "b", "b"]


def test_three_hosts_and_a_slow_link_give_the_same_weights(cluster, undisturbed):
    ended = cluster.train("a:1,b:1,c:1", *JOB, "run_dir=runs/three")
    assert ended.code == 0, ended.text
    assert distance(weights(cluster.folder, "three"), undisturbed) < 1e-10
    with cluster["b"].slowed("20mbit"):
        ended = cluster.train("a:1,b:1", *JOB, "run_dir=runs/slow")
    assert ended.code == 0, ended.text
    assert distance(weights(cluster.folder, "slow"), undisturbed) == 0


def test_ssh_that_is_refused_is_named(cluster):
    refusing = cluster["b"]
    refusing.stop_sshd()
    try:
        ended = cluster.train("a:1,b:1", *JOB)
    finally:
        refusing.start_sshd()
    assert ended.code == 255
    assert "connect to host b port 22: Connection refused" in ended.text
    assert not (cluster.folder / "runs").exists()


def test_a_host_that_is_cut_off_at_the_start_is_named(cluster):
    absent = cluster["b"]
    with absent.off_the_network():
        seconds = cluster.seconds_until(cluster.begin_training("a:1,b:1", *JOB).poll, 30)
    assert seconds < 20
    assert "connect to host b port 22: " in cluster.text()
    assert not (cluster.folder / "runs").exists()


@pytest.mark.parametrize("package", ["hvdlarge", "torch"])
def test_another_version_on_one_host_is_refused_by_name(cluster, package):
    """The host sees another file in the place of the one that has the version."""
    if package == "torch":
        file, key = Path(distribution("torch").locate_file("")), "\nVersion: "
        file = file / f"torch-{distribution('torch').version}.dist-info/METADATA"
    else:
        file, key = ROOT / "hvdlarge/__init__.py", '__version__ = "'
    other = cluster.folder / "other"
    other.write_text(file.read_text().replace(key, f"{key}9.", 1))
    odd = cluster["b"]
    odd.run("mount", "--bind", other, file)
    try:
        ended = cluster.train("a:1,b:1", *JOB)
    finally:
        odd.run("umount", file)
    assert ended.code == 71, ended.text
    assert len(ended.errors) == 1
    assert f"the ranks do not have the same versions: {package} is " in ended.errors[0]
    assert '"9.' in ended.errors[0]
    assert "on rank 1" in ended.errors[0]


def test_a_host_without_the_run_folder(cluster, undisturbed):
    """Only the job file is there too; rank 0 alone needs the folder."""
    lone = cluster["b"]
    lone.run("mount", "-t", "tmpfs", "tmpfs", cluster.folder)
    try:
        lone.run("cp", "-r", ROOT / "jobs", cluster.folder)
        ended = cluster.train("a:1,b:1", *JOB)
    finally:
        lone.run("umount", cluster.folder)
    assert ended.code == 0, ended.text
    assert distance(weights(cluster.folder), undisturbed) == 0
