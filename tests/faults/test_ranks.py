"""Ranks that die, hang, disagree or compute what is not finite."""

import os
import re
import signal
import time
from collections import Counter

import pytest
from support.comparing import distance, read_lines, same
from support.launching import MPIRUN, TRAIN

short = pytest.mark.short  # part of `make test`; the others run with `make test-faults`


# --- C: a rank dies


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("kind", "code"), [pytest.param("kill", 137, marks=short), ("segv", 139), ("abort", 134)]
)
def test_a_killed_rank_ends_the_run_and_a_restart_goes_on(bench, undisturbed, kind, code, victim):
    ended = bench.run(2, FAULT=f"{kind}@{victim}:25")
    assert ended.fired
    assert ended.code == code, ended.text
    assert bench.has_checkpoint()
    if victim == 1:
        again = bench.run(2)
        assert again.code == 0, again.text
        assert same(bench.checkpoint(), undisturbed(2))


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize(
    ("kind", "words"), [("raise", "RuntimeError: made to fail"), ("exit0", "SystemExit")]
)
def test_a_rank_that_raises_ends_the_run_with_one_traceback(bench, kind, words, workers):
    ended = bench.run(workers, FAULT=f"{kind}@1:25")
    assert ended.fired
    assert ended.code == 70, ended.text
    assert len(ended.errors) == 1, ended.text
    assert f"in your own code, on rank 1 of {workers}" in ended.errors[0]
    assert words in ended.errors[0]
    assert ended.text.count("Traceback") == 1
    assert bench.has_checkpoint()


@pytest.mark.parametrize(
    ("fault", "where", "change"),
    [
        (
            "memory@1:25",
            "step 24, with micro-batches of 16 samples",
            "batch.micro lower, e.g. to 8",
        ),
        (
            "pymemory@1:25",
            "step 24, with micro-batches of 16 samples",
            "batch.micro lower, e.g. to 8",
        ),
        (
            "eval-memory@1:45",
            "an evaluation of 104 samples at once",
            "set evaluate.micro_batch lower",
        ),
    ],
)
def test_memory_that_runs_out_is_reported_with_what_to_change(bench, fault, where, change):
    ended = bench.run(2, FAULT=fault)
    assert ended.fired
    assert ended.code == 70, ended.text
    assert len(ended.errors) == 1, ended.text
    assert "hvdlarge: error: rank 1 of 2" in ended.errors[0]
    assert f"out of memory in {where}" in ended.errors[0]
    assert change in ended.errors[0]
    assert "Traceback" not in ended.text
    assert bench.has_checkpoint()


def test_a_rank_that_leaves_early_with_0_is_a_failure(bench):
    ended = bench.run(2, FAULT="osexit@1:25")
    assert ended.fired
    assert ended.code != 0


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("kind", "words"), [("raise", "sample 77 is corrupt"), ("kill", "")])
def test_a_data_set_that_fails_ends_the_run_with_one_error(bench, kind, words, num_workers):
    if kind == "kill" and num_workers == 0:
        pytest.skip("a rank that is killed has a test of its own")
    ended = bench.run(
        2, f"data={{name: 'faulty:data', num_workers: {num_workers}}}", DATA_FAULT=kind
    )
    assert ended.fired
    assert ended.code == 70, ended.text
    assert len(ended.errors) == 1, ended.text
    assert words in ended.text


def test_a_killed_launcher_leaves_no_rank_running(bench):
    process = bench.begin(2, "epochs=50")
    bench.until(bench.has_checkpoint)
    ranks = bench.ranks()
    assert len(ranks) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 6
    while (
        left := [pid for pid in ranks if os.path.exists(f"/proc/{pid}")]
    ) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    assert bench.run(2, "epochs=50", "stop_after_minutes=0.05").code == 75


# --- D: a rank hangs


@pytest.mark.parametrize("kind", ["sleep", pytest.param("stop", marks=short), "lock"])
def test_a_rank_that_hangs_ends_the_run_with_its_stacks(bench, kind):
    limits = ["timeouts.step_seconds=6", "timeouts.fetch_seconds=2"]
    ended = bench.run(2, *limits, FAULT=f"{kind}@1:25")
    assert ended.fired
    assert ended.code == 72, ended.text
    # The rank itself where it can, else the one that waits for its gradients
    assert f"the limit is {6 if kind == 'sleep' else 8} s" in ended.text
    assert "the stacks of this rank:" in ended.text
    assert ended.seconds < 60


