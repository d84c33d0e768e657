import subprocess
import sys
import time

import pytest

# A launcher that goes on for some seconds after its rank has ended
LAUNCHER = """\
#!/bin/sh
{python} -c "from hvdlarge.resilience.stuck_launcher import kill_stuck_launcher as k; k(1.0)"
sleep {seconds}
echo ended
"""


@pytest.mark.parametrize(
    ("name", "seconds", "code"),
    [("mpirun", 30, -9), ("orted", 30, -9), ("mpirun", 0, 0), ("bash", 3, 0)],
)
def test_only_a_launcher_that_stays_is_killed(tmp_path, name, seconds, code):
    program = tmp_path / name
    program.write_text(LAUNCHER.format(python=sys.executable, seconds=seconds))
    program.chmod(0o755)
    began = time.monotonic()
    # Not its output's end: the orphaned `sleep` holds the pipe
    with (tmp_path / "output").open("w") as output:
        done = subprocess.run([program], stdout=output, timeout=20)
    assert done.returncode == code
    assert time.monotonic() - began < 15
    assert (tmp_path / "output").read_text() == ("ended\n" if code == 0 else "")
