import json
import os
import subprocess
import sys
import time

import pytest
import torch
from red_ball import TINY, RedBall

from text3d_fast.app import cli
from text3d_fast.app.commands.bench import write_benchmark_csv
from text3d_fast.app.commands.outcome import EMPTY_MESH, INTERRUPTED, USER_ERROR
from text3d_fast.app.commands.runs import default_folder

SMALL = ["--set", *(f"{name}={list(value) if isinstance(value, tuple) else value}"
                    for name, value in (TINY | {"steps": 3}).items())]


@pytest.fixture
def red_ball(monkeypatch):
    """`generate` with a prior that costs nothing."""
    from text3d_fast.pipelines import pictures, pipeline, results, surface

    monkeypatch.setattr(pipeline, "load_prior", lambda model, device, options: RedBall())

    def choose(renderer, field, cameras, density):
        return (None, 0.0) if field.sharpness < 1e-3 else ("auto", 1.0)

    monkeypatch.setattr(surface, "choose_threshold", choose)
    monkeypatch.setattr(results, "views", lambda mesh, cameras: pictures.views(mesh, cameras, size=8))
    monkeypatch.setattr(results, "turntable", lambda mesh, cameras: pictures.turntable(mesh, cameras, 2, size=8))


def test_help_teaches_and_is_fast():
    times = []
    for words in (["--help"], ["generate", "--help"]):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "text3d_fast", *words], capture_output=True, text=True)
        times.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    assert 'Examples:\n  text3d-fast generate "a red mug"\n' in done.stdout
    assert "Ctrl-C saves" in done.stdout and "--resume" in done.stdout and "analytic" in done.stdout
    lines = " ".join(done.stdout.replace("│", " ").split())
    assert "a coarse volume, then refines its surface as a textured mesh at higher resolution; prolific" in lines
    assert "torch" not in subprocess.run(
        [sys.executable, "-c", "import sys, text3d_fast.app.cli; print(*sys.modules)"], capture_output=True, text=True
    ).stdout.split()
    assert min(times) < 5  # well below 1 s on an idle machine


def test_generate_writes_everything_and_says_so(red_ball, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["generate", "a ball", "--out", str(out), *SMALL]) == 0
    assert {"mesh.glb", "turntable.gif", "views.png", "result.json", "config.yaml", "checkpoint.safetensors"} <= {
        path.name for path in out.iterdir()}
    assert "done in" in capsys.readouterr().err
    log = (out / "run.log").read_text().splitlines()
    assert "dreamfusion: step 3 of 3, loss" in log[-2] and "done in" in log[-1]
    # again: refused; with --resume: nothing left to do but to write the results
    assert cli.main(["generate", "a ball", "--out", str(out), *SMALL]) == USER_ERROR
    assert "--resume" in capsys.readouterr().err
    assert cli.main(["generate", "a ball", "--out", str(out), "--resume", *SMALL]) == 0


def test_ctrl_c_says_how_to_go_on(red_ball, tmp_path, capsys, monkeypatch):
    from text3d_fast.app import progress

    def press(self, step, state):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(progress.Progress, "step", press)
    status = cli.main(["generate", "a ball", "--seed", "4", "--out", str(tmp_path / "run"), "--no-camera", *SMALL])
    assert status == INTERRUPTED
    message = capsys.readouterr().err
    assert "after step 1" in message and "text3d-fast generate 'a ball' --resume" in message
    assert "--seed 4" in message and "--no-camera" in message and "--set" in message
    assert (tmp_path / "run" / "checkpoint.safetensors").is_file()


