"""The time of a job on any number of workers: its parts, its limits, and what it is read from."""

import json
import random
import statistics
from dataclasses import replace

import pytest
from support.launching import ROOT

from hvdlarge.comm.cost_model import AllreduceCost, Link
from hvdlarge.config.forecast import Cluster, Forecast, StepCosts, above_the_mean
from hvdlarge.config.job_file import parse_job, read_job
from hvdlarge.exits import JobError
from hvdlarge.plan import main
from hvdlarge.reporting.measured_run import read_allreduce, read_step_costs

JOB = """\
name: grows
epochs: 4
data: {name: synthetic_images, args: {samples: 8192}}
model: {name: mlp}
batch: {base: 128, micro: 16, growth: {policy: adabatch, every_epochs: 1}}
lr: {base: 0.1}
"""
COSTS = StepCosts(
    sample_seconds=1e-3,
    update_seconds=2e-3,
    jitter_seconds=0.0,
    gradient_bytes=4_000_000,
    messages=10,
    on_gpu=True,
    workers_per_host=1,
    threads=1,
    cores=8,
)
FREE = AllreduceCost(0.0, 0.0, Link(0.0, ((1, 0.0),)), Link(0.0, ((1, 0.0),)))
LINK = Link(1e-5, ((10**9, 1.0),))
NETWORK = AllreduceCost(1e-3, 1e-5, LINK, LINK)


def forecast(costs=COSTS, cost=FREE, per_host=8, text=JOB, algorithm="fastest"):
    job = parse_job(text, "job")
    return Forecast(job.plan(8192, 1), costs, Cluster(per_host, cost, algorithm))


def test_without_communication_workers_divide_the_micro_batches():
    found = forecast()
    for workers, passes in ((1, 8), (2, 4), (3, 3), (8, 1), (100, 1)):
        step = found.step(128, workers)
        assert step.compute == pytest.approx(passes * 16e-3)
        assert step.total == pytest.approx(passes * 16e-3 + 2e-3)
    assert found.step(5, 1).compute == pytest.approx(5e-3)  # less than a micro-batch
    steps = {128: 64, 256: 32, 512: 16, 1024: 8}
    expected = sum(count * found.step(batch, 4).total for batch, count in steps.items())
    assert found.seconds(4) == pytest.approx(expected)
    assert found.efficiency(1) == 1


def test_growth_lets_more_workers_pay():
    found = forecast(cost=NETWORK)
    fixed, grown = found.limits_of_batch(128), found.limits_of_batch(1024)
    assert (fixed.fastest, grown.fastest) == (8, 64)
    assert fixed.half_efficient <= 8 < grown.half_efficient <= 64
    whole = found.limits()
    assert 8 < whole.fastest <= 64
    assert fixed.half_efficient <= whole.half_efficient <= grown.half_efficient
    # No number of workers is faster, tried one by one
    times = {workers: found.seconds(workers) for workers in range(1, 80)}
    assert whole.fastest == min(times, key=lambda workers: (times[workers], workers))
    half = max(workers for workers in times if found.efficiency(workers) >= 0.5)
    assert whole.half_efficient == half


def test_slow_links_make_one_worker_the_fastest():
    slow = Link(1e-2, ((1, 1e-6),))
    found = forecast(cost=AllreduceCost(0.0, 0.0, slow, slow), per_host=1)
    assert found.limits() == (1, 1)


def test_on_cpus_nothing_hides_and_shared_cores_are_slower():
    cpu = replace(COSTS, on_gpu=False)
    assert forecast(cpu, NETWORK).step(1024, 4).hidden == 0
    alone = forecast(cpu, NETWORK, per_host=16)
    assert alone.step(1024, 8).compute == alone.step(1024, 4).compute / 2
    crowded = alone.step(1024, 16)  # on 8 cores
    assert crowded.compute == pytest.approx(alone.step(1024, 8).compute)
    assert crowded.update == pytest.approx(2 * COSTS.update_seconds)
    # Measured on full hosts: as it will be
    full = forecast(replace(cpu, workers_per_host=16), NETWORK, per_host=16)
    assert full.step(1024, 16).update == COSTS.update_seconds


