"""From `--model` to a prior, and what that prior wants: its words, its cameras, its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from text3d_fast.guidance import Prior

ANALYTIC = "analytic"
TOYBOX = "toybox"


def toybox_weights() -> Path | None:
    """The folder of the learned Toybox model that ships with the package, None if it does not."""
    from text3d_fast.toybox.learned import WEIGHTS

    return WEIGHTS if (WEIGHTS / "unet" / "config.json").is_file() else None


def load_prior(model: str | None, device: torch.device | str = "cpu") -> tuple[Prior, str]:
    """A prior and the name to save for it.

    model: None or "toybox" for the learned Toybox prior; "analytic" for the exact one; otherwise a folder, a
    .safetensors file or a hub id for guidance.DiffusionPrior.
    """
    if model is None:
        model = TOYBOX
    if model == ANALYTIC:
        from text3d_fast.toybox.analytic import AnalyticPrior

        return AnalyticPrior(), ANALYTIC
    from text3d_fast.guidance.models.diffusion import DiffusionPrior

    source: Any = model
    if model == TOYBOX:
        source = toybox_weights()
        if source is None:
            raise ValueError("model: this copy of the package ships no Toybox weights; use --model analytic")
    return DiffusionPrior.from_pretrained(source, device=device), model


def known_conditions(prior: Prior) -> set[str]:
    """Which of "camera" and "background" the prior makes use of."""
    conditions = getattr(prior, "conditions", None)
    if conditions is None:
        conditions = getattr(getattr(prior, "settings", None), "conditions", None)
    if conditions is None and is_analytic(prior):
        conditions = ("camera", "background")
    return set(conditions or ())


def is_analytic(prior: Prior) -> bool:
    from text3d_fast.toybox.analytic import AnalyticPrior

    return isinstance(prior, AnalyticPrior)


def speaks_toybox(prior: Prior) -> bool:
    """Whether prompts must be in Toybox's small language."""
    name = getattr(getattr(prior, "settings", None), "name", None)
    return is_analytic(prior) or (name or "").lower().startswith("toybox")


def canonical_prompt(prior: Prior, prompt: str) -> str:
    """The prompt in the prior's words. Raises ValueError, with the vocabulary and the nearest word, if it has none."""
    if not prompt.strip():
        raise ValueError("prompt: expected some words, got an empty text")
    if speaks_toybox(prior):
        from dataclasses import replace

        from text3d_fast.toybox.captions import caption, parse

        return caption(replace(parse(prompt), view=None))
    return " ".join(prompt.split())
