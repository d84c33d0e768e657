"""Run folders as they are found: going on, cut off, resumed, damaged, foreign, and long."""

import json
import time
import tracemalloc

import pytest
from support.report_runs import BEGAN, LAYERS, START, write_report_run

import hvdlarge
from hvdlarge.exits import JobError
from hvdlarge.reporting.derived import derive, fits_of
from hvdlarge.reporting.jsonl import LONGEST_LINE, JsonLines
from hvdlarge.reporting.metrics_log import DecisionsLog, MetricsLog, Start
from hvdlarge.reporting.run_reader import RunRecords, find_run, find_runs
from hvdlarge.reporting.targets import parse_target


def read(folder, *targets):
    run = RunRecords(folder, folder.name, [parse_target(target) for target in targets])
    run.update()
    return run


def metrics_of(lines, starts=()):
    log = MetricsLog(starts, (), {})
    for line in lines:
        log.add(line)
    return log


def step_line(step, **more):
    return {"step": step, "epoch": (step + 1) / 10, "samples_seen": 32 * (step + 1), "lr": 0.1,
            "global_batch": 32, "loss": 1.0, "forward_seconds": 2.0, "backward_seconds": 3.0} | more  # fmt: skip


def test_a_run_with_every_kind_of_line(tmp_path):
    figures = derive(read(write_report_run(tmp_path / "run"), "accuracy=0.9", "accuracy>=2"))
    assert (figures["state"], figures["updates"], figures["notes"]) == ("finished", 400, [])
    assert [line[:48] for line in figures["missing"]] == [
        "The gradient noise scale is not available in 2 o"
    ]
    assert [each["global_batch"] for each in figures["stages"]] == [32, 64, 128]
    assert [each["steps"] for each in figures["stages"]] == [134, 133, 133]
    assert figures["stages"][1]["seconds"] == pytest.approx(133 * 0.1, rel=0.02)
    assert sum(each["samples"] for each in figures["stages"]) == figures["samples_seen"]
    assert list(figures["results"]) == ["test_loss", "accuracy", "ema_test_loss", "ema_accuracy"]
    assert sum(figures["phase_shares"].values()) == pytest.approx(1)
    reached, not_reached = figures["targets"]
    assert reached["seconds"] == pytest.approx(0.05 * 134 + 0.1 * (reached["updates"] - 134))
    assert not_reached["evaluated"]
    assert not_reached["seconds"] is None
    fits = figures["distance_fits"]
    assert fits["constant_lr"]
    assert fits["first_update"] >= 20
    power = fits["power"]["parameters"]["p"]
    assert abs(power["value"] - 0.35) < 4 * power["error"]
    assert figures["weight_distances"]["conv1.weight"] == figures["weight_distance"] / 2
    json.dumps(figures, allow_nan=False)


def test_what_an_older_run_lacks_is_named_with_the_key_of_the_job(tmp_path):
    folder = write_report_run(tmp_path / "run", kinds=(), timed=False)
    (folder / "decisions.jsonl").unlink()
    said = " ".join(derive(read(folder))["missing"])
    for words in ("log.layers_every_steps", "log.noise_every_steps", "log.distances",
                  "decisions.jsonl is missing", "have no time"):  # fmt: skip
        assert words in said
    assert derive(read(folder))["seconds"] == pytest.approx(
        sum(0.001 + 0.03 + 0.22 * 2 ** min(2, 3 * (step - 4) // 400 if step < 5 else 3 * step // 400)
            for step in range(4, 400, 5))
    )  # fmt: skip


def test_what_the_job_asks_for_and_the_log_does_not_have_yet_is_not_advised(tmp_path):
    job = {"name": "young", "log": {"noise_every_steps": 5, "layers_every_steps": 5}}
    said = " ".join(derive(read(write_report_run(tmp_path / "run", kinds=(), job=job)))["missing"])
    assert said.count("the log has no such line yet") == 2
    assert "set log.noise" not in said
    assert "set log.distances in the job" in said


def test_what_is_more_than_a_report_holds_is_counted(tmp_path):
    folder = write_report_run(tmp_path / "run", steps=10)
    layers = {f"layer{number}": {"trust_ratio": 1.0} for number in range(1500)}
    metrics = {f"metric{number}": 0.5 for number in range(60)}
    place = {"step": 9, "epoch": 0.2, "samples_seen": 320, "time": BEGAN + 1}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(place | {"layers": layers}) + "\n")
        file.write(json.dumps(place | {"test_loss": 1.0} | metrics) + "\n")
    said = derive(read(folder))["missing"]
    assert any(line.endswith(" further parameters are not shown.") for line in said)
    assert any(line.endswith(" further results of evaluations are not shown.") for line in said)


