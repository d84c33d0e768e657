"""The launcher's command line: what it refuses or says before it starts mpirun, and what it passes on at each start."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.launching import ROOT

from hvdlarge.exits import JobError
from hvdlarge.launch import Hosts, parse_hosts

JOB = str(ROOT / "jobs/digits.yaml")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hosts-command", "no-such-command -v"], "No such file or directory: 'no-such-command'"),
        (["--hosts-command", ""], "--hosts-command : "),
        (["--hosts-command", "echo 'a"], "No closing quotation"),
        (["--hosts-command", "false"], "exit code 1"),
        (["--hosts-file", "nothing"], "--hosts-file nothing: No such file"),
        (["--hosts-file", "binary"], "--hosts-file binary: 'utf-8' codec"),
        (["--hosts-file", "binary", "--hosts-command", "echo a"], "either"),
    ],
)
def test_hosts_that_cannot_be_read_are_one_error(tmp_path, options, words):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\n")
    # Overrides may follow options
    command = [sys.executable, "-m", "hvdlarge.launch", "-np", "2", JOB, *options, "epochs=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("hvdlarge: error:") == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("node01   slots=4\nnode02\t slots=2", "node01:4,node02:2"),
        ("node01 slots=4 max_slots=8\nnode02 max-slots=3 slots=2", "node01:4,node02:2"),
        ("node01 slots = 4  max_slots = 8  # big\n\nnode02 max_slots=2", "node01:4,node02:1"),
        (" a:4 , b slots=2,c,d:0", "a:4,b:2,c:1"),
    ],
)
def test_hostfiles_of_open_mpi_are_read(text, value):
    slots = sum(int(host.rpartition(":")[2]) for host in value.split(","))
    assert parse_hosts(text) == Hosts(value, slots)


@pytest.mark.parametrize(
    "entry", ["a b", "a slots=x", "a:b", "a slots=2 slots=3", "a:2 slots=3", "slots=4", ":4", "a slots=2 max_slots=x"]
)  # fmt: skip
def test_what_is_no_host_is_refused(entry):
    with pytest.raises(JobError, match="is not a host: write name, name:slots or name slots=n"):
        parse_hosts(f"good:2\n{entry}\n")


def test_a_stop_while_the_hosts_are_asked_for_starts_nothing(tmp_path):
    (tmp_path / "hosts").write_text("kill -TERM $PPID\nsleep 0.5\necho localhost\n")
    command = [sys.executable, "-m", "hvdlarge.launch", "-np", "1", "--hosts-command", "sh hosts"]
    done = subprocess.run(
        [*command, "--mpirun", "no-such-mpirun", JOB],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 75, done.stdout + done.stderr
    assert "launch: SIGTERM: nothing was started" in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


def launch(folder, *options, mpirun="no-such-mpirun", **environ):
    command = [sys.executable, "-m", "hvdlarge.launch", "--mpirun", mpirun, *options]
    environment = {**os.environ, **environ}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.parametrize(
    ("hosts", "workers", "words"),
    [
        ("a:2,b:2", 8, "2 hosts × 2 slots = 4, fewer than the 8 workers of -np: the run has 4"),
        ("a:4,b:2", 8, "4 + 2 = 6 slots, fewer than the 8 workers of -np: the run has 6"),
        ("a", 2, "1 host × 1 slot = 1, fewer than the 2 workers of -np: the run has 1"),
        ("a:4,b:4", 8, None),
        ("a:9", 8, None),
    ],
)
def test_fewer_slots_than_workers_are_told_with_their_arithmetic(tmp_path, hosts, workers, words):
    done = launch(tmp_path, "-np", str(workers), "--hosts-command", f"echo {hosts}", JOB)
    assert done.returncode == 3  # there is no such mpirun
    assert "no-such-mpirun is not on PATH" in done.stderr
    if words is None:
        assert "warning" not in done.stdout
    else:
        assert f"launch: warning: {words}\nlaunch: " in done.stdout


# Stands for mpirun: writes its arguments down, and ends as the next word of `ends` says
FAKE_MPIRUN = """
import json, os, pathlib, sys
starts = pathlib.Path("starts")
number = len(starts.read_text().splitlines()) if starts.exists() else 0
with starts.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
end = os.environ["ENDS"].split()[number]
run = pathlib.Path("runs/digits")
if end.startswith("enter") and "--fresh" in sys.argv and (run / "job.resolved.yaml").exists():
    run.rename("runs/digits.1")
