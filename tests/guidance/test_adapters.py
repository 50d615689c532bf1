"""LoRA files in the layouts that users have, against the formula; textual inversions; files that do not fit."""

import json

import pytest
import safetensors.torch
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_models import save_model

from text3d_fast.errors import ModelError
from text3d_fast.guidance import Conditions, DiffusionPrior

RANK = 3
UNET = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "up_blocks.1.attentions.0.proj_in", "mid_block.resnets.0.conv1"]
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


def layers_of(folder):
    """Of each adapted layer: its shape, A and B."""
    from text3d_fast.guidance import open_model
    from text3d_fast.guidance.models.loading import empty_component

    generator, found = torch.Generator().manual_seed(0), {}
    for component, names in (("unet", UNET), ("text_encoder", TEXT)):
        modules = dict(empty_component(component, open_model(folder)).named_modules())
        for name in names:
            inner = name if name in modules else f"text_model.{name}"
            shape = modules[inner].weight.shape
            down = torch.randn(RANK, *shape[1:], generator=generator)
            up = torch.randn(shape[0], RANK, *([1, 1] if len(shape) == 4 else []), generator=generator)
            found[component, name] = down, up
    return found


def kohya(component, name):
    prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
    return [f"{prefix}{name.replace('.', '_')}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")]


def peft(component, name):
    prefix = "unet." if component == "unet" else "text_encoder.text_model."
    return [f"{prefix}{name}.{part}.weight" for part in ("lora_A", "lora_B")]


def older_diffusers(component, name):
    if component == "text_encoder":
        return [f"text_encoder.text_model.{name}.lora_linear_layer.{part}.weight" for part in ("down", "up")]
    if "attn" in name:  # the output projection had no number then
        block, projection = name.removesuffix(".0").rsplit(".", 1)
        return [f"unet.{block}.processor.{projection}_lora.{part}.weight" for part in ("down", "up")]
    return [f"unet.{name}.lora.{part}.weight" for part in ("down", "up")]


def write(path, layers, names, alpha=None, metadata=None):
    weights = {}
    for (component, name), (down, up) in layers.items():
        keys = names(component, name)
        weights[keys[0]], weights[keys[1]] = down, up
        if len(keys) == 3:
            weights[keys[2]] = torch.tensor(float(alpha))
    safetensors.torch.save_file(weights, path, metadata)
    return path


def weight(prior, component, name):
    network = prior.unet if component == "unet" else prior.texts._load()[1]
    modules = dict(network.named_modules())
    return modules[name if name in modules else f"text_model.{name}"].weight


@pytest.mark.parametrize(("names", "alpha", "metadata", "scale"), [
    (kohya, 1.5, None, 0.5), (peft, None, None, 1.0), (older_diffusers, None, None, 1.0),
    (peft, None, {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": 6, "text_encoder.r": RANK,
                                                       "text_encoder.lora_alpha": 6})}, 2.0),
])
def test_a_lora_is_added_to_the_weights(folder, tmp_path, names, alpha, metadata, scale):
    layers = layers_of(folder)
    file = write(tmp_path / "style.safetensors", layers, names, alpha, metadata)
    base, adapted = (DiffusionPrior.from_pretrained(folder, lora=lora) for lora in ([], [f"{file}:0.8"]))
    for (component, name), (down, up) in layers.items():
        before = weight(base, component, name)
        change = torch.einsum("or,ri...->oi...", up.flatten(1), down) * 0.8 * scale
        torch.testing.assert_close(weight(adapted, component, name), before + change, msg=f"{component} {name}")
    other = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    assert torch.equal(weight(adapted, "unet", other), weight(base, "unet", other))
    x, t, conditions = torch.ones(1, 4, 16, 16), torch.tensor([0.5]), Conditions(["a red mug"])
    assert not torch.allclose(base.predict_noise(x, t, conditions), adapted.predict_noise(x, t, conditions))