def test_a_result_may_be_named_like_a_measurement(tmp_path):
    log = metrics_of([{"step": 4, "epoch": 1.0, "test_loss": 0.5, "noise_scale": 0.25}])
    assert list(log.results) == ["test_loss", "noise_scale"]
    assert log.noise.count == 0


def test_the_time_between_a_stop_and_the_next_start_is_left_out():
    starts = [Start(100.0, 0, 2), Start(5000.0, 10, 4), Start(7000.0, 10, 4)]
    lines = [step_line(4, time=110.0), step_line(9, time=120.0), step_line(14, time=7003.0),
             step_line(19, time=7001.0)]  # fmt: skip
    log = metrics_of(lines, starts)
    assert log.steps["loss"].rows()[:, 2].tolist() == [10, 20, 23, 23]
    assert log.resumed == [(10, 1.0, 20.0), (10, 1.0, 20.0)]


def test_lines_without_time_count_the_seconds_of_their_phases():
    lines = [
        step_line(4),
        step_line(9),
        {"step": 9, "epoch": 1.0, "samples_seen": 320, "accuracy": 0.5},
    ]
    log = metrics_of(
        [*lines, step_line(14, time=5003.0)], [Start(100.0, 0, 2), Start(5000.0, 10, 2)]
    )
    assert log.steps["loss"].rows()[:, 2].tolist() == [5, 10, 13]
    assert log.results["accuracy"].rows()[0, 2] == 10


def test_the_longest_stretch_of_constant_lr():
    lrs = [0.1, 0.2, 0.3, 0.3, 0.3, 0.2, 0.1]
    log = metrics_of([step_line(10 * number, lr=lr) for number, lr in enumerate(lrs)])
    assert log.constant_lr == (21, 41)


def test_a_short_stretch_of_constant_lr_is_not_fitted_alone(tmp_path):
    run = read(write_report_run(tmp_path / "run"))
    run.metrics.constant_lr = run.metrics.constant_lr._replace(first=300)
    fits = fits_of(run)
    assert not fits.constant_lr
    assert fits.first == 11


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path):
    folder = write_report_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        for value in ("nan", "inf", float("nan"), None, [3], True, 10**400):
            file.write(json.dumps(step_line(400, loss=value, epoch=21.0)) + "\n")
    run = read(folder)
    said = "Values of loss that are not finite are left out: 3, the first at epoch 21."
    assert said in run.notes()
    assert run.metrics.steps["loss"].count == 80


def test_a_line_that_was_cut_off_waits_for_its_end(tmp_path):
    folder = write_report_run(tmp_path / "run", finished=False)
    log = folder / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-30])
    run = read(folder)
    assert (run.state, run.metrics_lines.incomplete, run.metrics_lines.bad) == ("running", True, 0)
    assert run.notes() == []
    before = run.metrics.records
    log.write_bytes(whole)
    run.update()
    assert (run.metrics_lines.incomplete, run.metrics.records) == (False, before + 1)


def test_a_log_that_a_resume_has_cut_off_is_read_again(tmp_path):
    folder = write_report_run(tmp_path / "run", finished=False)
    run = read(folder)
    updates = run.metrics.position[0]
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:50]))
    run.update()
    assert run.metrics.records == 50
    # Cut off and longer again than before, between two looks
    (folder / "metrics.jsonl").write_text("".join(lines[:40] + lines[60:] + lines[-9:]))
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"time": START, "step": 30, "world_size": 2}) + "\n")
    run.update()
    assert run.metrics.records == len(lines) - 20 + 9
    assert run.metrics.position[0] == updates
    assert len(run.starts) == 2


