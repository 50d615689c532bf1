"""Two processes on one run: the result of one, one that is lost, what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from red_ball import PARTICLES, TINY, RedBall, few_pictures

from text3d_fast.app import cli
from text3d_fast.app.commands.outcome import USER_ERROR
from text3d_fast.pipelines import DreamFusion, ProlificDreamer, distributed
from text3d_fast.pipelines.checkpoint import load_state

TESTS = Path(two_processes.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        few_pictures(patch)
        yield


def torchrun(what: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), **environment}
    return subprocess.run([*launch, str(TESTS / "two_processes.py"), what, str(folder)], capture_output=True, text=True,
                          timeout=240, env=environment)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The results of one process and of two."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("two")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = two_processes.results(folder / "model")
    torch.set_num_threads(threads)
    done = torchrun("results", folder)
    assert done.returncode == 0, done.stderr
    return one, torch.load(folder / "results.pt"), folder, done


@pytest.mark.parametrize("case", [*two_processes.CASES, "dreamfusion"])
def test_two_processes_give_the_result_of_one(both, case):
    one, two = both[0][case], both[1][case]
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.shape == two[name].shape, name
        difference = float((value.double() - two[name].double()).abs().max()) if value.numel() else 0.0
        assert difference <= 1e-3, (name, difference)  # rounding, through Adam; without averaging 0.3


def test_the_first_process_alone_writes(both):
    folder, done = both[2], both[3]
    assert done.stdout == "" and "Error" not in done.stderr
    for case in two_processes.CASES:
        figures = json.loads((folder / "runs" / case / "result.json").read_text())
        assert figures["status"] == "done" and figures["processes"] == 2
        assert not (folder / "runs" / case / ".lock").exists()
    meshes = sorted(path.name for path in (folder / "runs" / "uneven").glob("*.glb"))
    assert meshes == ["mesh-2.glb", "mesh-3.glb", "mesh.glb"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process makes of the command line of `two_processes.command`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("text3d_fast.pipelines.pipeline.load_prior", lambda *_: RedBall())
        folder = tmp_path_factory.mktemp("whole") / "run"
        assert cli.main(two_processes.words(folder)) == 0
        yield load_state(folder / "checkpoint.safetensors")[0]


def check_that_one_process_goes_on(folder: Path, whole: dict) -> None:
    """From the checkpoint in a folder to the result of the unbroken run."""
    assert cli.main([*two_processes.words(folder), "--resume"]) == 0
    check_is(folder, whole)


def check_is(folder: Path, whole: dict) -> None:
    """The checkpoint in a folder is that of the unbroken run."""
    tensors, about = load_state(folder / "checkpoint.safetensors")
    assert about["stage"] == "texturing" and tensors.keys() == whole.keys()
    for name, value in whole.items():
        assert float((value.double() - tensors[name].double()).abs().max()) <= 1e-3, name


@pytest.mark.parametrize("what, reason", [
    ("die", "torchrun's report"), ("first dies", "torchrun's report"),
    ("fail", "process 1: FloatingPointError: no number"),
    ("sleep", "not answered for 4 s"),
])
def test_a_lost_process_ends_the_job_and_one_goes_on(tmp_path, whole, what, reason):
    done = torchrun(what, tmp_path / "run", TEXT3D_DISTRIBUTED_TIMEOUT="4" if what == "sleep" else "60")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: one of the 2 processes has ended")]
    assert len(said) == 1 and reason in said[0], done.stderr
    assert "torchrun --nproc-per-node 2 -m text3d_fast generate 'a ball' --resume" in done.stderr
    assert load_state(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == 2
    check_that_one_process_goes_on(tmp_path / "run", whole)


def test_ctrl_c_saves_in_two_processes(tmp_path, whole):
    done = torchrun("stop", tmp_path / "run")
    assert done.returncode != 0 and done.stderr.count("Stopped after step 3") == 1, done.stderr
    assert load_state(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == 3
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    check_that_one_process_goes_on(tmp_path / "run", whole)
    done = torchrun("go on", tmp_path / "copy")  # where the second process has no folder
    assert done.returncode == 0, done.stderr
    check_is(tmp_path / "copy", whole)
    assert not (tmp_path / "copy elsewhere").exists()


def test_nothing_to_resume_is_said_once(tmp_path):
    done = torchrun("go on", tmp_path / "run")
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(said) == 1 and "nothing to resume: there is no" in said[0], done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def job(monkeypatch):
    """Pretends to be one of several processes; nothing that talks may be called."""
    def pretend(rank: int, size: int) -> None:
        monkeypatch.setattr(distributed, "_job", distributed._Job(rank, size, None, None, groups={1: None, size: None}))
    return pretend


def test_how_particles_and_views_are_dealt(job):
    assert distributed.dealt(3) == ([1, 2, 3], distributed.Share())
    job(1, 2)
    assert distributed.dealt(5) == ([2, 4], distributed.Share())
    assert distributed.dealt(1) == ([1], distributed.Share(1, 2))
    assert distributed.Share(1, 2).rows(6) == slice(3, 6)
    job(2, 4)
    distributed._job.groups[2] = "third and fourth"
    numbers, share = distributed.dealt(2)
    assert numbers == [2] and share == distributed.Share(0, 2, "third and fourth")


def test_what_can_not_be_dealt_is_refused(job):
    job(0, 2)
    with pytest.raises(ValueError, match=r"vsd.batch: expected a multiple of 2, .* got 1; .* set vsd.batch=2"):
        ProlificDreamer(prior=RedBall(), device="cpu", settings=PARTICLES | {"particles": 1}).run("a ball")
    with pytest.raises(ValueError, match=r"^batch: expected a multiple of 2"):
        DreamFusion(prior=RedBall(), device="cpu", settings=TINY).run("a ball")
    job(0, 3)
    with pytest.raises(ValueError, match="particles: expected at least 3, .* got 2"):
        ProlificDreamer(prior=RedBall(), device="cpu", settings=PARTICLES).run("a ball")


def test_each_step_one_is_refused_before_the_first_stage(job):
    job(0, 2)
    settings = PARTICLES | {"texturing.score.kind": "lora", "texturing.each_step": "one"}
    with pytest.raises(ValueError, match="^texturing.each_step: expected all with 2 processes, got one"):
        ProlificDreamer(prior=RedBall(), device="cpu", settings=settings).run("a ball")


@pytest.mark.parametrize("other, message", [
    ({"seed": 3}, "^seed: expected the same in all 2 processes, got 0 in process 0 and 3 in process 1$"),
    ({"vsd.steps": 9}, "^vsd.steps: expected the same in all 2 processes"),
    ({"out, whether there is one,": True}, "^out, whether there is one,: .* got False in process 0 and True"),
    ({"fine.steps": 9}, "^fine.steps: .* got missing in process 0 and 9 in process 1$"),
])
def test_processes_with_different_settings_are_refused(job, monkeypatch, other, message):
    job(0, 2)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, value | other])
    with pytest.raises(ValueError, match=message):
        ProlificDreamer(prior=RedBall(), device="cpu", settings=PARTICLES).run("a ball")


def test_two_processes_with_different_settings_end_with_one_sentence(tmp_path):
    done = torchrun("differ", tmp_path / "run")
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and said == [
        "error: seed: expected the same in all 2 processes, got 0 in process 0 and 1 in process 1"], done.stderr
    assert not (tmp_path / "run").exists()


def test_only_generate_and_edit_are_done_by_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["doctor"]) == USER_ERROR
    assert "only generate and edit" in capsys.readouterr().err