@pytest.mark.parametrize("kind", ["sleep", "lock"])
def test_a_hook_that_blocks_is_named(bench, kind):
    hook = ["timeouts.step_seconds=6", "hooks=['faulty:Hook']"]
    ended = bench.run(2, *hook, FAULT=f"hook-{kind}@1:25")
    assert ended.fired
    assert ended.code == 72, ended.text
    assert re.search("in phase (waiting for )?hook faulty:Hook of step 25", ended.text)


def test_a_hook_that_raises_ends_the_run_as_a_wrong_job(bench):
    ended = bench.run(2, "hooks=['faulty:Hook']", FAULT="hook-raise@1:25")
    assert ended.fired
    assert ended.code == 2, ended.text
    assert len(ended.errors) == 1, ended.text
    words = (
        r"on rank 1: hooks: faulty:Hook: after_step raises RuntimeError: made to fail \(.*faulty.py"
    )
    assert re.search(words, ended.errors[0])
    assert bench.has_checkpoint()


def test_a_data_set_that_blocks_ends_the_run(bench):
    limits = ["timeouts.step_seconds=6", "timeouts.fetch_seconds=6"]
    ended = bench.run(2, "data={name: 'faulty:data'}", "epochs=4", *limits, DATA_FAULT="block")
    assert ended.fired
    assert ended.code == 72, ended.text
    assert "in phase" in ended.text


def test_a_rank_may_wait_for_its_data_longer_than_a_step_takes(bench):
    """The other rank waits for its gradients meanwhile."""
    limits = ["timeouts.step_seconds=5", "timeouts.fetch_seconds=60"]
    ended = bench.run(2, "data={name: 'faulty:data'}", *limits, DATA_FAULT="slow")
    assert ended.fired
    assert ended.code == 0, ended.text
    assert not ended.errors


def test_a_rank_that_never_starts_ends_the_run(bench):
    """One rank sleeps before it comes to MPI; the others wait for it in MPI's own start."""
    (bench.folder / "sleeper.py").write_text(
        "import time\nopen('fired-sleeper', 'w').close()\ntime.sleep(600)\n"
    )
    launch = [*MPIRUN, "-np", "1", TRAIN[0], "sleeper.py", ":", "-np", "1"]
    ended = bench.run(1, "timeouts.start_seconds=8", launch=launch)
    assert ended.fired
    assert ended.code == 72, ended.text
    assert len(ended.errors) == 1, ended.text
    assert "has made no progress for 8 s in phase start" in ended.text
    assert ended.seconds < 30


def test_a_slow_start_is_no_alarm(bench):
    ended = bench.run(2, "epochs=0.5", FAULT="build-slow@1:0")
    assert ended.fired
    assert ended.code == 0, ended.text


def test_a_pause_of_all_ranks_changes_nothing(bench, undisturbed):
    ended = bench.run(2, FAULT="freeze@1:25")
    assert ended.fired
    assert ended.code == 0, ended.text
    assert same(bench.checkpoint(), undisturbed(2))


def test_exact_mode_is_identical_however_horovod_fuses(bench):
    """The user's own threshold is kept, and does not change a bit."""
    arguments = ["reduction=exact", "epochs=1"]
    ended = bench.run(4, *arguments, HOROVOD_FUSION_THRESHOLD="67108864")
    assert ended.code == 0, ended.text
    assert "HOROVOD_FUSION_THRESHOLD=0" not in ended.text
    assert bench.run(None, "run_dir=runs/alone", *arguments).code == 0
    assert same(bench.checkpoint(), bench.checkpoint("runs/alone"))


def test_a_stall_shutdown_before_the_stall_check_is_corrected_and_reported(bench):
    ended = bench.run(2, "epochs=0.5", HOROVOD_STALL_SHUTDOWN_TIME_SECONDS="40")
    assert ended.code == 0, ended.text
    assert "HOROVOD_STALL_CHECK_TIME_SECONDS=40" in ended.text


# --- E: ranks disagree


@short
def test_a_gradient_missing_on_one_rank_ends_the_run(bench):
    ended = bench.run(2, FAULT="nograd@1:25")
    assert ended.fired
    assert ended.code == 71, ended.text
    assert len(ended.errors) == 1
    assert "disagree about the set of gradients" in ended.errors[0]
    assert bench.has_checkpoint()


def test_ranks_with_models_of_other_shapes_are_refused(bench):
    ended = bench.run(2, "model={name: 'faulty:Net', args: {shape_by_rank: true}}")
    assert ended.code == 71, ended.text
    assert len(ended.errors) == 1
    assert ended.seconds < 40


