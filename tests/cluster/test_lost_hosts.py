"""A host that is lost in the middle of a run: what ends the run on every host, when, and how it goes on with the others."""

import re
import shutil
import sys

import pytest
from support.cluster import JOB, distance, used_hosts, weights
from support.launching import TRAIN

LONG = [*JOB, "epochs=200"]
# mpirun notices after 8 s that a host does not answer: before the job's limits, which are minutes
KEEPALIVE = {
    f"OMPI_MCA_oob_tcp_keepalive_{name}": value
    for name, value in {"time": "5", "intvl": "1", "probes": "3"}.items()
}
# For --hosts-command: those hosts that answer, with one slot each
REACHABLE = """\
for host in "$@"; do
    ssh -o ConnectTimeout=2 $host true && echo $host
done
exit 0
"""


def wait_for_a_checkpoint(cluster, process):
    def saved():
        assert process.poll() is None, cluster.text()
        return any((cluster.folder / "runs/digits/checkpoints").glob("step_*.pt"))

    cluster.seconds_until(saved, 60)


def ended(process):
    return lambda: process.poll() is not None


def test_ranks_end_by_their_limits_and_a_launcher_that_waits_is_killed(cluster, undisturbed):
    limits = ["timeouts.step_seconds=4", "timeouts.fetch_seconds=4"]
    process = cluster.begin_training("a:1,b:1", *JOB, *limits)
    wait_for_a_checkpoint(cluster, process)
    lost, notes = cluster["b"], cluster.folder / "runs/digits/progress"
    cluster.seconds_until((notes / "rank_1.json").exists, 5)  # rank 0 removes those of earlier runs
    with lost.off_the_network():
        lost.run("mount", "-t", "tmpfs", "tmpfs", notes)  # a shared folder is lost too
        # n · (step_seconds + fetch_seconds) with 1 or 2 micro-batches, and 30 s for mpirun to end
        seconds = cluster.seconds_until(ended(process), 50)
        assert process.returncode in (137, -9)
        assert re.search(r"rank 0 \(a\) has waited (8|16) s in phase allreduce", cluster.text())
        assert "rank 1 (b) was last seen" in cluster.text()
        assert seconds > 30  # else mpirun has ended by itself, and this test has no purpose
        # The same on the host that was cut off; ssh needs 15 s to notice
        cluster.seconds_until(lambda: not cluster.left(), 10)
        lost.run("umount", notes)
    shutil.copytree(cluster.folder / "runs/digits", cluster.folder / "runs/alone")
    for run, places in (("digits", "a:1,c:1"), ("alone", "a:1")):
        done = cluster.train(places, *JOB, f"run_dir=runs/{run}")
        assert done.code == 0, done.text
        assert "resuming from" in done.text
    assert distance(weights(cluster.folder), undisturbed) == 0
    assert distance(weights(cluster.folder, "alone"), undisturbed) < 1e-10


@pytest.mark.parametrize("how", ["cut off", "powered off"])
def test_mpirun_notices_a_lost_host(cluster, how):
    process = cluster.begin(
        *cluster.mpirun("-np", 2, "--host", "a:1,b:1"), *TRAIN, *LONG, **KEEPALIVE
    )
    wait_for_a_checkpoint(cluster, process)
    if how == "cut off":
        with cluster["b"].off_the_network():
            cluster.seconds_until(ended(process), 20)
            cluster.seconds_until(lambda: not cluster.left(), 15)
    else:
        cluster["b"].end_runs()  # its connections are closed
        cluster.seconds_until(ended(process), 8)
    # Of the connection to mpirun's daemon, or that of ssh
    assert process.returncode in ((205,) if how == "cut off" else (205, 255)), cluster.text()
    assert "on node b" in cluster.text() or "Connection to b closed" in cluster.text()


@pytest.mark.parametrize("listed", ["a b c", "b c"])
def test_launch_goes_on_with_the_hosts_that_are_left(cluster, undisturbed, listed):
    """From host a; of b and c alone rank 0 is on the host that is cut off."""
    (cluster.folder / "reachable.sh").write_text(REACHABLE)
    options = [
        "--hosts-command",
        f"sh reachable.sh {listed}",
        "--mpirun",
        " ".join(cluster.mpirun()),
    ]
    command = [sys.executable, "-m", "hvdlarge.launch", "-np", "3", *options, *JOB]
    process = cluster.begin(*command, **KEEPALIVE)
    wait_for_a_checkpoint(cluster, process)
    with cluster["b"].off_the_network():
        cluster.seconds_until(ended(process), 60)
    text = cluster.text()
    assert process.returncode == 0, text
    assert "launch: exit code 205; restart 1 from the last checkpoint" in text
    left = [host for host in listed.split() if host != "b"]
    assert f"launch: {len(left)} workers on {','.join(f'{host}:1' for host in left)}" in text
    assert "resuming from" in text
    assert used_hosts(cluster) == left
    assert distance(weights(cluster.folder), undisturbed) < 1e-10
