"""Where models are found: names of weight files, hub repositories online and from the cache, pages, damaged folders."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import safetensors.torch
import torch
from loopback_hub import LoopbackHub
from tiny_models import save_model, save_single_file

from text3d_fast.errors import ModelError, ModelWarning
from text3d_fast.guidance import Conditions, DiffusionPrior, open_model
from text3d_fast.guidance.models.weights import choose_weights
from text3d_fast.toybox.learned import WEIGHTS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model", unet={"use_linear_projection": True})


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def answer(prior):
    x = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16)
    return prior.predict_noise(x, torch.tensor([0.5]), Conditions(["a red mug"]))


def shard(folder, name, half=False):
    """Replace a component's one file by two of these names ({} is the number), or one, as fp16 if it is to be."""
    (file,) = folder.glob("*.safetensors")
    weights = {key: value.half() if half else value for key, value in safetensors.torch.load_file(file).items()}
    file.unlink()
    keys = sorted(weights)
    parts = [keys] if "{}" not in name else [keys[:5], keys[5:]]
    for number, part in enumerate(parts, 1):
        safetensors.torch.save_file({key: weights[key] for key in part}, folder / name.format(number))


F = "diffusion_pytorch_model"


@pytest.mark.parametrize(("names", "half", "chosen"), [
    ([f"{F}.safetensors", f"{F}.fp16.safetensors", f"{F}.non_ema.safetensors"], False, [f"{F}.safetensors"]),
    ([f"{F}.safetensors", f"{F}.fp16.safetensors"], True, [f"{F}.fp16.safetensors"]),
    ([f"{F}.fp16.safetensors", f"{F}.fp16.safetensors.index.json"], False, [f"{F}.fp16.safetensors"]),
    (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], False,
     ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]),
    (["model-00002-of-00002.fp16.safetensors", "model-00001-of-00002.fp16.safetensors", "model.safetensors"], True,
     ["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"]),
    # half precision is wanted and not whole: the other is
    (["model.fp16-00001-of-00002.safetensors", "model.safetensors"], True, ["model.safetensors"]),
])
def test_one_whole_set_of_weights_is_chosen(names, half, chosen):
    assert choose_weights(names, half, "unet") == chosen


def test_what_a_set_lacks_is_named():
    with pytest.raises(ModelError, match=r"unet/model.fp16-00002-of-00003.safetensors is missing \(2 of 3\)"):
        choose_weights(["model.fp16-00001-of-00003.safetensors"], True, "unet")
    with pytest.raises(ModelError, match="no .safetensors weights in vae/"):
        choose_weights([f"{F}.bin", "config.json"], False, "vae")


@pytest.mark.parametrize("name", [
    F + "-{:0>5}-of-00002.fp16.safetensors".replace("{:0>5}", "0000{}"), F + ".fp16-0000{}-of-00002.safetensors",
    F + "-0000{}-of-00002.safetensors", F + ".fp16.safetensors",
])
def test_shards_and_variants_load_under_all_their_names(model, copy, name):
    shard(copy / "unet", name, half="fp16" in name)
    shard(copy / "text_encoder", name.replace(F, "model"), half="fp16" in name)
    expected = answer(DiffusionPrior.from_pretrained(model))
    torch.testing.assert_close(answer(DiffusionPrior.from_pretrained(copy)), expected, rtol=0, atol=0.01)


def test_missing_shards_are_said_before_anything_is_loaded(copy):
    shard(copy / "unet", F + ".fp16-0000{}-of-00002.safetensors", half=True)
    (copy / "unet" / f"{F}.fp16-00002-of-00002.safetensors").unlink()
    for ask in (lambda: open_model(copy).describe(), lambda: DiffusionPrior.from_pretrained(copy)):
        with pytest.raises(ModelError, match="copy: unet/.*fp16-00002-of-00002.safetensors is missing"):
            ask()