def test_a_run_that_has_written_nothing_for_long_is_stopped(tmp_path):
    import os

    folder = write_report_run(tmp_path / "run", finished=False)
    for path in folder.iterdir():
        os.utime(path, (BEGAN - 1e6, BEGAN - 1e6))
    assert read(folder).state == "stopped"
    (folder / "progress").mkdir()
    (folder / "progress/rank_0.json").write_text(json.dumps({"rank": 0, "time": time.time()}))
    assert read(folder).state == "running"


@pytest.mark.parametrize("content", [b"\x00\xff\x7fELF" * 1000, b"[1, 2]\n", b'{"a": 1}\n', b"\n\nhello\n",
    b'{"step": "x", "epoch": 1}\n', b"[" * 100_000 + b"\n", b"1" * 10_000 + b"\n", b"not json"])  # fmt: skip
def test_a_log_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(JobError, match=r"metrics\.jsonl: not the log of a run"):
        read(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"\n", b'{"step": 1, "epo'])
def test_a_run_without_a_line_yet_is_reported_as_such(tmp_path, content):
    (tmp_path / "job.resolved.yaml").write_text("name: a\n")
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    run = read(tmp_path)
    assert "metrics.jsonl" in run.notes()[0]
    assert derive(run)["updates"] == 0


def test_damaged_lines_and_documents_are_named_and_left_out(tmp_path):
    folder = write_report_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[10] = b"\x00" * 40 + b"\n"
    lines[20] = lines[20][:30] + b"\n"
    lines[30] = b'{"step": 3}\n'
    (folder / "metrics.jsonl").write_bytes(b"".join(lines)[:-20])
    (folder / "environment.json").write_text("[")
    (folder / "summary.json").write_text("7")
    (folder / "job.resolved.yaml").write_bytes(b"\xff")
    (folder / "starts.jsonl").write_text('{"time": 3, "step": 0}\nx\n')
    (folder / "decisions.jsonl").write_text('{"step": 0}\n{"step": 1, "stage": "a"}\n7\n')
    notes = " ".join(read(folder).notes())
    for words in ("metrics.jsonl: lines that cannot be read are left out: 2, the first is line 11", "lines without step or epoch are left out: 1",
                  "environment.json is not", "summary.json is not", "job.resolved.yaml cannot be read",
                  "decisions.jsonl: lines that cannot be read are left out: 1"):  # fmt: skip
        assert words in notes