def test_ctrl_c_while_the_mesh_is_made_says_how_to_go_on(red_ball, tmp_path, capsys, monkeypatch):
    def press(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("text3d_fast.pipelines.surface.choose_threshold", press)
    assert cli.main(["generate", "a ball", "--out", str(tmp_path / "run"), *SMALL]) == INTERRUPTED
    assert "text3d-fast generate 'a ball' --resume" in capsys.readouterr().err


def test_ctrl_c_while_it_loads(tmp_path, capsys, monkeypatch):
    from text3d_fast.pipelines import pipeline

    def press(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "load_prior", press)
    assert cli.main(["generate", "a ball", "--out", str(tmp_path / "run")]) == INTERRUPTED
    assert capsys.readouterr().err.splitlines() == ["loading", "interrupted"] and not (tmp_path / "run").exists()


def test_an_empty_mesh_has_its_own_exit_status(red_ball, tmp_path, capsys):
    words = ["generate", "a ball", "--out", str(tmp_path / "run"), *SMALL, "field.sharpness=1e-9"]
    assert cli.main(words) == EMPTY_MESH
    assert "empty" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["a red mugg", "--model", "analytic"], "did you mean 'mug'"),
    (["a red mugg", "--model", "analytic"], "objects: ball, cube"),
    (["a red mug", "--fine-model", "analytic"], "--fine-model: only --pipeline magic3d has a fine stage"),
    (["a red mug", "--model", "no/such/folder/anywhere"], "no/such/folder/anywhere"),
    (["a red mug", "--model", "analytic", "--set", "guidance.weigth=3"], "guidance.weigth"),
    (["a red mug", "--model", "analytic", "--set", "nonsense"], "NAME=VALUE"),
    (["a red mug", "--model", "analytic", "--steps", "0"], "--steps"),
])
def test_mistakes_are_explained(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", *words]) == USER_ERROR
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_default_folders(tmp_path):
    def folder(resume):
        return default_folder("A red Mug!", resume, tmp_path)

    assert folder(False) == folder(True) == tmp_path / "a-red-mug"
    folder(False).mkdir()
    assert folder(False) == tmp_path / "a-red-mug-2" and folder(True) == tmp_path / "a-red-mug"


def test_doctor_shows_every_op(capsys, monkeypatch):
    from text3d_fast import backends

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "torch" in shown and "composite" in shown and len(backends.table()) >= 6
    assert "GPU none" in shown and {row["device"] for row in backends.table()} == {"cpu"}
    assert cli.main(["doctor", "--model", "no/such/folder/anywhere"]) == USER_ERROR


def test_bench_runs_what_is_named(monkeypatch, capfd):
    monkeypatch.setenv("TEXT3D_BENCH_POINTS", "256")
    monkeypatch.setenv("TEXT3D_BENCH_ROUNDS", "1")
    assert cli.main(["bench", "--only", "L8F4T19-rays-forward-ours-fp16"]) == 0
    assert "1 passed" in capfd.readouterr().out
    assert cli.main(["bench", "--only", "nonesuch"]) == USER_ERROR
    assert "nonesuch" in capfd.readouterr().err


def test_benchmark_table(tmp_path):
    stats = {"min": 1.0, "median": 2.0, "mean": 2.5, "stddev": 0.1, "rounds": 3}
    (tmp_path / "b.json").write_text(json.dumps({"benchmarks": [{"name": "n", "group": "g", "stats": stats}]}))
    write_benchmark_csv(tmp_path / "b.json", tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text().splitlines()[1] == "n,g,1.0,2.0,2.5,0.1,3"


def test_magic3d_and_its_edit(red_ball, tmp_path, capsys, monkeypatch):
    from text3d_fast.pipelines import magic3d, mesh_stage

    asked = []
    monkeypatch.setattr(magic3d, "load_prior", lambda model, device, options: asked.append(model) or RedBall())
    monkeypatch.setattr(mesh_stage, "choose_threshold", lambda *_: ("auto", 1.0))
    run = ("mesh_resolution", "preview_every", "checkpoint_every")
    small = [text if text.startswith(run) else f"coarse.{text}" for text in SMALL[1:]]
    small = ["--set", *small, "fine.steps=10", "fine.size=24", "fine.surface.resolution=16"]
    out = tmp_path / "run"
    assert cli.main(["generate", "a ball", "--pipeline", "magic3d", "--out", str(out), *small]) == 0
    figures = json.loads((out / "result.json").read_text())
    assert figures["guidance"] == {"coarse": "red ball", "fine": "red ball"} and asked == ["analytic-fine"]
    assert cli.main(["edit", str(out), "a red ball", "--out", str(tmp_path / "edit")]) == 0
    edited = json.loads((tmp_path / "edit" / "result.json").read_text())
    assert edited["edited"] == str(out) and edited["steps"] == 3 and edited["prompt"] == "a red ball"
    capsys.readouterr()
    assert cli.main(["edit", str(tmp_path / "edit-of-nothing"), "a ball"]) == USER_ERROR
    assert "config.yaml" in capsys.readouterr().err


def prolific(*more):
    """The options of a run of prolificdreamer that takes seconds."""
    of_run = ("mesh_resolution", "preview_every", "checkpoint_every")
    small = [text if text.startswith(of_run) else f"vsd.{text}" for text in SMALL[1:]]
    surfaces = [f"{stage}.{name}" for stage in ("geometry", "texturing")
                for name in ("steps=2", "size=24", "surface.resolution=16")]
    return ["generate", "a ball", "--pipeline", "prolificdreamer", *more, "--set", *small, *surfaces]


def test_particles(red_ball, tmp_path, monkeypatch, capsys):
    from text3d_fast.pipelines import mesh_stage

    monkeypatch.setattr(mesh_stage, "choose_threshold", lambda *_: ("auto", 1.0))
    out = tmp_path / "run"
    assert cli.main(prolific("--particles", "3", "--out", str(out))) == 0
    assert {"mesh.glb", "mesh-2.glb", "mesh-3.glb", "turntable-3.gif"} <= {path.name for path in out.iterdir()}
    figures = json.loads((out / "result.json").read_text())
    assert figures["particles"] == 3 and len(figures["assets"]) == 3 and figures["pipeline"] == "prolificdreamer"
    lines = capsys.readouterr().err
    assert all(f"{stage}: step" in lines for stage in ("vsd", "geometry", "texturing"))
    # one stage alone, and the next one from its folder
    assert cli.main(prolific("--particles", "2", "--stage", "vsd", "--out", str(tmp_path / "vsd"))) == 0
    begin = ["--stage", "geometry", "--start", str(tmp_path / "vsd"), "--particles", "2"]
    assert cli.main(prolific(*begin, "--out", str(tmp_path / "geometry"))) == 0
    assert (tmp_path / "geometry" / "mesh-2.glb").is_file()


@pytest.mark.parametrize("words, message", [
    (["--particles", "2"], "--particles: only --pipeline prolificdreamer has it"),
    (["--preset", "small"], "--preset: only --pipeline prolificdreamer has it"),
    (["--pipeline", "prolificdreamer", "--particles", "0"], "particles: expected"),
    (["--pipeline", "prolificdreamer", "--particles", "-1"], "particles: expected"),
    (["--pipeline", "prolificdreamer", "--stage", "coarse"], "stage: expected one of vsd, geometry, texturing"),
    (["--pipeline", "prolificdreamer", "--stage", "texturing"], "the stage texturing begins with a finished"),
])
def test_mistakes_about_particles(red_ball, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "a ball", *words]) == USER_ERROR
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_presets(red_ball, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "250")
    words = ["generate", "a ball", "--pipeline", "prolificdreamer", "--help-settings"]

    def settings(*more):
        assert cli.main([*words, *more]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        return {row[0]: row[1] for row in rows if len(row) > 1}

    plain, small, scene = settings(), settings("--preset", "small"), settings("--preset", "scene")
    assert plain["vsd.steps"] != small["vsd.steps"] == "500" and small["mesh_resolution"] == "96"
    assert small["texturing.size"] == "128" and scene["vsd.field.blob_profile"] == "gaussian"
    # what is asked for by name wins over the preset
    assert settings("--preset", "small", "--set", "vsd.steps=7")["vsd.steps"] == "7"
    assert settings("--preset", "small", "--particles", "4")["particles"] == "4"


def test_version_and_settings(red_ball, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["--version"]) == 0 and "text3d-fast" in capsys.readouterr().out
    assert cli.main(["generate", "a ball", "--help-settings", "--set", "guidance.weight=3"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "guidance.weight" in shown and "--set" in shown and "recipe exact" in shown


def test_brackets_in_a_prompt_are_printed_as_typed(red_ball, tmp_path, capsys):
    assert cli.main(["generate", "a [red] ball [/]", "--out", str(tmp_path / "run"), *SMALL]) == 0
    lines = capsys.readouterr().err
    assert "a [red] ball [/]" in lines and "step 3 of 3" in lines and "exporting" in lines  # lines: no terminal here


@pytest.mark.parametrize("words, message", [
    (["--threads", "0"], "--threads: expected 1 to"), (["--threads", "1000000000000"], "--threads"),
    (["--seed", "9223372036854775808"], "seed: expected"), (["--set", "guidance.weight=nan"], "guidance.weight"),
    (["--set", "mesh_resolution=15"], "multiple of 4"),
])
def test_absurd_numbers_are_refused(red_ball, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "a ball", *words]) == USER_ERROR
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_shell_completion():
    words = [sys.executable, "-m", "text3d_fast", "--tyro-print-completion", "bash"]
    script = subprocess.run(words, capture_output=True, text=True).stdout
    ask = 'COMP_WORDS=(text3d-fast generate --pi); COMP_CWORD=2; _tyro_text3d_fast; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True)
    assert done.stdout.split()[:1] == ["--pipeline"] and done.stdout.count("\n") == 1


def test_doctor_lists_the_words(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["doctor", "--words"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["objects", "ball"] for line in lines)
    assert any("mug" in line and "cup, beaker" in line for line in lines) and "a red ball on a blue cube" in lines[-1]


def test_mp4(red_ball, tmp_path, monkeypatch, capsys):
    from text3d_fast.pipelines import pictures

    small = pictures.turntable
    monkeypatch.setattr(pictures, "turntable", lambda mesh, cameras, frames, size: small(mesh, cameras, 3, 16))
    words = ["generate", "a ball", "--out", str(tmp_path / "run"), "--mp4", *SMALL]
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert cli.main(words) == USER_ERROR and not (tmp_path / "run").exists()
    assert "pip install 'text3d-fast[video]'" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("imageio_ffmpeg", reason="the extra `video` is not installed")
    import imageio.v3

    from text3d_fast.images import write_video

    frames = torch.zeros(5, 17, 16, 3)
    frames[:, :, :, 0] = 1
    write_video(tmp_path / "red.mp4", frames, fps=10)
    seen = imageio.v3.imread(tmp_path / "red.mp4", plugin="FFMPEG")
    assert seen.shape == (5, 16, 16, 3) and seen[..., 0].min() > 200 and seen[..., 1].max() < 60


@pytest.mark.parametrize("given, spins", [
    ({}, "2000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_waiting_threads_spin_briefly_unless_told_otherwise(given, spins):
    code = ("import os, sys, text3d_fast.app as app\n"
            "from text3d_fast.app import cli\n"
            "cli.main = lambda: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)\n"
            "app.main()")
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean | given)
    assert done.stdout.split() == [spins, "False"], done.stderr


def test_a_reader_that_has_enough_gets_no_traceback():
    command = [sys.executable, "-m", "text3d_fast", "generate", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_options_that_are_given_twice_count_twice():
    given = ["generate", "a mug", "--set", "a=1", "b=-2", "--steps", "5", "--set=c=3", "--quiet", "--set", "d=4"]
    assert cli.together(given, "--set") == ["generate", "a mug", "--steps", "5", "--quiet", "--set", "a=1", "b=-2",
                                            "c=3", "d=4"]
    assert cli.together(["view", "x.glb", "--set"], "--set") == ["view", "x.glb", "--set"]