def test_pointers_and_missing_parts_are_named(copy):
    (file,) = (copy / "unet").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167536\n")
    with pytest.raises(ModelError, match="Git LFS pointer, not the weights themselves: run `git lfs pull`"):
        DiffusionPrior.from_pretrained(copy)
    file.write_bytes(whole)
    (copy / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer/ holds no vocabulary"):
        DiffusionPrior.from_pretrained(copy)
    shutil.rmtree(copy / "vae")
    shutil.copytree(copy / "unet", copy / "vae" / "nothing")  # a folder of the name alone
    with pytest.raises(ModelError, match="vae/config.json is missing|tokenizer/"):
        open_model(copy)


def test_a_latent_model_without_vae_is_incomplete(copy):
    shutil.rmtree(copy / "vae")
    with pytest.raises(ModelError, match="incomplete, vae/ is missing"):
        open_model(copy)


def test_old_names_of_vae_attention_load(model, copy):
    """diffusers renamed them; the files on the hub were not."""
    (file,) = (copy / "vae").glob("*.safetensors")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for key, value in safetensors.torch.load_file(file).items():
        for new, old in names.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        weights[key] = value
    safetensors.torch.save_file(weights, file)
    images = torch.rand(1, 32, 32, 3)
    expected = DiffusionPrior.from_pretrained(model).encode(images)
    torch.testing.assert_close(DiffusionPrior.from_pretrained(copy).encode(images), expected)


def test_distilled_models_are_warned_of(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    content = json.loads(path.read_text())
    for change in ({"_class_name": "LCMScheduler"}, {"timestep_spacing": "trailing"}):
        path.write_text(json.dumps(content | change))
        with pytest.warns(ModelWarning, match="distilled to few steps"):
            DiffusionPrior.from_pretrained(copy)
        assert "distilled" in open_model(copy).describe()["warning"]
    zero = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    path.write_text(json.dumps(content | zero))
    assert "warning" not in open_model(copy).describe()


def test_a_home_folder_and_pages_are_understood(model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    assert open_model("~/model").image_size == 32
    with pytest.raises(ModelError, match="not a model's page on the hub; fetch its .safetensors file"):
        open_model("https://example.org/models/12")


SCRIPT = """
import sys, torch
from text3d_fast.guidance import Conditions, DiffusionPrior, open_model
for model in sys.argv[1:]:
    what, _, name = model.partition("=")
    if what == "page":
        print(open_model(name, config="someone/model", weights=False).describe()["parameters"])
    elif what == "doctor":
        print(open_model(name, dtype=torch.float16, weights=False).describe()["parameters"])
    else:
        prior = DiffusionPrior.from_pretrained(name, dtype=what or None)
        x = torch.ones(1, prior.channels, 16, 16)
        print(float(prior.predict_noise(x, torch.tensor([0.5]), Conditions(["a mug"])).mean()))
"""


def ask(hub, home, *models, offline=False):
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
                                "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1" if offline else "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *models], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "%|" not in done.stderr.replace("Downloading", "").replace("Fetching", "") or not offline
    return done.stdout.splitlines()


def weights_of(hub):
    """What was fetched of weights."""
    return sorted(name for name in hub.fetched if name.endswith(".safetensors"))


def test_a_hub_repository_online_and_from_the_cache(model, copy, tmp_path):
    """With fp16, full and non_ema weights: only what is needed is fetched, and is enough without a network."""
    for part, stem in (("unet", F), ("vae", F), ("text_encoder", "model")):
        whole = copy / part / f"{stem}.safetensors"
        weights = safetensors.torch.load_file(whole)
        safetensors.torch.save_file({key: value.half() for key, value in weights.items()},
                                    copy / part / f"{stem}.fp16.safetensors")
        shutil.copy(whole, copy / part / f"{stem}.non_ema.safetensors")
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker" / "model.safetensors").write_bytes(b"x")
    home = tmp_path / "home"
    (tmp_path / "files").mkdir()
    save_single_file(model, tmp_path / "files" / "whole.safetensors")
    own = {"someone/files": tmp_path / "files", "someone/toybox": WEIGHTS}
    with LoopbackHub({"someone/model": copy} | own) as hub:
        counts = open_model(model).describe()["parameters"]
        page = f"{hub.address}/someone/files/blob/main/whole.safetensors"
        assert ask(hub, home, "doctor=someone/model", f"page={page}") == [str(counts)] * 2
        assert weights_of(hub) == ["someone/files/whole.safetensors"]
        online = ask(hub, home, f"float16={hub.address}/someone/model/tree/main", "=someone/toybox")
        assert weights_of(hub)[1:] == [
            "someone/model/text_encoder/model.fp16.safetensors", f"someone/model/unet/{F}.fp16.safetensors",
            f"someone/model/vae/{F}.fp16.safetensors",
            "someone/toybox/text_encoder/model.safetensors", f"someone/toybox/unet/{F}.safetensors"]
    offline = ask(hub, home, "float16=someone/model", "=someone/toybox", "=someone/model", offline=True)
    assert offline[:2] == online
