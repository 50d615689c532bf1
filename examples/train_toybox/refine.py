"""Trains the refiner of a Toybox model: `python -m examples.train_toybox.refine --data DIR --model DIR --out DIR`.

The last part of the training (`guidance.refiner` says what for); the other networks stay as they are. Marks of a few
pixels tell the sides of some classes apart, so a part of the steps sees those classes alone, and errors count more
where the mean image has details. Every few minutes, at the end and on Ctrl-C the folder OUT is written; `--model OUT`
goes on from it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from examples.train_toybox.batches import TrainSettings, training_batch
from examples.train_toybox.dataset import RenderedImages
from examples.train_toybox.details import detailed
from examples.train_toybox.model import UNSHUFFLE, ToyboxModel
from examples.train_toybox.train import noisy_images
from text3d_fast.guidance.prior import Conditions
from text3d_fast.toybox.learned import WEIGHTS

SETTINGS = TrainSettings(learning_rate=1.5e-3, warmup=100, noise_exponent=0.8, overhead=0.3)
FOCUS = 1, 5  # so many of so many steps see the detailed classes only
MARGIN = 2  # cells at the border that are left out: hardly anything is drawn there
MARK_WEIGHT = 5.0


def refining_loss(
    model: ToyboxModel, images: Tensor, conditions: Conditions, generator: torch.Generator,
    noise_exponent: float = SETTINGS.noise_exponent,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the mean squared errors of the clean image before and after the refiner.

    Each value's squared error counts exp(-2.4 t), about as one over that of the U-Net at t, times 1 + MARK_WEIGHT |d|,
    d what the details of the mean image draw there.
    """
    clean, noisy, steps = noisy_images(model, images, generator, noise_exponent)
    conditions = conditions.to(model.device)
    with torch.no_grad():
        text = model.embed(model.token_ids(conditions.texts))
        coarse = model.coarse(noisy, steps, text, conditions)
        marks = torch.zeros_like(clean)
        if model.mean_image.details is not None:
            drawn = model.mean_image.details(text, model.condition_vector(conditions)).abs().mean(1, keepdim=True)
            marks = pixel_unshuffle(drawn, UNSHUFFLE).repeat(1, 3, 1, 1)
    inner = (..., slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))
    refined = model.refine(tuple(part[inner] for part in coarse), noisy[inner], steps, text, conditions)
    error = (refined - clean[inner]).square()
    weight = 4 * torch.exp(-2.4 * steps / 1000)
    loss = (weight * (error * (1 + MARK_WEIGHT * marks[inner])).mean((1, 2, 3))).mean()
    return loss, (coarse[0] - clean)[inner].square().mean(), error.detach().mean()


def train_refiner(
    model: ToyboxModel, data: RenderedImages, steps: int, minutes: float | None = None,
    settings: TrainSettings = SETTINGS, report: Callable[[dict], None] | None = None,
    keep: Callable[[], None] | None = None, keep_minutes: float = 5.0,
) -> None:
    """Trains until `steps` steps are done or `minutes` minutes are spent, whichever comes first (cosine decay).

    The model ends with averaged weights, and has them whenever `keep` is called: every `keep_minutes`, at the end and
    after Ctrl-C. `report` receives a dict (step, before, after, seconds, remaining) every ten steps.
    """
    for part in (model.unet, model.text_encoder, model.mean_image):
        part.eval().requires_grad_(False)
    parameters = list(model.refiner.train().parameters())
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, betas=(0.9, 0.99), fused=True)
    average = [p.detach().clone() for p in parameters]
    focus = data.subset([row for row, meaning in enumerate(data.descriptions) if detailed(meaning)])
    limit = math.inf if minutes is None else 60 * minutes
    started = saved = time.monotonic()
    progress, step, errors = 0.0, 0, []

    @torch.no_grad()
    def keep_averaged() -> None:
        torch._foreach_copy_(parameters, average)
        if keep:
            keep()

    try:
        while progress < 1:
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step, progress)
            some = focus if len(focus) and step % FOCUS[1] < FOCUS[0] else data
            loss, *both = refining_loss(model, *training_batch(some, settings, step), settings.noise_exponent)
            if not math.isfinite(float(loss.detach())):
                raise FloatingPointError(f"the loss is {float(loss.detach())} at step {step}")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, settings.averaging(step))
            step += 1
            errors = [*errors[-199:], [float(e) for e in both]]
            seconds = time.monotonic() - started
            progress = max(step / steps, seconds / limit)
            if report and step % 10 == 0:
                before, after = torch.tensor(errors).mean(0).tolist()
                report({"step": step, "before": before, "after": after, "seconds": seconds,
                        "remaining": seconds * (1 / progress - 1)})
            if time.monotonic() - saved > 60 * keep_minutes:
                live = [p.detach().clone() for p in parameters]
                keep_averaged()
                with torch.no_grad():
                    torch._foreach_copy_(parameters, live)
                saved = time.monotonic()
    except KeyboardInterrupt:
        print(f"\nstopped at step {step}")
    keep_averaged()
    model.refiner.eval()


def main() -> None:
    """The command line of `python -m examples.train_toybox.refine`."""
    parser = argparse.ArgumentParser(description="Train the refiner of a Toybox model, the last part of its training.")
    parser.add_argument("--data", required=True, help="folder from python -m examples.train_toybox.dataset")
    parser.add_argument("--model", default=WEIGHTS, help="model folder to begin with (default: the shipped one)")
    parser.add_argument("--out", required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=4000, help="length of the run")
    parser.add_argument("--minutes", type=float, help="end after this time at the latest")
    parser.add_argument("--learning-rate", type=float, default=SETTINGS.learning_rate)
    parser.add_argument("--seed", type=int, default=SETTINGS.seed)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    given = parser.parse_args()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    model = ToyboxModel.load(given.model, device)
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)  # found out now rather than after an hour

    def report(row: dict) -> None:
        rate, left = row["step"] / row["seconds"], row["remaining"] / 60
        line = f"step {row['step']}  squared error {row['before']:.4f} -> {row['after']:.4f}  {rate:.2f} steps/s"
        print(f"\r{line}  {left:.1f} min left ", end="", flush=True)

    settings = replace(SETTINGS, learning_rate=given.learning_rate, seed=given.seed)
    train_refiner(
        model, RenderedImages(given.data), given.steps, given.minutes, settings, report, lambda: model.save(out)
    )
    print()


if __name__ == "__main__":
    main()