if end.startswith("enter"):
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "job.resolved.yaml").touch()
    (run / f"checkpoints/step_{number + 1:09}.pt").touch()
sys.exit(int(end.rpartition(":")[2]))
"""


def test_a_lost_host_which_mpirun_notices_within_a_minute_is_a_reason_to_restart(tmp_path):
    report = "import os\nprint('idle for', os.environ['OMPI_MCA_oob_tcp_keepalive_time'])\n"
    (tmp_path / "mpirun.py").write_text(report + FAKE_MPIRUN)
    fake = {"mpirun": f"{sys.executable} mpirun.py", "ENDS": "enter:205 enter:0"}
    done = launch(tmp_path, "-np", "2", JOB, **fake)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("idle for 30\n") == 2
    (tmp_path / "starts").unlink()
    done = launch(tmp_path, "-np", "2", JOB, **fake, OMPI_MCA_oob_tcp_keepalive_time="7")
    assert done.stdout.count("idle for 7\n") == 2  # the user's choice


@pytest.mark.parametrize(
    ("ends", "code", "starts"),
    [
        ("hang:255 enter:0", 255, 1),  # at the first start it may be a mistake of the command line
        ("enter:255 enter:0", 0, 2),  # the connection was lost in the middle of the run
        ("enter:205 hang:255 enter:0", 0, 3),
        ("enter:205 hang:255 hang:255 hang:255 enter:0", 255, 4),
    ],
)
def test_a_host_out_of_reach_is_a_reason_to_restart_once_the_run_has_begun(
    tmp_path, ends, code, starts
):
    (tmp_path / "mpirun.py").write_text(FAKE_MPIRUN)
    fake = {"mpirun": f"{sys.executable} mpirun.py", "ENDS": ends}
    done = launch(tmp_path, "-np", "2", JOB, **fake)
    assert done.returncode == code, done.stdout + done.stderr
    assert len((tmp_path / "starts").read_text().splitlines()) == starts


@pytest.mark.parametrize(
    ("earlier", "ends", "fresh"),
    [
        ("run", "enter:137 enter:72 enter:0", [True, False, False]),
        ("run", "hang:72 enter:137 enter:0", [True, True, False]),  # it hung before it entered
        ("empty", "enter:137 enter:0", [True, False]),
        (None, "enter:137 enter:0", [True, False]),
        (None, "hang:72 enter:137 enter:0", [True, False, False]),  # there is nothing to set aside
    ],
)
def test_fresh_is_passed_until_the_earlier_run_is_set_aside_and_never_to_a_restart(
    tmp_path, earlier, ends, fresh
):
    (tmp_path / "mpirun.py").write_text(FAKE_MPIRUN)
    if earlier is not None:
        (tmp_path / "runs/digits/checkpoints").mkdir(parents=True)
    if earlier == "run":
        (tmp_path / "runs/digits/job.resolved.yaml").touch()
        (tmp_path / "runs/digits/checkpoints/step_000000500.pt").touch()
    fake = f"{sys.executable} mpirun.py"
    done = launch(tmp_path, "-np", "2", JOB, "--fresh", "epochs=2", mpirun=fake, ENDS=ends)
    assert done.returncode == 0, done.stdout + done.stderr
    starts = [json.loads(line) for line in (tmp_path / "starts").read_text().splitlines()]
    assert ["--fresh" in start for start in starts] == fresh
    assert all(start[-1] == "epochs=2" or start[-2] == "epochs=2" for start in starts)
    assert (tmp_path / "runs/digits.1").exists() == (earlier == "run")
    assert (tmp_path / "runs/digits/checkpoints").exists()


# Lists the hosts, except at the calls whose numbers follow
HOSTS = """
echo call >> calls
number=$(wc -l < calls)
for failing in "$@"; do
    if [ $number -eq $failing ]; then echo "the scheduler is busy" >&2; exit 1; fi