@short
def test_weights_that_change_on_one_rank_are_detected(bench):
    ended = bench.run(2, FAULT="drift@1:25")
    assert ended.fired
    assert ended.code == 71, ended.text
    assert len(ended.errors) == 1
    assert "head.weight" in ended.errors[0]
    assert bench.checkpoint()["progress"]["step"] <= 25  # nothing was saved after the drift


def test_a_buffer_that_changes_on_one_rank_is_detected(bench):
    ended = bench.run(2, FAULT="bufferdrift@1:25")
    assert ended.fired
    assert ended.code == 71, ended.text
    assert len(ended.errors) == 1
    assert "gain" in ended.errors[0]
    assert bench.checkpoint()["progress"]["step"] <= 25


# --- F: numbers


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_non_finite_value_on_one_rank_stops_all(bench, kind):
    ended = bench.run(2, FAULT=f"{kind}@1:25")
    assert ended.fired
    assert ended.code == 73, ended.text
    assert len(ended.errors) == 1
    assert "is not finite at step 24" in ended.errors[0]
    assert bench.checkpoint()["progress"]["step"] == 20


@short
def test_a_non_finite_step_is_skipped_on_every_rank(bench):
    ended = bench.run(
        2, "on_nonfinite={policy: skip, limit: 2}", "precision=fp64", FAULT="nan@1:25 inf@0:31"
    )
    assert len(ended.fired) == 2
    assert ended.code == 0, ended.text
    found = bench.checkpoint()
    assert found["state"]["skipped"] == 2
    assert all(value.isfinite().all() for value in found["model"].values())
    alone = bench.run(
        None,
        "on_nonfinite={policy: skip, limit: 2}",
        "precision=fp64",
        "run_dir=runs/alone",
        FAULT="",
    )
    assert alone.code == 0
    assert distance(found, bench.checkpoint("runs/alone")) > 1e-6  # the two steps are missing


def test_too_many_non_finite_steps_end_the_run(bench):
    ended = bench.run(2, "on_nonfinite={policy: skip, limit: 1}", FAULT="nan@1:25 inf@0:27")
    assert len(ended.fired) == 2
    assert ended.code == 73, ended.text
    assert "1 such steps have been skipped already" in ended.text


def test_a_non_finite_step_rolls_the_run_back_to_a_lower_rate(bench):
    ended = bench.run(2, "on_nonfinite={policy: rollback, lr_factor: 0.25}", FAULT="nan@1:25")
    assert ended.fired
    assert ended.code == 0, ended.text
    assert "back to step 20, the learning rate is multiplied by 0.25" in ended.text
    found = bench.checkpoint()
    assert (found["state"]["rolled_back"], found["progress"]["lr_factor"]) == (1, 0.25)


def test_a_skipped_step_whose_loss_is_logged_does_not_end_the_run(bench):
    ended = bench.run(2, "on_nonfinite={policy: skip}", "log.every_steps=1", FAULT="nan@1:25")
    assert ended.fired
    assert ended.code == 0, ended.text
    logged = {
        line["step"]: line["loss"]
        for line in read_lines(bench.run_folder() / "metrics.jsonl")
        if "loss" in line
    }
    assert [step for step, loss in logged.items() if loss == "nan"] == [24]


def test_rollbacks_are_bounded(bench):
    faults = " ".join(f"nan@1:{at}" for at in (25, 30, 36, 43, 50))
    ended = bench.run(2, "on_nonfinite={policy: rollback, limit: 2}", FAULT=faults)
    assert len(ended.fired) >= 3
    assert ended.code == 73, ended.text
    assert "rolled back 2 times already" in ended.text


def test_a_rate_that_overflows_is_refused_at_the_start(bench):
    ended = bench.run(2, "lr.base=1e308", "lr.scaling=linear", "batch.base=1", "batch.micro=1")
    assert ended.code == 2, ended.text
    assert "the lr is inf in stage 1 (global batch 2)" in ended.text


# --- I: data


def test_every_sample_is_used_once_in_each_epoch(bench):
    """Over uneven workers, a growth inside an epoch, a stop and another number of workers."""
    job = [
        "data={name: 'faulty:data'}",
        "epochs=3",
        "batch.base=50",
        "batch.growth={policy: adabatch, at_epochs: [1.4], max: 130}",
    ]
    job = [*job, "batch.micro=8", "lr.warmup.epochs=0.1", "evaluate.every_epochs=3"]
    ended = bench.run(3, *job, FAULT="usr1@2:130", LOG_SAMPLES="samples")
    assert ended.fired
    assert ended.code == 75, ended.text
    assert bench.run(2, *job, LOG_SAMPLES="samples").code == 0
    used = Counter((bench.folder / "samples").read_text().split())
    assert len(used) == 1437
    assert set(used.values()) == {3}
