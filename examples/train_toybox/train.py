"""Trains the learned Toybox prior: `python -m examples.train_toybox.train --data DIR --out DIR`.

DIR of the data comes from `python -m examples.train_toybox.dataset`; shards that appear during training are taken up.
In the output folder: `checkpoint.pt` (everything needed to go on), `model/` (the diffusers folder with the averaged
weights), `samples/*.png`, `log.jsonl`. Step k draws its images, captions and noise from seed and k alone, so a resumed
run over the same data repeats what an uninterrupted one would have done.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.train_toybox.batches import TrainSettings, training_batch
from examples.train_toybox.dataset import RenderedImages
from examples.train_toybox.details import fit_details
from examples.train_toybox.mean import train_mean_image
from examples.train_toybox.model import ToyboxModel, to_latent
from examples.train_toybox.muon import optimizers
from examples.train_toybox.sampler import sample, save_sheet, sheet_conditions
from text3d_fast.files import atomic_path
from text3d_fast.guidance.prior import Conditions

CHECKPOINT = "checkpoint.pt"


def noisy_images(
    model: ToyboxModel, images: Tensor, generator: torch.Generator, noise_exponent: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Clean and noisy x of images [B, 64, 64, 3], and their steps [B], on the model's device.

    The levels are u^noise_exponent of the schedule's length with u spread evenly over 0..1. Noise and levels come from
    the CPU generator.
    """
    clean, count = to_latent(images), len(images)
    kept = model.scheduler.alphas_cumprod
    steps = (torch.arange(count) + torch.rand((), generator=generator)) / count
    steps = (steps**noise_exponent * len(kept)).long().clamp(max=len(kept) - 1)
    noise = torch.randn(clean.shape, generator=generator)
    abar = kept[steps].float().view(-1, 1, 1, 1)
    noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    return clean.to(model.device), noisy.to(model.device), steps.to(model.device)