done
echo localhost:2
"""


@pytest.mark.parametrize(
    ("failing", "code", "starts"),
    [
        ("2", 0, 2),  # a transient failure at a restart
        ("2 3 4", 137, 1),  # no progress in three attempts
        ("1", 2, 0),  # at the first start it may be a mistake of the command line
    ],
)
def test_hosts_that_cannot_be_read_at_a_restart_are_an_attempt_without_progress(
    tmp_path, failing, code, starts
):
    (tmp_path / "mpirun.py").write_text(FAKE_MPIRUN)
    (tmp_path / "hosts.sh").write_text(HOSTS)
    options = ["-np", "2", "--hosts-command", f"sh hosts.sh {failing}", JOB]
    fake = f"{sys.executable} mpirun.py"
    done = launch(tmp_path, *options, mpirun=fake, ENDS="enter:137 enter:0")
    assert done.returncode == code, done.stdout + done.stderr
    assert "exit code 1: the scheduler is busy" in done.stdout + done.stderr
    made = tmp_path / "starts"
    assert (len(made.read_text().splitlines()) if made.exists() else 0) == starts


def test_restarts_of_a_fresh_run_count_as_progress_although_the_earlier_run_came_further(tmp_path):
    (tmp_path / "mpirun.py").write_text(FAKE_MPIRUN)
    (tmp_path / "runs/digits/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/digits/job.resolved.yaml").touch()
    (tmp_path / "runs/digits/checkpoints/step_000000500.pt").touch()
    ends = "enter:137 enter:137 enter:137 enter:0"
    fake = f"{sys.executable} mpirun.py"
    done = launch(tmp_path, "-np", "2", JOB, "--fresh", mpirun=fake, ENDS=ends)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "hvdlarge launch -np 4 job.yaml"),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
            "hvdlarge launch starts mpirun itself, but Open MPI started it 2 times",
        ),
    ],
)
def test_a_launch_within_a_launch_is_refused_once(tmp_path, environ, words):
    done = launch(tmp_path, "-np", "2", JOB, **environ)
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.count("hvdlarge: error:") == 1
    assert words in done.stderr
    others = {name: "1" if name.endswith("RANK") else value for name, value in environ.items()}
    done = launch(tmp_path, "-np", "2", JOB, **others)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


@pytest.mark.parametrize(
    ("options", "words"),
    [(["-np", "0"], "-np must be at least 1"), (["-np", "2", "lr.bas=1"], "unknown key 'lr.bas'")],
)
def test_a_wrong_command_line_is_code_2(tmp_path, options, words):
    done = launch(tmp_path, *options[:2], JOB, *options[2:])
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize(
    ("mpirun", "code", "words"),
    [
        ("mpirun 'a", 2, "--mpirun mpirun 'a: No closing quotation"),
        ("", 2, "--mpirun is empty"),
        ("./not-executable", 3, "./not-executable cannot be started: Permission denied"),
        ("no-such-mpirun", 3, "no-such-mpirun is not on PATH"),
    ],
)
def test_an_mpirun_that_cannot_be_started_is_one_error(tmp_path, mpirun, code, words):
    (tmp_path / "not-executable").write_text("#!/bin/sh\n")
    command = [sys.executable, "-m", "hvdlarge.launch", "-np", "2", JOB, "--mpirun", mpirun]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("hvdlarge: error:") == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def begin(folder, script, *prefix):
    """Start the launcher with a shell script in place of mpirun; returns once the script runs."""
    (folder / "mpirun").write_text(f"touch started\n{script}\n")
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "hvdlarge.launch", "-np", "1", JOB]
        + ["--mpirun", "sh mpirun"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )
    deadline = time.monotonic() + 30
    while not (folder / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("script", ["exec sleep 30", "sleep 1; exit 138"])
def test_a_stop_that_meets_ranks_without_handlers_is_an_orderly_stop(tmp_path, script):
    """SIGUSR1 ends mpirun (the first script) or a rank, whose end mpirun reports as 138."""
    if "exit" in script:
        script = f"trap '' USR1; {script}"
    process = begin(tmp_path, script)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 75, text
    assert "stopped before the ranks were ready" in text


def test_signals_that_are_ignored_from_the_start_stay_ignored(tmp_path):
    """As nohup does for SIGHUP."""
    process = begin(tmp_path, "sleep 2", "nohup")
    os.kill(process.pid, signal.SIGHUP)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert "SIGHUP" not in text


def test_a_stop_in_the_pause_before_a_restart_is_a_stop(tmp_path):
    ends = tmp_path / "mpirun"
    ends.write_text("#!/bin/sh\n(sleep 1; kill -TERM $PPID) > /dev/null 2>&1 &\nexit 76\n")
    ends.chmod(0o755)
    done = launch(tmp_path, "-np", "1", JOB, mpirun=str(ends))
    assert done.returncode == 75, done.stdout + done.stderr
    assert "launch: SIGTERM: nothing more was started" in done.stdout
