"""Several hosts: the main job on two and on three, a slow link, a host that is cut off, ssh that is refused, and another version on one host."""

import json
import shutil
import time

import torch
from support.launching import ROOT

SHORT = ["epochs=4", "batch.growth.every_epochs=1", "precision=fp64"]


def weights(folder, run="digits"):
    return torch.load(folder / "runs" / run / "checkpoints/last.pt", weights_only=True)["model"]


def distance(first, second):
    return max(
        float((first[name] - value).norm() / value.norm().clamp_min(1e-3))
        for name, value in second.items()
        if value.is_floating_point()
    )


def test_the_main_job_on_two_hosts(cluster):
    ended = cluster.train("a:1,b:1", "jobs/digits.yaml")
    assert ended.code == 0, ended.text
    summary = json.loads((cluster.folder / "runs/digits/summary.json").read_text())
    assert (summary["world_size"], summary["steps"], summary["growths"]) == (2, 524, 4)
    assert summary["accuracy"] >= 0.98
    found = json.loads((cluster.folder / "runs/digits/environment.json").read_text())
    assert [worker["host"] for worker in found["workers"]] == ["a", "b"]


def test_two_and_three_hosts_and_a_slow_link_give_the_same_weights(cluster):
    for run, places in (("two", "a:1,b:1"), ("three", "a:1,b:1,c:1")):
        ended = cluster.train(places, "jobs/digits.yaml", *SHORT, f"run_dir=runs/{run}")
        assert ended.code == 0, ended.text
    assert distance(weights(cluster.folder, "three"), weights(cluster.folder, "two")) < 1e-10
    with cluster["b"].slowed("20mbit"):
        ended = cluster.train("a:1,b:1", "jobs/digits.yaml", *SHORT, "run_dir=runs/slow")
    assert ended.code == 0, ended.text
    assert distance(weights(cluster.folder, "slow"), weights(cluster.folder, "two")) == 0


def test_a_host_that_is_cut_off_ends_the_run_which_goes_on_elsewhere(cluster):
    limits = ["timeouts.step_seconds=10", "timeouts.fetch_seconds=10", "checkpoint.every_steps=20"]
    job = ["jobs/digits.yaml", "precision=fp64", *limits]
    process = cluster.begin_training("a:1,b:1", *job)
    while not any((cluster.folder / "runs/digits/checkpoints").glob("step_*.pt")):
        assert process.poll() is None, cluster.end(process).text
        time.sleep(0.1)
    lost = cluster["b"]
    cut = time.monotonic()
    lost.cut()
    try:
        ended = cluster.end(process, 120)
        seconds = time.monotonic() - cut
    finally:
        lost.join()
    assert ended.code == 72, ended.text
    assert "in phase" in ended.text
    assert seconds < 60
    ended = cluster.train("a:1,c:1", *job)
    assert ended.code == 0, ended.text
    assert "resumed" in ended.text


def test_ssh_that_is_refused_is_named(cluster):
    refusing = cluster["b"]
    refusing.stop_sshd()
    try:
        ended = cluster.train("a:1,b:1", "jobs/digits.yaml")
    finally:
        refusing.start_sshd()
    assert ended.code != 0
    assert "connect to host b port 22: Connection refused" in ended.text
    assert not (cluster.folder / "runs").exists()


def test_another_version_on_one_host_is_refused_by_name(cluster):
    """The host sees another folder in the place of the package."""
    other = cluster.folder / "other"
    shutil.copytree(ROOT / "hvdlarge", other)
    text = (other / "__init__.py").read_text()
    (other / "__init__.py").write_text(text.replace('__version__ = "', '__version__ = "9.'))
    odd = cluster["b"]
    odd.run("mount", "--bind", other, ROOT / "hvdlarge")
    try:
        ended = cluster.train("a:1,b:1", "jobs/digits.yaml")
    finally:
        odd.run("umount", ROOT / "hvdlarge")
    assert ended.code == 71, ended.text
    assert len(ended.errors) == 1
    assert "versions" in ended.errors[0]
    assert '"9.0.1.0" on rank 1' in ended.errors[0]