def test_a_line_longer_than_any_layer_line_is_skipped_unread(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n"' + b"x" * (2 * LONGEST_LINE) + b'"\n{"a": 2}\n')
    lines = JsonLines(path)
    assert [record["a"] for record in lines.read()] == [1, 2]
    assert (lines.bad, lines.first_bad) == (1, 2)
    assert lines.continues()


def test_a_folder_that_is_no_run_is_refused(tmp_path, monkeypatch):
    (tmp_path / "runs/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError, match="mine: not a run folder"):
        find_run("mine")
    with pytest.raises(JobError, match="not a run folder"):
        find_run("nowhere")
    with pytest.raises(JobError):
        find_run("a\0b")
    (tmp_path / "runs/mine/metrics.jsonl").touch()
    assert find_run("mine").name == "mine"


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(JobError, match=f"{tmp_path}: cannot be read: Permission denied"):
        find_run(str(tmp_path))


def test_runs_of_one_name_are_told_apart_and_one_named_twice_is_shown_once(tmp_path):
    names = [
        str(write_report_run(tmp_path / name, steps=5)) for name in ("a/run", "b/run", "b/other")
    ]
    (tmp_path / "link").symlink_to(names[0])
    folders, notes = find_runs([*names, str(tmp_path / "link")])
    assert list(folders) == ["a/run", "b/run", "other"]
    assert notes == [f"{tmp_path / 'link'} is named twice: it is shown once"]


@pytest.mark.parametrize(
    ("text", "job", "reached"),
    [
        ("accuracy=0.9", {}, 0.91),
        ("perplexity=80", {}, 79),
        ("test_loss=1", {}, 0.5),
        ("bleu<=3", {}, 2),
        (
            "mine=3",
            {"evaluate": {"metrics": {"mine": {"name": "a:b", "higher_is_better": False}}}},
            2,
        ),
        (
            "ema_loss_like=3",
            {"evaluate": {"metrics": {"loss_like": {"higher_is_better": True}}}},
            4,
        ),
    ],
)
def test_a_target_knows_which_way_is_better(text, job, reached):
    target = parse_target(text)
    assert target.reached(target.value, job)
    assert target.reached(reached, job)
    assert not target.reached(2 * target.value - reached, job)


@pytest.mark.parametrize("text", ["accuracy", "=3", "a=b", "a=nan", "a=", "a<3"])
def test_a_target_of_another_form_is_refused(text):
    with pytest.raises(JobError, match=r"--target .*accuracy=0\.98"):
        parse_target(text)


def test_the_first_evaluation_that_reaches_a_target_counts_however_long_the_run():
    target = parse_target("accuracy=0.5")
    log = MetricsLog((), (target,), {})
    for step in range(10_000):
        log.add(
            {"step": step, "epoch": step / 10, "accuracy": 0.6 if step in (5001, 5003) else 0.1}
        )
    assert log.reached[target][0] == 5002


def peak_memory(steps):
    """Of reading a log of so many steps, in bytes."""
    layers = {name: {"trust_ratio": 0.01, "update_ratio": 0.001} for name in LAYERS}
    tracemalloc.start()
    try:
        log, decisions = MetricsLog((), (), {}), DecisionsLog()
        for step in range(steps):
            log.add(step_line(step, time=float(step), trust_ratio_min=0.1, trust_ratio_max=0.2))
            log.add({"step": step, "epoch": step / 10, "accuracy": step / steps})
            log.add({"step": step, "epoch": step / 10, "weight_distance": float(step)})
            if step % 4 == 0:
                log.add({"step": step, "epoch": step / 10, "layers": layers})
            decisions.add(
                {
                    "step": step,
                    "epoch": step / 10,
                    "stage": 0,
                    "stage_batch": 32,
                    "global_batch": 32,
                    "lr": 0.1,
                }
            )
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_log():
    short, long = peak_memory(1_300), peak_memory(5_200)
    assert long < 1.25 * short
    assert long < 12e6


def test_a_run_of_the_engine_is_read_as_it_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = {
        "name": "real", "epochs": 4, "data": {"name": "digits"}, "model": {"name": "mlp"},
        "batch": {"base": 32, "micro": 32, "growth": {"policy": "adabatch", "every_epochs": 2}},
        "lr": {"base": 1.0}, "log": {"every_steps": 5}, "ema": {"half_life_samples": 500},
    }  # fmt: skip
    summary = hvdlarge.run_job(job)
    run = read(find_run("real"), "accuracy=0.1")
    figures = derive(run)
    assert (figures["state"], figures["notes"]) == ("finished", [])
    assert [
        figures[key] for key in ("updates", "epochs", "samples_seen", "samples_per_second")
    ] == [summary[key] for key in ("steps", "epochs", "samples_seen", "samples_per_second")]
    for name in ("test_loss", "accuracy", "ema_accuracy"):
        assert figures["results"][name]["last"] == summary[name]
    assert [each["global_batch"] for each in figures["stages"]] == [32, 64]
    assert sum(each["steps"] for each in figures["stages"]) == summary["steps"]
    assert {"fetch", "forward", "backward", "update"} <= set(figures["phase_shares"])
    assert run.metrics.trust.count == run.metrics.steps["loss"].count == -(-summary["steps"] // 5)