def test_on_gpus_all_but_the_last_message_may_hide_behind_the_last_backward_pass():
    step = forecast(cost=NETWORK).step(1024, 4)
    assert step.hidden == pytest.approx(min(0.9 * step.allreduce, 2 / 3 * 16e-3))
    long = replace(COSTS, gradient_bytes=400_000_000)
    assert forecast(long, NETWORK).step(1024, 4).hidden == pytest.approx(2 / 3 * 16e-3)
    assert forecast(replace(COSTS, messages=1), NETWORK).step(1024, 4).hidden == 0


def test_the_slowest_worker_is_as_slow_as_drawn_ones():
    draws = random.Random(0)
    for workers in (2, 4, 64):
        drawn = statistics.mean(
            max(draws.gauss(0, 1) for _ in range(workers)) for _ in range(20_000)
        )
        assert above_the_mean(workers) == pytest.approx(drawn, abs=0.05)
    jitter = forecast(replace(COSTS, jitter_seconds=1e-3))
    assert jitter.step(1024, 4).straggling == pytest.approx(16**0.5 * 1e-3 * above_the_mean(4))
    assert jitter.step(1024, 1).straggling == 0
    idle = jitter.step(128, 64).straggling  # only eight of them have a micro-batch
    assert idle == pytest.approx(1e-3 * above_the_mean(8))


def write_run(folder, device="cpu", **changes):
    """A run's folder as a run writes it: two workers, 20 steps, the last ten of a larger batch."""
    job = read_job(str(ROOT / "jobs/digits.yaml"))
    folder.mkdir()
    (folder / "job.resolved.yaml").write_text(job.to_yaml())
    summary = {"samples_per_second": 4000.0, "world_size": 2, "gradient_bytes": 57832}
    summary |= {"gradient_tensors": 8} | changes.pop("summary", {})
    (folder / "summary.json").write_text(json.dumps(summary))
    workers = [
        {"host": "a", "host_cores": 4, "cores": [0, 1]},
        {"host": "a", "host_cores": 4, "cores": [2, 3]},
    ]
    environment = {"device": device, "settings": {"HOROVOD_FUSION_THRESHOLD": "0"}}
    environment |= {"workers": workers} | changes.pop("environment", {})
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "starts.jsonl").write_text('{"step": 0}\n{"step": 5}\n')
    lines = [{"step": 4, "global_batch": 64, "forward_seconds": 999.0}]
    for step, batch, seconds in ((9, 64, 5.0), (14, 64, 0.5), (19, 64, 0.5), (24, 128, 7.0)):
        times = {"fetch": 0.1, "forward": 0.4, "backward": 0.5, "allreduce": 0.25, "update": 0.1}
        times |= {"decide": 0.05, "measure": 0.05, "save": 100.0}
        record = {f"{phase}_seconds": seconds * share for phase, share in times.items()}
        lines.append({"step": step, "global_batch": batch, **record})
    lines.append({"step": 24, "global_batch": 128, "accuracy": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_costs_of_a_step_are_read_from_the_phases_of_the_last_start(tmp_path):
    costs = read_step_costs(write_run(tmp_path / "run"))
    # Five steps of two micro-batches of 16 samples on the busiest worker, in half a second
    assert costs.sample_seconds == pytest.approx(0.5 / 5 / 2 / 16)
    assert costs.update_seconds == pytest.approx(0.2 * 0.5 / 5)
    assert costs.jitter_seconds == 0
    assert (costs.gradient_bytes, costs.messages, costs.on_gpu) == (57832, 8, False)
    assert (costs.workers_per_host, costs.threads, costs.cores) == (2, 2, 4)


def test_on_a_gpu_the_wait_belongs_to_the_computation(tmp_path):
    costs = read_step_costs(write_run(tmp_path / "run", device="cuda:0"))
    assert costs.sample_seconds == pytest.approx(1.25 * 0.5 / 5 / 2 / 16)
    assert costs.on_gpu


def test_fused_messages_are_fewer(tmp_path):
    settings = {"settings": {"HOROVOD_FUSION_THRESHOLD": "30000"}}
    assert read_step_costs(write_run(tmp_path / "run", environment=settings)).messages == 2
    # Without a launcher the run has set nothing, and the job says it
    alone = write_run(tmp_path / "alone", environment={"settings": {}})
    assert read_step_costs(alone).messages == 8
    job = read_job(str(ROOT / "jobs/digits.yaml"), ["horovod.fusion_mib=0.03"])
    (alone / "job.resolved.yaml").write_text(job.to_yaml())
    assert read_step_costs(alone).messages == 2


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.jsonl", "", "has no times of steps"),
        ("metrics.jsonl", '{"step": 9', "JSONDecodeError"),
        ("starts.jsonl", "", "IndexError"),
        ("environment.json", "{}", "KeyError: 'device'"),
        ("summary.json", '{"world_size": 2, "gradient_bytes": 4}', "gradient_tensors"),
        ("job.resolved.yaml", "batch: {micro: auto}\nhorovod: {groups: null}\n", "micro: auto"),
    ],
)
def test_a_run_without_the_times_of_its_steps_is_refused(tmp_path, file, content, words):
    run = write_run(tmp_path / "run")
    (run / file).write_text(content)
    with pytest.raises(JobError, match=words):
        read_step_costs(run)


