"""Run folders, checkpoints and what befalls them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.comparing import distance, same
from support.launching import MPIRUN, TRAIN

HERE = Path(__file__).parent
short = pytest.mark.short


def newest(bench, name="runs/faults"):
    return sorted((bench.run_folder(name) / "checkpoints").glob("step_*.pt"))


@pytest.fixture
def stopped(bench):
    """A run that stopped in its second epoch with some checkpoints."""
    ended = bench.run(2, FAULT="usr1@1:60")
    assert ended.fired
    assert ended.code == 75, ended.text
    assert len(newest(bench)) == 3
    return bench


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"hello"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "ten bytes more": lambda path: path.write_bytes(path.read_bytes() + bytes(10)),
    "one flipped bit": flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(stopped, undisturbed, damage):
    DAMAGES[damage](newest(stopped)[-1])
    before = int(newest(stopped)[-2].stem.removeprefix("step_"))
    ended = stopped.run(2)
    assert ended.code == 0, ended.text
    assert "note     skipped runs/faults/checkpoints/" in ended.text
    assert f"resuming from runs/faults/checkpoints/step_{before:09d}.pt" in ended.text
    assert same(stopped.checkpoint(), undisturbed(2))


@short
def test_a_run_without_any_whole_checkpoint_is_refused_and_nothing_is_lost(stopped):
    for path in newest(stopped):
        flip(path)
    files = {path: path.read_bytes() for path in newest(stopped)}
    ended = stopped.run(2)
    assert ended.code == 77, ended.text
    assert len(ended.errors) == 1
    assert ended.text.count("its SHA-256 differs from that in SHA256SUMS") == 3
    assert {path: path.read_bytes() for path in newest(stopped)} == files


@pytest.mark.parametrize("kind", ["missing", "empty", "garbage", "foreign"])
def test_a_run_whose_list_of_digests_is_lost_goes_on(stopped, kind):
    listing = stopped.run_folder() / "checkpoints" / "SHA256SUMS"
    if kind == "missing":
        listing.unlink()
    else:
        listing.write_bytes(
            {"empty": b"", "garbage": b"\xff\x00garbage", "foreign": b"0000  step_000000001.pt\n"}[
                kind
            ]
        )
    (stopped.run_folder() / "checkpoints" / "last.pt").unlink()
    ended = stopped.run(2)
    assert ended.code == 0, ended.text
    assert "skipped" not in ended.text


def test_a_flipped_bit_without_the_list_of_digests_is_detected(stopped):
    (stopped.run_folder() / "checkpoints" / "SHA256SUMS").unlink()
    flip(newest(stopped)[-1])
    ended = stopped.run(2)
    assert ended.code == 0, ended.text
    assert "skipped" in ended.text


class Evil:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def test_a_checkpoint_with_code_never_runs_it(stopped, monkeypatch):
    monkeypatch.chdir(stopped.folder)
    for path in newest(stopped):
        torch.save({"format": 1, "model": {}, "evil": Evil()}, path)
    (stopped.run_folder() / "checkpoints" / "SHA256SUMS").unlink()
    ended = stopped.run(2)
    assert ended.code == 77, ended.text
    assert not (stopped.folder / "hacked").exists()
    torch.load(
        newest(stopped)[-1], weights_only=False
    )  # the same file does run code where that is allowed
    assert os.path.exists("hacked")
    os.unlink("hacked")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("lr.base=5", "lr.base is 4.0 in the folder, 5.0 in this job"),
        ("optimizer={name: sgd}", 'optimizer.name is "lars" in the folder, "sgd" in this job'),
        ("batch.growth.max=128", "batch.growth.max is 64 in the folder, 128 in this job"),
        ("seed=9", "seed is 0 in the folder, 9 in this job"),
        (
            "model={name: 'faulty:Net', args: {hidden: 16}}",
            "model.args.hidden is null in the folder, 16 in this job",
        ),
        ("data={name: 'faulty:data', args: {size: 1000}}", "data.name is"),
        ("precision=fp64", 'precision is "fp32" in the folder, "fp64" in this job'),
    ],
)
def test_a_run_of_another_job_is_refused(stopped, change, words):
    ended = stopped.run(2, change)
    assert ended.code == 77, ended.text
    assert len(ended.errors) == 1
    assert words in ended.text
    assert stopped.run(2).code == 0


@short
def test_a_run_killed_before_its_first_checkpoint_begins_anew(bench, undisturbed):
    assert bench.run(2, FAULT="kill@1:3").code == 137
    assert newest(bench) == []
    refused = bench.run(2, "seed=9")
    assert refused.code == 77
    assert "seed is 0 in the folder, 9 in this job" in refused.text
    assert bench.run(2).code == 0
    assert same(bench.checkpoint(), undisturbed(2))


def test_another_model_under_the_same_name_is_refused(stopped):
    source = (stopped.folder / "faulty.py").read_text()
    (stopped.folder / "faulty.py").write_text(source.replace("hidden=32", "hidden=24"))
    ended = stopped.run(2)
    assert ended.code == 77, ended.text
    assert "in the model, " in ended.text


def test_a_data_set_of_another_size_is_refused(bench):
    first = bench.run(2, "data={name: 'faulty:data'}", FAULT="usr1@1:60")
    assert first.code == 75
    source = (bench.folder / "faulty.py").read_text()
    (bench.folder / "faulty.py").write_text(
        source.replace("def data(size=None)", "def data(size=1000)")
    )
    ended = bench.run(2, "data={name: 'faulty:data'}")
    assert ended.code == 77, ended.text
    assert "training samples is 1437 in the folder, 1000 in this job" in ended.text


def test_changes_that_are_allowed_are_recorded(stopped):
    ended = stopped.run(
        3,
        "epochs=2.5",
        "checkpoint.every_steps=20",
        "log.every_steps=5",
        "evaluate.every_epochs=0.5",
    )
    assert ended.code == 0, ended.text
    starts = (stopped.run_folder() / "starts.jsonl").read_text()
    assert "epochs changes from 2 to 2.5" in starts
    assert "the number of workers changes from 2 to 3" in starts
    ended = stopped.run(3, "epochs=2.5", "checkpoint.every_steps=20")
    assert ended.code == 0
    assert "already finished" in ended.text


@pytest.mark.parametrize("workers", [None, 2, 3])
@pytest.mark.parametrize(
    ("epochs", "pass_of_stop"), [(2, 44), (0.23, 10)], ids=["longer", "shorter"]
)
def test_a_run_stopped_near_its_end_and_given_another_length_is_the_undisturbed_run_of_that_length(
    bench, workers, epochs, pass_of_stop
):
    """Of 45 steps it takes 44, or 10; the last step of either length is decided by then, and is another one in the other length."""
    arguments = ["lr.warmup={policy: none}", "batch.micro=16" if workers != 3 else "batch.micro=8"]
    fault = f"usr1@0:{2 * pass_of_stop}" if workers is None else f"usr1@1:{pass_of_stop}"
    stopped = bench.run(workers, *arguments, "epochs=1", FAULT=fault)
    assert stopped.fired
    assert stopped.code == 75, stopped.text
    assert bench.checkpoint()["progress"]["step"] == pass_of_stop
    ended = bench.run(workers, *arguments, f"epochs={epochs}", FAULT="")
    assert ended.code == 0, ended.text
    assert f"epochs changes from 1 to {epochs}" in ended.text
    assert (
        bench.run(workers, *arguments, f"epochs={epochs}", "run_dir=runs/whole", FAULT="").code == 0
    )
    assert same(bench.checkpoint(), bench.checkpoint("runs/whole"))
    folders = [bench.run_folder(name) for name in ("runs/faults", "runs/whole")]
    ours, theirs = ((folder / "decisions.jsonl").read_text() for folder in folders)
    assert ours == theirs
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    for key in ("steps", "samples_seen", "epochs", "loss", "accuracy", "global_batch"):
        assert ours[key] == theirs[key], key


def test_a_run_with_exponential_decay_may_be_lengthened(bench):
    arguments = ["lr.decay={policy: exponential}"]
    assert bench.run(2, *arguments, FAULT="usr1@1:60").code == 75
    ended = bench.run(2, *arguments, "epochs=2.5")
    assert ended.code == 0, ended.text
    assert "epochs changes from 2 to 2.5" in ended.text


def test_a_finished_run_is_left_alone_and_fresh_sets_it_aside(bench):
    assert bench.run(2, "epochs=0.5").code == 0
    before = (bench.run_folder() / "summary.json").read_bytes()
    ended = bench.run(3, "epochs=0.5")
    assert ended.code == 0
    assert "already finished" in ended.text
    assert (bench.run_folder() / "summary.json").read_bytes() == before
    assert bench.run(2, "epochs=0.5", "--fresh").code == 0
    assert (bench.folder / "runs/faults.1/summary.json").read_bytes() == before


@short
def test_a_full_disk_leaves_the_last_checkpoint_alone(bench):
    """A limit on the size of files stands for the full disk: the write fails in its middle."""
    big = "model={name: 'faulty:Net', args: {hidden: 400}}"
    ended = bench.run(2, big, FAULT="limit@0:33")
    assert ended.fired
    assert ended.code == 74, ended.text
    assert len(ended.errors) == 1
    assert "step_000000040.pt could not be written" in ended.text
    assert "bytes are free there; the last good one is untouched" in ended.text
    assert "Traceback" not in ended.text
    assert newest(bench)[-1].name == "step_000000030.pt"
    assert newest(bench)[-1].stat().st_size > 1_000_000
    again = bench.run(2, big)
    assert again.code == 0, again.text
    assert "resuming from runs/faults/checkpoints/step_000000030.pt" in again.text


@pytest.fixture
def small_disk(bench):
    """A file system of its own with some megabytes; only root may make one."""
    place = bench.folder / "small"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"this user cannot make a small file system: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(place):
    """Take what is free, up to the last byte."""
    with (place / "filler").open("wb", buffering=0) as file:
        for size in (65536, 1):
            while True:
                try:
                    file.write(bytes(size))
                except OSError:
                    break


def test_a_disk_that_fills_up_ends_the_run_and_loses_nothing(bench, small_disk):
    """Logs and checkpoints alike: one message, nothing that was whole is lost, and with room again the run goes on."""
    arguments = ["epochs=4", "log.every_steps=1", "run_dir=small/run"]
    whole = bench.run(2, "epochs=4", "log.every_steps=1", "run_dir=runs/whole")
    assert whole.code == 0, whole.text
    process = bench.begin(
        2, *arguments, FAULT="freeze@1:40"
    )  # some seconds in which the disk can be filled
    bench.until(lambda: list(bench.folder.glob("fired-*")))
    fill(small_disk)
    ended = bench.end(process)
    assert ended.code == 74, ended.text
    assert len(ended.errors) == 1, ended.text
    assert "No space left on device); 0 bytes are free there" in ended.text
    assert "Traceback" not in ended.text
    again = bench.run(2, *arguments)  # still full
    assert again.code == 74, again.text
    assert len(again.errors) == 1, again.text
    (small_disk / "filler").unlink()
    last = bench.run(2, *arguments)
    assert last.code == 0, last.text
    assert "resuming from small/run/checkpoints/step_" in last.text
    assert same(bench.checkpoint("small/run"), bench.checkpoint("runs/whole"))
    lines = [
        (bench.run_folder(name) / "decisions.jsonl").read_text()
        for name in ("small/run", "runs/whole")
    ]
    assert lines[0] == lines[1]


def test_a_slow_disk_is_no_alarm(bench):
    """Writing a checkpoint takes three times as long as a step may."""
    ended = bench.run(2, "timeouts.step_seconds=5", "epochs=1", FAULT="slowdisk@0:25")
    assert ended.fired
    assert ended.code == 0, ended.text
    assert ended.seconds > 15
    assert not ended.errors


def test_a_run_folder_that_cannot_be_made_is_refused(bench):
    (bench.folder / "file").write_text("")
    ended = bench.run(2, "run_dir=file/below")
    assert ended.code == 2, ended.text
    assert len(ended.errors) == 1
    assert "cannot be" in ended.text


@short
def test_a_second_run_of_the_same_folder_is_refused(bench):
    process = bench.begin(2, "epochs=2000")
    bench.until(bench.has_checkpoint)
    second = bench.begin(None, "epochs=2000")  # without a launcher: the lock does not care
    assert second.wait(timeout=600) == 2
    assert "is in use by process" in (bench.folder / "log1").read_text()
    process.send_signal(signal.SIGUSR1)
    assert bench.end(process).code == 75


def test_the_lock_of_a_killed_run_is_gone_with_it(bench):
    process = bench.begin(2, "epochs=2000")
    bench.until(bench.has_checkpoint)
    bench.stop(process)
    assert bench.run(2, "epochs=2000", "stop_after_minutes=0.05").code == 75


def test_a_run_folder_that_only_rank_0_sees_is_enough(bench):
    """Rank 1 works in another folder, as on a host that does not share the disk."""
    elsewhere = bench.folder / "elsewhere"
    elsewhere.mkdir()
    for name in ("faulty.py", "job.yaml"):
        (elsewhere / name).write_bytes((bench.folder / name).read_bytes())

    def launch(*arguments):
        return [
            *MPIRUN,
            "-np",
            "1",
            *TRAIN,
            "job.yaml",
            *arguments,
            ":",
            "-np",
            "1",
            "-wdir",
            str(elsewhere),
        ]

    first = bench.run(1, "epochs=1", launch=launch("epochs=1"), FAULT="usr1@0:30")
    assert first.code == 75, first.text
    again = bench.run(1, "epochs=1", launch=launch("epochs=1"), FAULT="")
    assert again.code == 0, again.text
    assert not (elsewhere / "runs/faults/checkpoints").exists()
    assert bench.run(2, "epochs=1", "run_dir=runs/whole").code == 0
    assert same(bench.checkpoint(), bench.checkpoint("runs/whole"))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_run_resumed_on_another_number_of_workers_ends_the_same(bench, workers):
    arguments = ["precision=fp64"]
    assert bench.run(4, *arguments, FAULT="usr1@0:10").code == 75
    ended = bench.run(workers, *arguments)
    assert ended.code == 0, ended.text
    assert f"the number of workers changes from 4 to {workers}" in ended.text
    whole = bench.run(2, "run_dir=runs/whole", *arguments)
    assert whole.code == 0
    assert 0 < distance(bench.checkpoint(), bench.checkpoint("runs/whole")) + 1e-300 < 1e-12
    ours, theirs = (
        (bench.run_folder(name) / "decisions.jsonl").read_text()
        for name in ("runs/faults", "runs/whole")
    )
    assert ours == theirs


@pytest.mark.parametrize("at", [1, 2, 13, 44, 45, 46, 60])
def test_a_run_resumed_from_any_step_on_three_workers_is_identical(bench, undisturbed, at):
    """The first step, inside the warmup, around the growth after step 45, and the second epoch; three workers are the worst case."""
    arguments = ["batch.micro=8"]
    ended = bench.run(3, *arguments, FAULT=f"usr1@1:{at}")
    assert ended.fired
    assert ended.code == 75, ended.text
    assert bench.run(3, *arguments).code == 0
    assert same(bench.checkpoint(), undisturbed(3, *arguments))


@pytest.mark.parametrize("name", ["lamb", "sgd", "adam", "adagrad", "rmsprop"])
def test_the_state_of_every_optimizer_comes_back(bench, name):
    arguments = [f"optimizer={{name: {name}}}", "lr.base=0.002"]
    assert bench.run(2, *arguments, FAULT="usr1@1:60").code == 75
    assert bench.run(2, *arguments).code == 0
    assert bench.run(2, *arguments, "run_dir=runs/whole").code == 0
    assert same(bench.checkpoint(), bench.checkpoint("runs/whole"))


def test_the_loss_scale_comes_back(bench):
    """An overflow on one rank halves it on all; the run that is stopped afterwards goes on with it."""
    assert bench.run(2, "precision=fp16", "run_dir=runs/whole", FAULT="inf@0:30").code == 0
    (bench.folder / "fired-inf-0-30").unlink()
    assert bench.run(2, "precision=fp16", FAULT="inf@0:30 usr1@1:60").code == 75
    kept = bench.checkpoint()["state"]
    assert kept["skipped"] >= 1
    assert kept["loss_scale"] == 2.0 ** (16 - kept["skipped"])
    assert bench.run(2, "precision=fp16").code == 0
    assert same(bench.checkpoint(), bench.checkpoint("runs/whole"))


@short
def test_runs_killed_at_random_moments_are_identical():
    done = subprocess.run(
        [
            sys.executable,
            HERE.parents[1] / "trials" / "kill_trial.py",
            "--runs",
            "3",
            "--seed",
            "5",
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agree 3" in done.stdout


def test_runs_killed_and_resumed_on_other_workers_end_the_same():
    done = subprocess.run(
        [
            sys.executable,
            HERE.parents[1] / "trials" / "kill_trial.py",
            "--runs",
            "3",
            "--seed",
            "6",
            "--change-workers",
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
