"""The parts of a model folder as objects: networks, text encoder, noise schedule; broken ones are named."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from text3d_fast.errors import ModelError
from text3d_fast.guidance.models.families import FAMILIES, clip_tokenizer_folder
from text3d_fast.guidance.models.folder import NETWORKS, ModelFolder, vae_factor
from text3d_fast.guidance.models.single_file import load_single_file, load_single_file_text
from text3d_fast.guidance.models.sources import brief
from text3d_fast.guidance.models.weights import STEMS, plain_folder, safetensors_header
from text3d_fast.guidance.schedule import NoiseSchedule

LOGGER = logging.getLogger("text3d_fast.guidance")  # what takes seconds is said here, at INFO
LARGE = 50_000_000  # parameters, from which on loading is said: below it takes less than a second
_WORDS = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder"}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and warnings of diffusers and transformers, which would tear the caller's own lines."""
    import diffusers
    import transformers

    logs = [diffusers.utils.logging, transformers.utils.logging]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def network_and_prior(folder: ModelFolder) -> tuple[type, type]:
    """The classes for the folder's unet/, imported now."""
    found = []
    for name in NETWORKS[folder.unet["_class_name"]]:
        module, _, attribute = name.partition(":")
        found.append(getattr(import_module(module), attribute))
    return found[0], found[1]


def load_schedule(folder: ModelFolder) -> NoiseSchedule:
    from diffusers import DDPMScheduler

    known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
             "rescale_betas_zero_snr")
    try:
        given = {key: folder.scheduler[key] for key in known if folder.scheduler.get(key) is not None}
        scheduler = DDPMScheduler(**given)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise ModelError(f"{folder.source}: scheduler_config.json: {error}") from error
    return NoiseSchedule.from_scheduler(scheduler)


def component_class(name: str, folder: ModelFolder) -> type:
    """The class of "unet", "vae" or "text_encoder"."""
    if name == "unet":
        return network_and_prior(folder)[0]
    if name == "vae":
        return getattr(import_module("diffusers"), folder.vae["_class_name"])
    return getattr(import_module("transformers"), folder.text_encoder["architectures"][0])


def empty_component(name: str, folder: ModelFolder) -> Any:
    """A component as its configuration says, without memory for its weights."""
    import accelerate

    kind = component_class(name, folder)
    try:
        with quiet(), accelerate.init_empty_weights():
            if name == "text_encoder":
                return kind(kind.config_class.from_pretrained(folder.path / name, local_files_only=True))
            return kind.from_config(folder.unet if name == "unet" else folder.vae)
    except Exception as error:
        raise ModelError(f"{folder.source}: {name}/config.json does not describe a {kind.__name__} "
                         f"({brief(error)})") from error


def check_fit(name: str, folder: ModelFolder) -> None:
    """ModelError unless the files of a folder's "unet" or "vae" hold what its configuration asks for."""
    headers = [safetensors_header(file) for file in folder.weight_files(name)]
    there = {key: entry["shape"] for header in headers for key, entry in header.items()}
    wanted = {key: list(value.shape) for key, value in empty_component(name, folder).state_dict().items()}
    if "mid_block.attentions.0.query.weight" in str(there):  # an older diffusers' names in VAEs; it converts them
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            there = {key.replace(f".0.{old}.", f".0.{new}."): shape for key, shape in there.items()}
    wrong = next((key for key in wanted if wanted[key] != there.get(key, wanted[key])), None)
    if wrong is not None:
        raise ModelError(f"{folder.source}: {name} cannot be loaded (size mismatch: {wrong} is {there[wrong]} in the "
                         f"file, {wanted[wrong]} in the configuration)")
    missing = [key for key in wanted if key not in there]
    if missing:
        raise ModelError(
            f"{folder.source}: {name} does not fit its configuration, e.g. {missing[0]} ({len(missing)} in all)"
        )


def load_network(name: str, folder: ModelFolder, dtype: torch.dtype) -> Any:
    """The "unet" or "vae" with every weight present; ModelError otherwise."""
    _say(name, folder, dtype)
    if folder.weights is not None:
        with quiet():
            return load_single_file(folder, name, dtype)
    kind, files = component_class(name, folder), folder.weight_files(name)
    try:
        with quiet(), plain_folder(folder.path / name / "config.json", files, STEMS[name]) as path:
            model, info = kind.from_pretrained(
                path, torch_dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True,
                low_cpu_mem_usage=kind.__module__.startswith("diffusers."),  # own networks compute while they are made
            )
    except Exception as error:  # diffusers and safetensors raise a dozen kinds
        raise ModelError(f"{folder.source}: {name} cannot be loaded ({brief(error)})") from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["error_msgs"]]
    if wrong:
        raise ModelError(
            f"{folder.source}: {name} does not fit its configuration, e.g. {wrong[0]} ({len(wrong)} in all)"
        )
    return model