def test_kohyas_layout_is_read_as_diffusers_reads_it(folder, tmp_path):
    """The same file through diffusers' own loader and its fusing, U-Net only."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    layers = {key: value for key, value in layers_of(folder).items() if key[0] == "unet" and "attn" in key[1]}
    file = write(tmp_path / "style.safetensors", layers, kohya, 1.5)
    unet = DiffusionPrior.from_pretrained(folder, channels_last=False).unet
    state, alphas = Loader.lora_state_dict(safetensors.torch.load_file(file))
    Loader.load_lora_into_unet(state, alphas, unet, adapter_name="style")
    unet.fuse_lora()
    unet.unload_lora()
    mine = DiffusionPrior.from_pretrained(folder, lora=[file]).unet
    for (name, theirs), value in zip(unet.state_dict().items(), mine.state_dict().values(), strict=True):
        torch.testing.assert_close(value, theirs, msg=name)


def test_several_loras_and_half_precision(folder, tmp_path):
    layers = layers_of(folder)
    small = {key: (0.01 * down, up) for key, (down, up) in layers.items()}
    file = write(tmp_path / "style.safetensors", small, peft)
    name = UNET[0]
    base = weight(DiffusionPrior.from_pretrained(folder), "unet", name)
    prior = DiffusionPrior.from_pretrained(folder, lora=[file, f"{file}:-0.5"], dtype=torch.float16)
    down, up = small["unet", name]
    torch.testing.assert_close(weight(prior, "unet", name).float(), base + 0.5 * up @ down, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(("weights", "message"), [
    ({"lora_unet_nowhere.lora_down.weight": (2, 8), "lora_unet_nowhere.lora_up.weight": (8, 2)},
     "of another model: there is no layer nowhere in this unet"),
    ({f"unet.{UNET[0]}.lora_A.weight": (2, 64), f"unet.{UNET[0]}.lora_B.weight": (16, 2)},
     r"of another model: .*to_q is \[16, 16\] there, the file is for \[16, 64\]"),
    ({f"unet.{UNET[0]}.lora_A.weight": (2, 16)}, r"not a plain LoRA in .*to_q \(down\)"),
    ({"lora_unet_x.hada_w1_a": (2, 2)}, "not a plain LoRA .*hada_w1_a"),
    ({"transformer.blocks.0.attn.to_q.lora_A.weight": (2, 16)}, "of another kind of model"),
    ({"first_stage_model.encoder.conv_in.weight": (2, 2)}, "lora: .*a VAE alone"),
    ({"emb_params": (2, 16)}, "lora: .*a textual inversion"),
    ({"a.b": (2, 2)}, "no LoRA: none of its names"),
])
def test_a_wrong_lora_is_answered_in_one_sentence(folder, tmp_path, weights, message):
    file = tmp_path / "style.safetensors"
    safetensors.torch.save_file({key: torch.zeros(shape) for key, shape in weights.items()}, file)
    with pytest.raises(ModelError, match=message) as caught:
        DiffusionPrior.from_pretrained(folder, lora=[file])
    assert "\n" not in str(caught.value)


def test_missing_and_pickled_files_are_said(folder, tmp_path):
    (tmp_path / "style.pt").write_bytes(b"x")
    for option in ("lora", "embeddings"):
        with pytest.raises(ModelError, match=f"{option}: .*none.safetensors: no such file"):
            DiffusionPrior.from_pretrained(folder, **{option: [tmp_path / "none.safetensors"]})
        with pytest.raises(ModelError, match=f"{option}: .*expected a .safetensors file"):
            DiffusionPrior.from_pretrained(folder, **{option: [tmp_path / "style.pt"]})


@pytest.mark.parametrize(("key", "count", "word"), [("emb_params", 3, "swirl"), ("<swirl>", 1, "<swirl>"),
                                                    ("<swirl>", 2, "<swirl>")])
def test_a_textual_inversion_is_a_word(folder, tmp_path, key, count, word):
    """The text encoder is given the file's vectors where the prompt has the word."""
    vectors = torch.randn(count, 16, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "swirl.safetensors"
    safetensors.torch.save_file({key: vectors[0] if count == 1 else vectors}, file)
    prior = DiffusionPrior.from_pretrained(folder, embeddings=[file])
    embedded = prior.texts([f"a {word} mug"])[0]
    tokenizer, encoder = prior.texts._load()
    ids = tokenizer(f"a {' '.join([word, *(f'{word}_{i}' for i in range(1, count))])} mug").input_ids
    assert len(ids) == count + 4  # start, a, mug, end
    table = encoder.get_input_embeddings().weight
    torch.testing.assert_close(table[ids[2 : 2 + count]], vectors)
    padded = tokenizer(f"a {' '.join(tokenizer.convert_ids_to_tokens(ids[2 : 2 + count]))} mug", padding="max_length",
                       max_length=12, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(embedded, encoder(padded)[0][0])
    plain = DiffusionPrior.from_pretrained(folder)
    torch.testing.assert_close(prior.texts(["a red mug"]), plain.texts(["a red mug"]))  # other prompts as before


def test_a_wrong_textual_inversion_is_answered_in_one_sentence(folder, tmp_path):
    file = tmp_path / "swirl.safetensors"
    safetensors.torch.save_file({"emb_params": torch.zeros(2, 768)}, file)
    with pytest.raises(ModelError, match="of another model: vectors of 768 numbers, where the text encoder has 16"):
        DiffusionPrior.from_pretrained(folder, embeddings=[file])
    safetensors.torch.save_file({"mug": torch.zeros(16)}, file)
    with pytest.raises(ModelError, match="'mug' is a word that the tokenizer knows already"):
        DiffusionPrior.from_pretrained(folder, embeddings=[file]).prepare(["a mug"])
    safetensors.torch.save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ModelError, match="embeddings: .*is a LoRA"):
        DiffusionPrior.from_pretrained(folder, embeddings=[file])
