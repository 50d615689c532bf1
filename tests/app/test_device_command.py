"""`python -m benchmarks.device`: what is finished is skipped, what failed runs again, a missing peer is shown."""

import csv
import json
import subprocess

import pytest

from benchmarks import device, peers


@pytest.fixture
def started(monkeypatch):
    """The stages whose processes were started; those in `fails` end with an error."""
    ran = []

    def run(command, **options):
        name = command[command.index("--stage") + 1]
        ran.append(name)
        options["stdout"].write(f"a line\nwhy {name} failed\n")
        options["stdout"].flush()
        return subprocess.CompletedProcess(command, int(name in run.fails))

    run.fails = set()
    monkeypatch.setattr(device, "identity", lambda kind: {"device": kind, "commit": "abc"})
    monkeypatch.setattr(device.subprocess, "run", run)
    return ran, run


def test_finished_stages_are_skipped(started, tmp_path, capsys, monkeypatch):
    ran, run = started
    run.fails = {"memcheck"}
    arguments = ["--out", str(tmp_path / "new" / "folder"), "--device", "cpu"]
    assert device.main(arguments) == 1 and ran == list(device.STAGES)
    state = json.loads((tmp_path / "new" / "folder" / "state.json").read_text())
    assert state["ops"]["state"] == "done" and state["memcheck"]["why"] == "why memcheck failed"
    assert "why memcheck failed" in capsys.readouterr().out
    ran.clear()
    run.fails = set()
    assert device.main(arguments) == 0 and ran == ["memcheck"]
    ran.clear()
    assert device.main([*arguments, "--stage", "ops"]) == 0 and ran == []
    assert device.main([*arguments, "--stage", "ops", "--again"]) == 0 and ran == ["ops"]
    ran.clear()
    monkeypatch.setattr(device, "identity", lambda kind: {"device": kind, "commit": "def"})
    assert device.main([*arguments, "--stage", "ops", "--stage", "step"]) == 0 and ran == ["ops", "step"]


def test_a_stage_that_takes_too_long_is_stopped(started, tmp_path, monkeypatch):
    def run(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(device.subprocess, "run", run)
    assert device.main(["--out", str(tmp_path), "--device", "cpu", "--stage", "ops"]) == 1
    assert json.loads((tmp_path / "state.json").read_text())["ops"]["why"] == "over 480 s"


def test_missing_and_failing_peers_show(tmp_path):
    rows = device.stage_peers(tmp_path, "cpu")
    assert {row["peer"] for row in rows} == {make.__name__ for make in peers.ALL}
    device.write_rows(tmp_path, "peers", "cpu", rows)
    for row in csv.DictReader((tmp_path / "peers.csv").open()):
        assert row["torch"] and row["commit"] and row["result"]


def test_small_cases_are_right():
    """What the sanitizers look at, and what `ops` checks before it times."""
    names = [case.name for case in device._small("cpu") if device.check(case, "cpu") is None]
    assert {name.partition(" ")[0] for name in names} >= {"hash_grid", "march_rays", "composite", "rasterize",
                                                          "interpolate", "texture", "antialias", "marching_tets"}