def denoising_loss(
    model: ToyboxModel,
    images: Tensor,
    conditions: Conditions,
    generator: torch.Generator,
    largest_weight: float = 8.0,
    autocast: torch.dtype | None = None,
    noise_exponent: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The weighted loss and the squared error [B] of the U-Net's prediction of the clean image, one noise level each.

    What a picture shows is decided where it is mostly noise, so a short training gains from a `noise_exponent` (see
    `noisy_images`) below 1. The weight is min(1 / sigma^2, largest_weight), never below 1 for the same reason.
    """
    clean, noisy, steps = noisy_images(model, images, generator, noise_exponent)
    conditions = conditions.to(model.device)
    with torch.autocast(model.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        text = model.embed(model.token_ids(conditions.texts))
        predicted = model.coarse(noisy, steps, text, conditions)[0]
    error = (predicted.float() - clean).square().mean((1, 2, 3))
    kept = model.scheduler.alphas_cumprod.to(steps.device)[steps].float()
    weight = (1 / (1 - kept)).clamp(max=largest_weight)
    return (weight * error).mean(), error.detach()


def _plain_attention(model: ToyboxModel) -> None:
    # fused attention's backward in bf16 takes 35 % of a CPU step; two small matrix products take a tenth of that
    from diffusers.models.attention_processor import AttnProcessor

    model.unet.set_attn_processor(AttnProcessor())


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 saves time there. A CPU without the instructions emulates it, ten times slower than fp32."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Trainer:
    """One training run in a folder. `step()` does one step; `save()` and `Trainer.resume` are exact."""

    def __init__(
        self, settings: TrainSettings, model: ToyboxModel | None = None, device: str = "cpu", autocast: bool = True
    ) -> None:
        self.settings, self.device = settings, torch.device(device)
        self.model = (model or ToyboxModel.build(settings.seed)).to(self.device)
        self.model.unet.train()
        for part in (self.model.text_encoder, self.model.mean_image, self.model.refiner):
            part.eval().requires_grad_(False)
        if self.device.type == "cpu":
            _plain_attention(self.model)
        self.autocast = torch.bfloat16 if autocast and fast_bfloat16(self.device) else None
        self.average = [p.detach().clone() for p in self.model.unet.parameters()]
        unet = self.model.unet
        ends = {*unet.conv_in.parameters(), *unet.conv_out.parameters()}
        self.optimizers = optimizers(unet.parameters(), ends, settings.learning_rate, settings.weight_decay)
        self.steps_done, self.seconds = 0, 0.0

    def step(self, data: RenderedImages, progress: float) -> float:
        """One optimizer step; `progress` in 0..1 is the share of the run behind (cosine decay). Returns the loss."""
        s = self.settings
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = s.rate(self.steps_done, progress)
        images, conditions, generator = training_batch(data, s, self.steps_done)
        loss, _ = denoising_loss(
            self.model, images, conditions, generator, s.largest_weight, self.autocast, s.noise_exponent
        )
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.unet.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.unet.parameters()), s.averaging(self.steps_done))
        self.steps_done += 1
        return float(loss.detach())

    def averaged(self) -> ToyboxModel:
        """A copy of the model with the averaged weights, for sampling."""
        copy = ToyboxModel.build(self.settings.seed, tuple(self.model.unet.config.block_out_channels)).to(self.device)
        with torch.no_grad():
            torch._foreach_copy_(list(copy.unet.parameters()), self.average)
        copy.text_encoder.load_state_dict(self.model.text_encoder.state_dict())
        copy.mean_image.load_state_dict(self.model.mean_image.state_dict())
        copy.refiner.load_state_dict(self.model.refiner.state_dict())
        return copy.eval()

    def save(self, folder: str | Path) -> None:
        """Writes `checkpoint.pt`; the previous one stays until the new one is complete."""
        content = {
            "format": 5,
            "settings": asdict(self.settings),
            "channels": list(self.model.unet.config.block_out_channels),
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "weights": [p.detach() for p in self.model.unet.parameters()],
            "average": self.average,
            "text_encoder": self.model.text_encoder.state_dict(),
            "mean_image": self.model.mean_image.state_dict(),
            "refiner": self.model.refiner.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with atomic_path(Path(folder) / CHECKPOINT) as part:
            torch.save(content, part)

    @classmethod
    def resume(cls, folder: str | Path, device: str = "cpu", autocast: bool = True) -> Trainer:
        """The run saved in the folder.

        Raises FileNotFoundError if there is none, ValueError if the file is damaged or of another model.
        """
        path = Path(folder) / CHECKPOINT
        if not path.is_file():
            raise FileNotFoundError(f"folder: {folder} holds no {CHECKPOINT}; start without --resume")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["format"] != 5:
                raise ValueError(f"format {content['format']}, expected 5")
            settings = TrainSettings(**content["settings"])
            model = ToyboxModel.build(settings.seed, tuple(content["channels"]))
            model.text_encoder.load_state_dict(content["text_encoder"])
            model.mean_image.load_state_dict(content["mean_image"])
            model.refiner.load_state_dict(content["refiner"])
            trainer = cls(settings, model, device, autocast)
            with torch.no_grad():
                for ours, theirs in zip(trainer.model.unet.parameters(), content["weights"], strict=True):
                    ours.copy_(theirs)
                for ours, theirs in zip(trainer.average, content["average"], strict=True):
                    ours.copy_(theirs)
            for optimizer, state in zip(trainer.optimizers, content["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        except Exception as error:  # torch.load raises many kinds for a truncated or foreign file
            raise ValueError(f"folder: {path} is damaged or not a Toybox checkpoint: {error}") from error
        trainer.steps_done, trainer.seconds = content["steps_done"], content["seconds"]
        return trainer


def _write_sheet(trainer: Trainer, path: Path) -> None:
    model, generator = trainer.averaged(), torch.Generator().manual_seed(1)
    pictures = sample(model, sheet_conditions(), steps=25, generator=generator)
    words_only = sample(model, sheet_conditions(camera=False)[:8], steps=25, generator=generator)
    save_sheet(torch.cat([pictures, words_only]), path)


def train(
    data: str | Path, out: str | Path, steps: int = 20_000, minutes: float | None = None, resume: bool = False,
    device: str = "auto", settings: TrainSettings | None = None, checkpoint_minutes: float = 4.0,
    sheet_every: int = 500, report: Callable[[dict], None] | None = None, start: str | Path | None = None,
    mean_steps: int = 2000,
) -> Trainer:
    """Trains until `steps` steps are done or `minutes` minutes are spent (earlier parts of a resumed run included).

    start: a model folder to begin with, instead of random weights and `mean_steps` steps of training the text encoder
    and the mean image, which are not counted in `minutes`. Both stay as they are while the U-Net learns.

    The learning rate falls along a cosine that ends with whichever comes first. A sample sheet is written every
    `sheet_every` steps and at the end (0: never). `report` receives a dict (part, step,
    loss, seconds, remaining) every ten steps. Returns the trainer after its last save.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if resume:
        trainer = Trainer.resume(folder, device)
        if settings is not None:
            trainer.settings = replace(settings, seed=trainer.settings.seed)
    elif (folder / CHECKPOINT).exists():
        raise ValueError(f"out: {folder} holds a run already; go on with --resume or choose another folder")
    else:
        settings = settings or TrainSettings()
        model = ToyboxModel.build(settings.seed) if start is None else ToyboxModel.load(start)
        model.to(device)
        if start is None:
            found = RenderedImages(data)
            train_mean_image(model, found, mean_steps, settings, report=report)
            fit_details(model, [found])
        trainer = Trainer(settings, model, device)
    images = RenderedImages(data)
    limit = math.inf if minutes is None else 60 * minutes
    before, started, saved, losses = trainer.seconds, time.monotonic(), time.monotonic(), []

    def progress() -> float:
        return max(trainer.steps_done / steps, trainer.seconds / limit)

    def keep() -> None:
        trainer.save(folder)
        trainer.averaged().save(folder / "model")

    try:
        while progress() < 1:
            losses.append(trainer.step(images, progress()))
            trainer.seconds = before + time.monotonic() - started
            done = trainer.steps_done
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss is {losses[-1]} at step {done}; go back to the last checkpoint")
            if report and done % 10 == 0:
                remaining = trainer.seconds * (1 / progress() - 1)
                row = {"step": done, "loss": float(np.mean(losses[-200:])), "seconds": round(trainer.seconds, 1)}
                report({"part": "U-Net", **row, "remaining": round(remaining, 1)})
            if done % 100 == 0:
                row = {"step": done, "loss": float(np.mean(losses[-100:])), "seconds": round(trainer.seconds, 1)}
                with (folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps({**row, "images": len(images)}) + "\n")
            if sheet_every and done % sheet_every == 0:
                _write_sheet(trainer, folder / "samples" / f"step-{done:06d}.png")
            if time.monotonic() - saved > 60 * checkpoint_minutes:
                keep()
                images, saved = RenderedImages(data), time.monotonic()
    except KeyboardInterrupt:
        print(f"\nstopped at step {trainer.steps_done}; go on with --resume --out {folder}")
    keep()
    if sheet_every:
        _write_sheet(trainer, folder / "samples" / f"step-{trainer.steps_done:06d}.png")
    return trainer


def main() -> None:
    """The command line of `python -m examples.train_toybox.train`."""
    parser = argparse.ArgumentParser(description="Train the learned Toybox prior (resumable).")
    parser.add_argument("--data", required=True, help="folder from python -m examples.train_toybox.dataset")
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=20_000, help="length of the run")
    parser.add_argument("--minutes", type=float, help="end after this time at the latest (resumed parts included)")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--start", help="a model folder whose weights to begin with")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--mean-steps", type=int, default=2000,
                        help="steps for text encoder and mean image at the start of a new run")
    parser.add_argument("--sheet-every", type=int, default=500, help="steps between sample sheets")
    defaults = TrainSettings()
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--average", type=float, default=defaults.average, help="decay of the averaged weights")
    given = parser.parse_args()
    settings = TrainSettings(batch=given.batch, learning_rate=given.learning_rate, average=given.average)

    def report(row: dict) -> None:
        rate, left = row["step"] / row["seconds"], row["remaining"] / 60
        line = f"{row['part']}: step {row['step']}  loss {row['loss']:.4f}  {rate:.2f} steps/s  {left:.1f} min left "
        print("\r" + line, end="", flush=True)

    train(
        given.data, given.out, given.steps, given.minutes, given.resume, given.device, settings,
        sheet_every=given.sheet_every, report=report, start=given.start, mean_steps=given.mean_steps,
    )
    print()


if __name__ == "__main__":
    main()
