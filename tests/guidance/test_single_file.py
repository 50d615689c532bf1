"""Stable Diffusion checkpoints in one file: a small model written under the original key names, read back the same."""

import dataclasses

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import safetensors.torch
from tiny_models import save_model, save_single_file

from text3d_fast.errors import ModelError
from text3d_fast.guidance import Conditions, DiffusionPrior, open_model
from text3d_fast.guidance.models import diffusion
from text3d_fast.guidance.models.families import FAMILIES
from text3d_fast.guidance.models.folder import read_folder
from text3d_fast.guidance.models.loading import empty_component, load_tokenizer
from text3d_fast.guidance.models.sources import Found, locate


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The networks are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(the folder, the same weights in one file)."""
    root = tmp_path_factory.mktemp("single")
    folder = save_model(root / "folder", unet={"use_linear_projection": True})
    save_single_file(folder, root / "model.safetensors")
    return folder, root / "model.safetensors"


def test_single_file_is_the_same_model(models):
    folder, file = models
    apart, together = DiffusionPrior.from_pretrained(folder), DiffusionPrior.from_pretrained(file, config=folder)
    images, t = torch.rand(2, 32, 32, 3), torch.tensor([0.3, 0.7])
    torch.testing.assert_close(together.encode(images), apart.encode(images))
    x_t, conditions = torch.randn(2, 4, 16, 16), Conditions(["a red mug", ""])
    expected = apart.predict_noise(x_t, t, conditions)
    torch.testing.assert_close(together.predict_noise(x_t, t, conditions), expected)
    about, truth = together.describe(), apart.describe()
    assert about["parameters"] == truth["parameters"] and about["model"] == str(file)
    half = DiffusionPrior.from_pretrained(file, config=folder, dtype=torch.float16)
    torch.testing.assert_close(half.predict_noise(x_t, t, conditions), expected, rtol=0.02, atol=0.02)


def test_single_file_errors(models, tmp_path):
    folder, file = models
    with pytest.raises(ModelError, match="config: .*no such folder or file"):
        open_model(file, config=tmp_path / "none")
    with pytest.raises(ModelError, match="config: .*is a folder and has its own"):
        open_model(folder, config=folder)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut.safetensors: not a complete safetensors file"):
        open_model(cut, config=folder)
    weights = safetensors.torch.load_file(file)
    xl = tmp_path / "xl.safetensors"
    key = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
    safetensors.torch.save_file(weights | {key: torch.zeros(2)}, xl)
    with pytest.raises(ModelError, match="recognized as xl_base"):
        open_model(xl, config=folder)
    del weights["model.diffusion_model.out.2.bias"]
    safetensors.torch.save_file(weights, tmp_path / "short.safetensors")
    with pytest.raises(ModelError, match="unet (does not fit .*conv_out.bias|cannot be loaded .*weights are missing)"):
        assert DiffusionPrior.from_pretrained(tmp_path / "short.safetensors", config=folder).unet


@pytest.mark.parametrize(("prefixes", "message"), [
    (["first_stage_model."], "a VAE alone, not a whole model"),
    (["model.diffusion_model."], "a U-Net alone, not a whole model"),
    (["cond_stage_model."], "a text encoder alone"),
    (["model.diffusion_model.", "cond_stage_model."], r"holds no VAE \(first_stage_model"),
    (["model.diffusion_model.", "first_stage_model."], r"holds no text encoder \(cond_stage_model"),
])
def test_parts_of_a_checkpoint_are_told(models, tmp_path, prefixes, message):
    folder, file = models
    weights = safetensors.torch.load_file(file)
    part = {key: value for key, value in weights.items() if key.startswith(tuple(prefixes))}
    safetensors.torch.save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(ModelError, match=message):
        open_model(tmp_path / "part.safetensors", config=folder).describe()
    with pytest.raises(ModelError, match=message):
        DiffusionPrior.from_pretrained(tmp_path / "part.safetensors", config=folder)


@pytest.mark.parametrize(("shapes", "message"), [
    ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 8)}, "a LoRA, .*as --lora"),
    ({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": (4, 8)}, "a LoRA, "),
    ({"lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": (4, 8)}, "a LoRA, "),
    ({"emb_params": (2, 16)}, "a textual inversion, .*prior.embeddings=FILE"),
    ({"<mug>": (16,)}, "a textual inversion, "),
    ({"control_model.input_blocks.0.0.weight": (4, 4)}, "a ControlNet, "),
    ({"controlnet_cond_embedding.conv_in.weight": (4, 4), "down_blocks.0.a.b": (1,)}, "a ControlNet, "),
    ({"ip_adapter.1.to_k_ip.weight": (4, 4)}, "an IP-Adapter, "),
    ({"encoder.conv_in.weight": (4, 4), "decoder.conv_in.weight": (4, 4)}, "a VAE alone"),
    ({"down_blocks.0.resnets.0.conv1.weight": (4, 4)}, "a U-Net alone"),
    ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "a diffusion transformer"),
    ({"something.else.weight": (4, 4)}, "not a whole Stable Diffusion checkpoint"),
])
def test_other_files_are_told_in_one_sentence(tmp_path, shapes, message):
    file = tmp_path / "file.safetensors"
    safetensors.torch.save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, file)
    with pytest.raises(ModelError, match=message) as caught:
        open_model(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("markers", "prediction", "zero"), [
    (["v_pred"], "v_prediction", None), (["v_pred", "ztsnr"], "v_prediction", True), ([], "epsilon", None),
])
def test_markers_of_v_prediction_are_heeded(models, tmp_path, markers, prediction, zero):
    folder, file = models
    marked = tmp_path / "marked.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file) | {name: torch.zeros(0) for name in markers}, marked)
    found = open_model(marked, config=folder)
    about = found.describe()
    assert about["prediction"] == prediction and ("zero terminal SNR" in about["noise"]) == bool(zero)
    prior = DiffusionPrior.from_pretrained(marked, config=folder)
    assert prior.prediction_type == prediction
    assert (float(prior.schedule.alpha(torch.ones(1))) < 1e-4) == bool(zero)
    assert open_model(marked, config=folder, prediction="sample").prediction_type == "sample"
    with pytest.raises(ModelError, match="prediction: expected one of epsilon"):
        open_model(marked, config=folder, prediction="eps")


def test_clip_keys_without_their_wrapper_load(models, tmp_path):
    folder, file = models
    weights = {key.replace("transformer.text_model.", "transformer."): value
               for key, value in safetensors.torch.load_file(file).items()}
    assert any(key.startswith("cond_stage_model.transformer.embeddings") for key in weights)
    bare = tmp_path / "bare.safetensors"
    safetensors.torch.save_file(weights, bare)
    x, t, conditions = torch.ones(1, 4, 16, 16), torch.tensor([0.5]), Conditions(["a red mug"])
    answers = [DiffusionPrior.from_pretrained(path, config=folder).predict_noise(x, t, conditions)
               for path in (file, bare)]
    torch.testing.assert_close(*answers)


def family(name):
    found = Found(FAMILIES / name, [*locate(FAMILIES / name).files, "tokenizer/tokenizer.json"])
    return read_folder(found)


@pytest.mark.parametrize(("name", "counts"), [
    ("sd1", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
    ("sd2", {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
])
def test_families_that_ship_have_the_published_sizes(name, counts):
    folder = family(name)
    for component, count in counts.items():
        assert sum(value.numel() for value in empty_component(component, folder).parameters()) == count


def test_the_tokenizer_that_ships_is_clips():
    """Token ids as published with CLIP; 2.x pads with "!", whose id is 0."""
    tokens = {name: load_tokenizer(family(name))("A photo of a cat", padding="max_length").input_ids
              for name in ("sd1", "sd2")}
    assert tokens["sd1"][:8] == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert tokens["sd2"][:8] == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert len(tokens["sd1"]) == len(tokens["sd2"]) == 77


@pytest.mark.parametrize(("answer", "told", "size"), [
    (lambda x: x, "epsilon", 512), (lambda x: 0.07 * x - x.flip(0), "v_prediction", 768),
])
def test_families_of_one_shape_are_told_by_their_answers(models, monkeypatch, answer, told, size):
    """2.1 and 2.1-base: at pure noise a prediction of eps is that noise, one of v is minus a picture."""
    folder, file = models
    found = dataclasses.replace(open_model(file, config=folder), undecided=True)
    assert "told from the weights" in found.describe()["prediction"]
    found.unet = found.unet | {"sample_size": 96}
    found.vae = found.vae | {"block_out_channels": [8, 16, 16, 16]}
    monkeypatch.setattr(diffusion, "open_model", lambda *arguments: found)
    monkeypatch.setattr(DiffusionPrior, "predict", lambda self, x, t, conditions: answer(x))
    prior = DiffusionPrior.from_pretrained(file)
    assert prior.prediction_type == told and prior.image_size == size