def write_allreduce(path, hosts, hop=1e-6):
    figures = {"cycle_seconds": 1e-3, "message_seconds": 1e-5, "hop_seconds": hop, "hosts": hosts}
    path.write_text(json.dumps(figures | {"carried_seconds": {"4": 0.0, "1000000": 1e-3}}))
    return path


def test_links_within_and_between_hosts_are_told_apart(tmp_path):
    within = write_allreduce(tmp_path / "within.json", ["a", "a", "a", "a"], 1e-6)
    between = write_allreduce(tmp_path / "between.json", ["a", "b"], 1e-5)
    both = read_allreduce([within, between])
    assert (both.cost.within.hop_seconds, both.cost.between.hop_seconds) == (1e-6, 1e-5)
    assert (both.workers_per_host, both.notes) == (4, [])
    alone = read_allreduce([within])
    assert alone.cost.within == alone.cost.between
    assert "measured within one host" in alone.notes[0]
    assert "measured between hosts" in read_allreduce([between]).notes[0]
    with pytest.raises(JobError, match="two files hold what was measured within one host"):
        read_allreduce([within, within])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"hosts": ["a"], "hop_seconds": 1}'])
def test_what_is_no_measurement_of_allreduce_is_refused(tmp_path, content):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(JobError, match="not what hvdlarge.bench allreduce --json writes"):
        read_allreduce([tmp_path / "odd.json"])


DIGITS = str(ROOT / "jobs/digits.yaml")


def test_a_plan_shows_every_number_of_workers(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    measured = write_allreduce(tmp_path / "net.json", ["a", "a"])
    asked = [DIGITS, "--world-size", "1,64,16384", "--measured", str(run)]
    asked += ["--allreduce", str(measured)]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["forecast"]
    assert [row["world_size"] for row in found["world_sizes"]] == [1, 64, 16384]
    assert [row["hosts"] for row in found["world_sizes"]] == [1, 32, 8192]
    assert found["world_sizes"][0]["efficiency"] == 1
    rows = {each["global_batch"]: each for each in found["limits_by_batch"]}
    assert rows[512]["fastest"] > rows[32]["fastest"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "2 workers on a host, sums by the faster of ring and tree" in said
    assert "measured within one host" in said
    assert f"fastest with {found['limits']['fastest']} " in said


def test_several_numbers_of_workers_without_measurements_show_who_is_idle(capsys):
    assert main([DIGITS, "--world-size", "2,64"]) == 0
    assert "1, 62 idle" in capsys.readouterr().out
    assert main([DIGITS, "--world-size", "2,64", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["world_sizes"]
    assert [row["stages"][0]["idle_workers"] for row in rows] == [0, 62]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--allreduce", "NET"], "name that run with --measured"),
        (["--allreduce", "none.json", "--measured", "RUN"], "not what hvdlarge.bench allreduce"),
        (["--allreduce", "NET", "--measured", "RUN", "reduction=exact"], "there is no forecast"),
        (["--allreduce", "NET", "--measured", "RUN", "--workers-per-host", "0"], "is needed"),
        (["--workers-per-host", "8"], "are of the forecast"),
        (["--algorithm", "ring", "--measured", "RUN"], "are of the forecast"),
        (["--world-size", "2,0"], "at least one worker is needed"),
        (["--world-size", "2,3", "reduction=exact"], "exact needs 1, 2, 4, 8"),
    ],
)
def test_a_forecast_that_cannot_be_is_refused(tmp_path, capsys, arguments, words):
    places = {"RUN": str(write_run(tmp_path / "run"))}
    places["NET"] = str(write_allreduce(tmp_path / "net.json", ["a", "a"]))
    assert main([DIGITS, *(places.get(each, each) for each in arguments)]) == 2
    assert words in capsys.readouterr().err
