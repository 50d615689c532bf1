"""`generate --prompts FILE --seeds ...`: one folder each, an index, a contact sheet, and going on where it stopped."""

import json

import numpy as np
import pytest
from PIL import Image
from red_ball import TINY, RedBall

from text3d_fast.app import cli
from text3d_fast.app.commands.batch import Batch
from text3d_fast.app.commands.outcome import EMPTY_MESH, INTERRUPTED, USER_ERROR
from text3d_fast.pipelines import pictures, pipeline, results, surface

SMALL = ["--set", *(f"{name}={list(value) if isinstance(value, tuple) else value}"
                    for name, value in (TINY | {"steps": 3}).items())]


@pytest.fixture(autouse=True)
def red_ball(monkeypatch):
    monkeypatch.setattr(pipeline, "load_prior", lambda model, device, options: RedBall())
    monkeypatch.setattr(surface, "choose_threshold", lambda *_: ("auto", 1.0))
    monkeypatch.setattr(results, "views", lambda mesh, cameras: pictures.views(mesh, cameras, size=8))
    monkeypatch.setattr(results, "turntable", lambda mesh, cameras: pictures.turntable(mesh, cameras, 2, size=8))


def index(folder):
    return [(row["folder"], row["status"]) for row in json.loads((folder / "index.json").read_text())]


def test_every_prompt_with_every_seed(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("a ball\n\n# no prompt\na [red] ball\na ball\n")
    out = tmp_path / "all"
    words = ["generate", "--prompts", str(tmp_path / "list.txt"), "--seeds", "0", "5", "--out", str(out), *SMALL]
    assert cli.main(words) == 0
    names = ["a-ball-seed-0", "a-ball-seed-5", "a-red-ball-seed-0", "a-red-ball-seed-5"]
    assert index(out) == [(name, "done") for name in names]
    assert json.loads((out / "a-red-ball-seed-5" / "result.json").read_text())["seed"] == 5
    sheet = np.asarray(Image.open(out / "contact.png").convert("RGB")).astype(int)
    assert sheet.shape[1] > 4 * 256 and sheet.shape[0] < 300
    for column in range(4):  # something before the white in each
        assert sheet[130, 4 + 260 * column + 128].max() < 200
    capsys.readouterr()
    assert cli.main(words) == USER_ERROR and "continue them with --resume" in capsys.readouterr().err
    assert cli.main([*words, "--resume"]) == 0
    assert "a ball" not in capsys.readouterr().err  # all done: nothing runs again
    (tmp_path / "list.txt").write_text("a ball\na red ball\na blue ball\n")  # other prompts: runs are added
    assert cli.main([*words, "--resume"]) == 0
    assert len(index(out)) == 8 and capsys.readouterr().err.count("done in") == 4


def test_an_interrupted_batch_goes_on(tmp_path, capsys, monkeypatch):
    from text3d_fast.app import progress

    original, calls = progress.Progress.step, []

    def press(self, step, state):
        original(self, step, state)
        calls.append(step)
        if len(calls) == 5:  # in the second run
            state.stop()

    monkeypatch.setattr(progress.Progress, "step", press)
    out = tmp_path / "all"
    words = ["generate", "a ball", "--seeds", "0", "1", "2", "--out", str(out), *SMALL]
    assert cli.main(words) == INTERRUPTED
    error = " ".join(capsys.readouterr().err.split())
    assert f"--resume --out {out} --seeds 0 1 2" in error and str(out / "a-ball-seed-1") in error
    assert [status for _, status in index(out)] == ["done", "waiting", "waiting"]
    left, mine = out / ".contact.a1b2c3d4.png", out / ".notes.txt"  # as kill -9 would leave it
    left.write_text("half")
    mine.write_text("mine")
    assert cli.main([*words, "--resume"]) == 0
    assert not left.exists() and mine.exists()
    assert [status for _, status in index(out)] == ["done"] * 3 and calls == [1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert cli.main([*words, "--resume", "--steps", "5"]) == 0  # more steps for all of them
    assert calls[9:] == [4, 5] * 3


def test_an_empty_mesh_does_not_end_the_batch(tmp_path, monkeypatch, capsys):
    levels = iter([(None, 0.0), ("auto", 1.0)])
    monkeypatch.setattr(surface, "choose_threshold", lambda *_: next(levels))
    assert cli.main(["generate", "a ball", "--seeds", "0", "1", "--out", str(tmp_path / "x"), *SMALL]) == EMPTY_MESH
    assert [status for _, status in index(tmp_path / "x")] == ["empty", "done"]
    assert "the mesh is empty" in capsys.readouterr().err


def test_a_prompt_without_words_is_refused_before_the_first_step(tmp_path, monkeypatch, capsys):
    def canonical(self, prompt):
        if "?" in prompt:
            raise ValueError(f"unknown word in {prompt!r}")
        return prompt

    monkeypatch.setattr(RedBall, "canonical", canonical)
    (tmp_path / "list.txt").write_text("a ball\na what?\n")
    words = ["generate", "--prompts", str(tmp_path / "list.txt"), "--out", str(tmp_path / "all"), *SMALL]
    assert cli.main(words) == USER_ERROR
    assert "unknown word in 'a what?'" in capsys.readouterr().err and not (tmp_path / "all").exists()


@pytest.mark.parametrize("words, message", [
    ([], "expected a PROMPT or --prompts FILE"), (["a ball", "--prompts", "x.txt"], "got both"),
    (["--prompts", "x.txt"], "--prompts x.txt: cannot read it"), (["--prompts", "none.txt"], "expected a prompt"),
    (["a ball", "--seeds", "0", "1", "--out", "theirs"], "holds no index.json of several runs"),
])
def test_mistakes_are_one_sentence(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.txt").write_text("# nothing\n")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "photo.png").write_text("a picture")
    assert cli.main(["generate", *words]) == USER_ERROR
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["photo.png"]


def test_prompts_that_would_share_a_folder_do_not(tmp_path):
    batch = Batch(["a ball!", "a ball?", "a ball"], [0], tmp_path / "x", resume=False)
    assert [job.out.name for job in batch.jobs] == ["a-ball", "a-ball-2", "a-ball-3"]
