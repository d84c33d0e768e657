"""The command `hvdlarge`."""

import subprocess
import sys

import pytest

from hvdlarge.__main__ import VERBS, main


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"), [([], "a verb is missing"), (["fly"], "unknown verb 'fly'")]
)
def test_what_is_no_verb_is_an_error(arguments, problem, capsys):
    assert main(arguments) == 2
    assert problem in capsys.readouterr().err


def test_a_name_of_a_file_that_is_no_utf_8_is_told(tmp_path):
    command = [sys.executable, "-m", "hvdlarge.train", b"caf\xe9.yaml"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert b"hvdlarge: error: " in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hvdlarge 0.")


def test_a_shipped_job_is_found_by_its_name_from_any_folder(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "digits"]) == 0
    assert "digits: 30 epochs of 1,437 samples" in capfd.readouterr().out
    assert main(["plan", "digitz"]) == 2
    assert "shipped jobs are digits, digits_lstm" in capfd.readouterr().err


def test_a_file_of_that_name_comes_first(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text("name: mine\n")
    assert main(["plan", "digits"]) == 2
    assert "digits: " in capfd.readouterr().err


def test_python_m_hvdlarge_is_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "hvdlarge", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("hvdlarge ")


def test_the_verbs_are_listed(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {verb} " in listed for verb in VERBS)
