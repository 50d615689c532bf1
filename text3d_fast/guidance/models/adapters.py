"""What users put on top of a model: LoRA files, merged into its weights, and textual inversions, new words of its.

Both are read in the layouts of kohya's trainer and of diffusers and peft, and checked against the model's
configuration before anything is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from text3d_fast.errors import ModelError
from text3d_fast.guidance.models.kinds import is_embedding, is_lora, part_of_a_model
from text3d_fast.guidance.models.weights import safetensors_header

_PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "unet.": "unet",
             "text_encoder.": "text_encoder", "base_model.model.": "unet"}
_PART = re.compile(r"(?:\.processor)?(?P<attention>\.to_\w+?)?(?:_lora|\.lora|\.lora_linear_layer)?"
                   r"(?:\.(?P<old>down|up)|\.lora_(?P<new>A|B|down|up))(?:\.default)?\.weight$|\.(?P<alpha>alpha)$")
_DOWN = {"down", "A"}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file and how strongly it is applied: as written, FILE or FILE:STRENGTH."""

    path: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str | Path) -> LoraFile:
        name, strength = re.fullmatch(r"(.*?)(?::(-?\d*\.?\d+))?", str(text), re.DOTALL).groups()
        file = cls(Path(name).expanduser(), 1.0 if strength is None else float(strength))
        header = _header(file.path, "lora")
        if not is_lora(header):
            what = part_of_a_model(header) or "no LoRA: none of its names is that of one"
            raise ModelError(f"lora: {file.path} is {what}")
        return file

    def merge(self, network: nn.Module, component: str) -> int:
        """W + strength alpha / rank up down, for every layer of "unet" or "text_encoder" that the file is about; how
        many. A network on the meta device is only checked. ModelError if the file is of another model or another kind.
        """
        layers = {name.replace(".", "_"): module for name, module in network.named_modules()
                  if isinstance(module, nn.Linear | nn.Conv2d)}
        with safe_open(str(self.path), "pt") as file:
            rates = _rates(file.metadata() or {}, component)
            parts = self._parts(file.keys(), component)
            for name, keys in parts.items():
                layer = _layer(layers, name)
                if layer is None:
                    raise ModelError(f"lora: {self.path} is of another model: there is no layer {name} in this "
                                     f"{component}")
                if set(keys) - {"alpha"} != {"down", "up"}:
                    raise ModelError(f"lora: {self.path} is not a plain LoRA in {name} ({', '.join(sorted(keys))})")
                down, up = (file.get_tensor(keys[part]).float() for part in ("down", "up"))
                scale = float(file.get_tensor(keys["alpha"])) / len(down) if "alpha" in keys else rates
                self._add(layer, name, down, up, scale)
        return len(parts)

    @torch.no_grad()
    def _add(self, layer: nn.Linear | nn.Conv2d, name: str, down: Tensor, up: Tensor, scale: float) -> None:
        weight = layer.weight
        rank, shape = len(down), tuple(weight.shape)
        fits = up.shape[0] == shape[0] and up.shape[1] == rank and up[0, 0].numel() == 1
        if not fits or down[0].numel() != weight[0].numel():
            raise ModelError(f"lora: {self.path} is of another model: {name} is {list(shape)} there, the file is for "
                             f"{[up.shape[0], *down.shape[1:]]}")
        if not weight.is_meta:
            change = (up.flatten(1) @ down.flatten(1)).reshape(shape) * (self.strength * scale)
            weight.copy_((weight.float().cpu() + change).to(weight.device))

    def _parts(self, keys: Iterable[str], component: str) -> dict[str, dict[str, str]]:
        """layer, with _ for its dots -> "down", "up", "alpha" (or what else there is) -> key in the file."""
        parts: dict[str, dict[str, str]] = {}
        for key in keys:
            prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None)
            if prefix is None:
                raise ModelError(f"lora: {self.path} is of another kind of model ({key})")
            if _PREFIXES[prefix] != component:
                continue
            found = _PART.search(key)
            if found is None:
                raise ModelError(f"lora: {self.path} is not a plain LoRA ({key})")
            name = key[len(prefix):found.start()] + (found["attention"] or "")
            part = "alpha" if found["alpha"] else "down" if (found["old"] or found["new"]) in _DOWN else "up"
            parts.setdefault(name.replace(".", "_"), {})[part] = key
        return parts