def load_text_encoder(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(tokenizer, text encoder) of a folder or single file."""
    tokenizer = load_tokenizer(folder)
    _say("text_encoder", folder, dtype)
    if folder.weights is not None:
        with quiet():
            encoder = load_single_file_text(folder, dtype)
    else:
        encoder = _load_folder_text(folder, dtype)
    known, taken = len(tokenizer), encoder.get_input_embeddings().num_embeddings
    if known > taken:
        raise ModelError(f"{folder.source}: the tokenizer knows {known} tokens, the text encoder {taken}: they do not "
                         f"belong together")
    return tokenizer, encoder.to(device).eval().requires_grad_(False)


def _load_folder_text(folder: ModelFolder, dtype: torch.dtype) -> Any:
    files = folder.weight_files("text_encoder")
    for file in files:
        safetensors_header(file)  # a broken file is named before transformers meets it
    try:
        with quiet(), plain_folder(folder.path / "text_encoder" / "config.json", files, STEMS["text_encoder"]) as path:
            # cast here and not afterwards: T5 keeps its `wo` in fp32, which half precision overflows
            encoder, info = component_class("text_encoder", folder).from_pretrained(
                path, torch_dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True,
            )
    except Exception as error:
        raise ModelError(f"{folder.source}: text encoder cannot be loaded ({brief(error)})") from error
    missing = [key for key in info["missing_keys"] if "position_ids" not in key]
    if missing and all(key.startswith("text_model.") for key in missing):
        # written by transformers 5, whose names lack what those of 4 begin with
        state = {f"text_model.{key}": value for file in files for key, value in load_file(file).items()}
        left = encoder.load_state_dict(state, strict=False).missing_keys
        missing = [key for key in left if "position_ids" not in key]
    if missing:
        raise ModelError(
            f"{folder.source}: text_encoder does not fit its configuration, {sorted(missing)[0]} is missing"
        )
    return encoder


def load_tokenizer(folder: ModelFolder) -> Any:
    import transformers

    def read(path: Path) -> Any:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)

    try:
        if folder.path.parent == FAMILIES:
            with clip_tokenizer_folder(folder.path) as path:
                return read(path)
        return read(folder.path / "tokenizer")
    except Exception as error:
        hint = ""
        if (folder.path / "tokenizer" / "spiece.model").exists():
            hint = "; a T5 tokenizer needs sentencepiece and protobuf: pip install 'text3d-fast[t5]'"
        raise ModelError(f"{folder.source}: tokenizer cannot be read ({brief(error)}){hint}") from error


def load_tiny_autoencoder(source: str | Path, folder: ModelFolder, dtype: torch.dtype) -> Any:
    import diffusers

    if folder.vae is None:
        raise ModelError(f"tiny_autoencoder: {folder.source} works on pixels and has no autoencoder to replace")
    path = Path(source).expanduser()
    try:
        with quiet():
            vae = diffusers.AutoencoderTiny.from_pretrained(
                path if path.is_dir() else source, torch_dtype=dtype, low_cpu_mem_usage=False
            )
    except Exception as error:
        raise ModelError(f"tiny_autoencoder: {source} cannot be loaded ({brief(error)})") from error
    made = (vae.config.latent_channels, vae_factor(dict(vae.config)))
    taken = (folder.unet["in_channels"], folder.latent_factor)
    if made != taken:
        raise ModelError(
            f"tiny_autoencoder: {source} makes {made[0]} channels at 1/{made[1]} of the size, "
            f"the model takes {taken[0]} at 1/{taken[1]}"
        )
    return vae


def _say(name: str, folder: ModelFolder, dtype: torch.dtype) -> None:
    """What is about to be loaded, if that takes long."""
    parameters = folder.parameters(name)
    if parameters < LARGE:
        return
    steps = ["text_encoder", *(["vae"] if folder.vae is not None else []), "unet"]
    kind = str(dtype).removeprefix("torch.")
    LOGGER.info("loading the %s of %s (%.0f M parameters, %s), part %d of %d", _WORDS[name], folder.source,
                parameters / 1e6, kind, steps.index(name) + 1, len(steps))
