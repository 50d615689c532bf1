"""`doctor --model`: what a model is, what it will need, what it lacks."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_models import save_model

from text3d_fast.app import cli
from text3d_fast.app.commands.outcome import USER_ERROR


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


def test_a_model_is_described_for_a_device_that_is_not_here(folder, capsys):
    words = ["doctor", "--model", str(folder), "--device", "cuda", "--set", "prior.vae_slicing=true"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "peak memory, cuda" in out and "GiB in float16" in out and "TFLOP" in out and "epsilon" in out


def test_what_a_model_lacks_is_one_sentence(folder, tmp_path, capsys):
    import shutil

    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "text_encoder" / "model.safetensors").unlink()
    assert cli.main(["doctor", "--model", str(broken)]) == USER_ERROR
    assert capsys.readouterr().err.strip().endswith(
        "broken: no .safetensors weights in text_encoder/ (pickled .bin and .ckpt files are not read: they can run "
        "code; convert them with diffusers)")
    assert cli.main(["doctor", "--model", str(folder), "--set", "prior.dtype=int8"]) == USER_ERROR
    assert "dtype: expected one of float32, float16, bfloat16, got 'int8'" in capsys.readouterr().err
    assert cli.main(["doctor", "--model", str(folder), "--set", "nonsense"]) == USER_ERROR


def test_a_lora_is_an_option_of_its_own(folder, tmp_path, capsys):
    words = ["generate", "a red mug", "--model", str(folder), "--lora", str(tmp_path / "none.safetensors:0.5")]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == USER_ERROR
    assert f"lora: {tmp_path}/none.safetensors: no such file" in capsys.readouterr().err
