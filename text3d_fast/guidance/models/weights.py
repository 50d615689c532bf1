"""Weight files: which of a component's .safetensors to read, whether they are whole, what their headers say."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from text3d_fast.errors import ModelError

# stem[.variant][-00001-of-00002][.variant].safetensors: diffusers and transformers have written both places
_NAME = re.compile(r"(?P<stem>[^.]+?)(?:\.(?P<first>\w+))?(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?"
                   r"(?:\.(?P<last>\w+))?\.safetensors")
_HALF, _FULL = ("fp16", "bf16", ""), ("", "fp16", "bf16")  # variants in the order of preference
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def choose_weights(names: Sequence[str], half: bool, where: str) -> list[str]:
    """Of the file names in a component's folder, those to read: one set, in half precision where that is wanted and
    there, complete. ModelError, with what is missing, if there is none.
    """
    sets: dict[str, dict[tuple[str, int], dict[int, str]]] = {}
    for name in names:
        found = _NAME.fullmatch(name)
        if found:
            variant, count = found["first"] or found["last"] or "", int(found["count"] or 0)
            kinds = sets.setdefault(variant, {})
            kinds.setdefault((found["stem"], count), {})[int(found["number"] or 0)] = name
    lacking = ""
    for variant in _HALF if half else _FULL:
        for (_, count), parts in sorted(sets.get(variant, {}).items(), key=lambda entry: entry[0][1]):
            missing = sorted(set(range(1, count + 1)) - set(parts))
            if not missing:
                return [parts[number] for number in sorted(parts)]
            model = re.sub(r"\d{5}(?=-of-)", f"{missing[0]:05d}", next(iter(parts.values())))
            lacking = lacking or f"{where}/{model} is missing" + (f" ({len(missing)} of {count})" if count > 1 else "")
    raise ModelError(lacking or f"no .safetensors weights in {where}/ (pickled .bin and .ckpt files are not read: they "
                                f"can run code; convert them with diffusers)")


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """name -> {"dtype", "shape", "data_offsets"}; ModelError if the file is cut short or something else."""
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            if start.startswith(b"version https://git-lfs"):
                raise ModelError(f"{path}: a Git LFS pointer, not the weights themselves: run `git lfs pull` in its "
                                 f"repository")
            (length,) = struct.unpack("<Q", start[:8])
            if length > min(total - 8, 100_000_000):
                raise ValueError("its header is longer than the file")
            file.seek(8)
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != total:
            raise ValueError(f"{total} bytes where the header announces {8 + length + end}")
        return header
    except ModelError:
        raise
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a complete safetensors file ({error}); fetch it again") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def plain_folder(config: Path, files: Sequence[Path], stem: str) -> Iterator[Path]:
    """A folder of links where a component's files bear the names that diffusers and transformers look for first.

    What variants and shards are called has changed between their versions; the plain names have not.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").symlink_to(config.resolve())
        if len(files) == 1:
            (folder / f"{stem}.safetensors").symlink_to(files[0].resolve())
        else:
            places, size = {}, 0
            for number, file in enumerate(files, 1):
                shard = f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"
                (folder / shard).symlink_to(file.resolve())
                header = safetensors_header(file)
                places |= dict.fromkeys(header, shard)
                size += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        yield folder