def _layer(layers: dict[str, nn.Module], name: str) -> nn.Module | None:
    """The output projection's first part and the text encoder's wrapper are named by some and left out by others."""
    for candidate in (name, f"{name}_0", name.removeprefix("text_model_"), f"text_model_{name}"):
        if candidate in layers:
            return layers[candidate]
    return None


def _rates(metadata: dict[str, str], component: str) -> float:
    """alpha / rank of a file of peft, whose configuration stands in the header; 1 if it does not."""
    try:
        about = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return float(about[f"{component}.lora_alpha"]) / float(about[f"{component}.r"])
    except (ValueError, KeyError, ZeroDivisionError):
        return 1.0


def check_lora(files: Iterable[LoraFile], unet: nn.Module, text_encoder: nn.Module) -> None:
    """ModelError unless each file fits these networks, which are on the meta device."""
    for file in files:
        if file.merge(unet, "unet") + file.merge(text_encoder, "text_encoder") == 0:
            raise ModelError(f"lora: {file.path} holds no layers")


@dataclass(frozen=True)
class WordFile:
    """A textual inversion: `word` stands for `count` vectors of the text encoder's width."""

    path: Path
    key: str
    word: str
    count: int

    @classmethod
    def read(cls, path: str | Path, width: int) -> list[WordFile]:
        """The words of a file; ModelError if it is something else or of another text encoder."""
        path = Path(path).expanduser()
        header = _header(path, "embeddings")
        if not is_embedding(header):
            what = part_of_a_model(header) or "no textual inversion"
            raise ModelError(f"embeddings: {path} is {what}")
        words = []
        for key, entry in header.items():
            shape = entry["shape"]
            if not shape or shape[-1] != width:
                raise ModelError(f"embeddings: {path} is of another model: vectors of {shape[-1] if shape else 1} "
                                 f"numbers, where the text encoder has {width}")
            words.append(cls(path, key, path.stem if key == "emb_params" else key, 1 if len(shape) == 1 else shape[0]))
        return words

    @property
    def tokens(self) -> list[str]:
        return [self.word, *(f"{self.word}_{number}" for number in range(1, self.count))]

    @torch.no_grad()
    def add(self, tokenizer: Any, encoder: Any) -> None:
        """Make the word known to both."""
        known = tokenizer.get_vocab()
        if any(token in known for token in self.tokens):
            raise ModelError(f"embeddings: {self.path}: {self.word!r} is a word that the tokenizer knows already; "
                             f"rename the file or the word in it")
        tokenizer.add_tokens(self.tokens)
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with safe_open(str(self.path), "pt") as file:
            vectors = file.get_tensor(self.key).reshape(self.count, -1)
        table = encoder.get_input_embeddings().weight
        table[tokenizer.convert_tokens_to_ids(self.tokens)] = vectors.to(table)


def spell_out(text: str, words: Iterable[WordFile]) -> str:
    """The text with all tokens of each such word."""
    for word in words:
        if word.count > 1:
            text = re.sub(rf"{re.escape(word.word)}(?!_\d|\w)", lambda _, word=word: " ".join(word.tokens), text)
    return text


def _header(path: Path, option: str) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise ModelError(f"{option}: {path}: no such file")
    if path.suffix != ".safetensors":
        raise ModelError(f"{option}: {path}: expected a .safetensors file (pickled ones can run code and are not read)")
    return safetensors_header(path)
