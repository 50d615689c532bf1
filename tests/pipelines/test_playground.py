"""The 2D playground on a Gaussian prior whose answers are known, its figures and its command line."""

import csv
import json

import pytest
import torch
from PIL import Image
from tiny_models import save_model

from text3d_fast.app.cli import main
from text3d_fast.app.commands.outcome import INTERRUPTED
from text3d_fast.errors import ModelError
from text3d_fast.guidance import NoiseSchedule, Prior, register_prior
from text3d_fast.pipelines import playground
from text3d_fast.pipelines.playground import Playground


class Colour(Prior):
    """The exact denoiser of one grey-blue picture with a text, and of a Gaussian round grey without one."""

    name, kind, image_size = "colour", "exact", 8
    schedule = NoiseSchedule.cosine()
    color = torch.tensor([0.3, 0.4, 0.6])[:, None, None] * 2 - 1

    def encode(self, images):
        return images.permute(0, 3, 1, 2) * 2 - 1

    def decode(self, x):
        return (x / 2 + 0.5).permute(0, 2, 3, 1)

    def predict_noise(self, x_t, t, conditions):
        alpha, sigma = (value.to(x_t)[:, None, None, None] for value in self.schedule.alpha_sigma(t))
        known = torch.tensor([bool(text) for text in conditions.texts])[:, None, None, None]
        wide = torch.where(known, 0.02**2, 0.5**2)
        mean = torch.where(known, self.color, 0.0)
        return sigma * (x_t - alpha * mean) / (alpha**2 * wide + sigma**2)


@pytest.mark.parametrize("method", playground.METHODS)
def test_every_method_finds_the_colour(method):
    told = []
    make = Playground(Colour(), "a thing", count=3, steps=80, sampling_steps=20, report=lambda *args: told.append(args))
    plain = method in ("ancestral", "sds", "vsd")
    pictures = make.pictures(method, 0.0 if plain else None)
    assert pictures.shape == (3, 8, 8, 3)
    mean = pictures.mean((0, 1, 2))
    if plain:  # without guidance they find it
        torch.testing.assert_close(mean, torch.tensor([0.3, 0.4, 0.6]), atol=0.02, rtol=0)
    elif method != "bridge":  # guidance goes on in its direction; the bridge's other text means the same here
        assert mean[0] < 0.4 and mean[2] > 0.6
    steps = 20 if method == "ancestral" else 80
    assert told[-1][1:] == (steps, steps) and playground.METHODS[method][0] in told[0][0]
    if method in ("ancestral", "vsd"):
        assert torch.equal(pictures, make.pictures(method, 0.0))  # a seed means the same every time


def test_figures():
    grey, red = torch.full((2, 4, 4, 3), 0.5), torch.tensor([1.0, 0, 0]).expand(2, 4, 4, 3)
    assert playground.saturation(grey) == 0 and playground.saturation(red) == 1
    assert playground.sharpness(grey) == 0
    checks = ((torch.arange(4)[:, None] + torch.arange(4)) % 2).float()[None, :, :, None].expand(1, 4, 4, 3)
    assert playground.sharpness(checks) == pytest.approx(4.0)
    assert playground.diversity(grey) == 0 and playground.diversity(grey[:1]) == 0
    assert playground.diversity(torch.stack([grey[0] * 0, grey[0] * 2])) == pytest.approx(1.0)
    assert playground.mosaic(torch.rand(3, 4, 5, 3), 2).shape == (16, 20, 3)


def test_the_command_writes_pictures_and_the_table(tmp_path, capsys):
    register_prior("colour", lambda device: Colour())
    words = ["playground", "a thing", "--model", "colour", "--count", "2", "--steps", "3", "--weights", "1", "5"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"figure7.png", "grid.png", "table.csv", "table.json", "run.log"}
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(row["method"], row["weight"]) for row in rows[6:]] == [
        (method, weight) for method in ("ancestral", "sds", "vsd") for weight in (1.0, 5.0)]
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == [row["method"] for row in rows]
    said = capsys.readouterr().err
    assert "ancestral" in said and "ancestral sampling, w = 6.5: step 1 of 25; 0 of 12 sets of pictures done" in said
    assert main([*words, "--count", "0", "--out", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def test_latents_of_a_model(tmp_path):
    model = save_model(tmp_path / "model")
    words = ["playground", "a mug", "--model", str(model), "--count", "2", "--steps", "2", "--no-grid", "--quiet"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["method"] for row in rows] == list(playground.METHODS)
    with Image.open(tmp_path / "out" / "figure7.png") as picture:
        assert picture.size == (3 * (2 * 32 * 4 + 4) + 4, 2 * (32 * 4 + 16 + 4) + 4)  # 32 pixels, four times as wide


def test_ctrl_c_keeps_what_is_done(tmp_path, capsys):
    class Stopped(Colour):
        calls = 0

        def predict_noise(self, x_t, t, conditions):
            Stopped.calls += 1
            if Stopped.calls > 25 + 2:  # sampling is done, SDS is in its third step
                raise KeyboardInterrupt
            return super().predict_noise(x_t, t, conditions)

    register_prior("stopped", lambda device: Stopped())
    words = ["playground", "a thing", "--model", "stopped", "--count", "2", "--steps", "5", "--no-grid"]
    assert main([*words, "--out", str(tmp_path / "out")]) == INTERRUPTED
    assert "Stopped; 1 of 6 sets of pictures are done" in capsys.readouterr().err
    assert [row["method"] for row in json.loads((tmp_path / "out" / "table.json").read_text())] == ["ancestral"]
    assert (tmp_path / "out" / "figure7.png").is_file()


def test_brackets_in_a_name_are_no_markup(tmp_path, capsys):
    class Slow(Colour):
        def seconds_a_picture(self):
            return 1e5

    register_prior("my [red] model", lambda device: Slow())
    words = ["playground", "a thing", "--model", "my [red] model", "--count", "1", "--steps", "1", "--no-grid"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "warning: my [red] model takes about 167 hours for these on this CPU" in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_said_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["playground", "a thing", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot make the folder" in capsys.readouterr().err


def test_blocks_leave_no_lattice():
    """A prior that errs in one place of each block of 4 x 4 as if it were brighter."""
    class Blocks(Colour):
        def predict_noise(self, x_t, t, conditions):
            noise = super().predict_noise(x_t, t, conditions)
            noise[..., ::4, ::4] -= 0.3
            return noise

    picture = Playground(Blocks(), "a thing", count=1, steps=80).pictures("sds", 0.0)[0]
    lattice = picture.reshape(2, 4, 2, 4, 3).mean((0, 2, 4))
    assert (lattice - lattice.mean()).abs().max() < 0.02  # seen in the same blocks: 0.13


def test_the_model_is_loaded_as_it_is_asked_for(tmp_path, monkeypatch, capsys):
    def load(model, device, options, decoder):
        raise ModelError(f"dtype {options.dtype}, lora {options.lora}")

    monkeypatch.setattr("text3d_fast.guidance.load_prior", load)
    words = ["playground", "a thing", "--out", str(tmp_path / "out"), "--set"]
    assert main([*words, "prior.dtype=bfloat16", "prior.lora=[a.safetensors]"]) != 0
    assert "dtype bfloat16, lora ('a.safetensors',)" in capsys.readouterr().err
    for command in (words, ["evaluate", "--set"]):
        assert main([*command, "guidance.weight=3"]) == 2
        assert "--set guidance.weight: only prior.*" in capsys.readouterr().err
