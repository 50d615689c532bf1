"""Priors by name: what `--model` takes. The embedded ones stand here as text and are imported when asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from text3d_fast.errors import ModelError
from text3d_fast.guidance.models.diffusion import DiffusionPrior
from text3d_fast.guidance.models.options import ModelOptions
from text3d_fast.guidance.prior import Prior

DEFAULT = "toybox"
DEFAULT_FINE = "analytic-fine"  # what goes with it in a stage of high resolution: the same pictures, exact and finer
Load = Callable[[torch.device], Prior]
_REGISTERED: dict[str, str | Load] = {
    "toybox": "text3d_fast.toybox.learned:load",
    "analytic": "text3d_fast.toybox.analytic:load",
    "analytic-fine": "text3d_fast.toybox.analytic:load_fine",
}


def register_prior(name: str, load: Load) -> None:
    """Make a prior known under a name: load(device) -> Prior."""
    _REGISTERED[name] = load


def registered_priors() -> list[str]:
    """The names, the default first."""
    return sorted(_REGISTERED, key=lambda name: (name != DEFAULT, name))


def load_prior(
    model: str | None = None, device: torch.device | str = "cpu", options: ModelOptions | None = None,
    decoder: bool = False,
) -> Prior:
    """The prior of a registered name (None: "toybox"), a folder, .safetensors file or hub id; it bears that name.

    options    how a model is loaded; registered priors take none
    decoder    keep what `decode` needs of a latent model
    """
    model, device = model or DEFAULT, torch.device(device)
    given = (options or ModelOptions()).given()
    load = _REGISTERED.get(model)
    if load is None:
        prior: Prior = DiffusionPrior.from_pretrained(model, device=device, decoder=decoder, **given)
    elif given:
        raise ModelError(f"prior.{next(iter(given))}: {model} is built in and takes no such option; it is for "
                         f"diffusion models")
    else:
        if isinstance(load, str):
            module, _, attribute = load.partition(":")
            load = getattr(import_module(module), attribute)
        prior = load(device)
    prior.name = model
    return prior
