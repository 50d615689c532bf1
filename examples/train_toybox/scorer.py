"""Does a picture show what its caption asks for? A small classifier of class, colour and view, and the gate.

    python -m examples.train_toybox.scorer train --data DIR --test DIR   trains it on true renders, prints its accuracy
    python -m examples.train_toybox.scorer gate [--model DIR]              judges samples of the learned prior

It has never seen a sample: it learns from true renders only, and is published with its accuracy on held-out ones.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from examples.train_toybox.batches import random_backgrounds
from examples.train_toybox.dataset import RenderedImages
from examples.train_toybox.model import ToyboxModel
from examples.train_toybox.sampler import sample, save_sheet
from text3d_fast.guidance.prior import Conditions
from text3d_fast.toybox.captions import caption, view_word
from text3d_fast.toybox.learned import WEIGHTS as MODEL_WEIGHTS
from text3d_fast.toybox.objects import CLASSES, COLORS
from text3d_fast.toybox.render import over, render
from text3d_fast.toybox.scenes import TRAINING_PAIRS, VIEWS, Description, Thing, build_scene, sample_parameters

WEIGHTS = Path(__file__).with_name("scorer.safetensors")
KINDS, COLOR_NAMES = tuple(CLASSES), tuple(COLORS)
_SIDES = ("front", "back", "left side", "right side")
# views that cannot be told apart: solids of revolution, and halves that repeat
_ALIKE: dict[str, tuple[tuple[str, ...], ...]] = {
    "ball": (VIEWS,),
    **dict.fromkeys(("cone", "cylinder", "bowl", "mushroom", "tree", "cube"), (_SIDES,)),
    **dict.fromkeys(("donut", "table"), (("front", "back"), ("left side", "right side"))),
}


def alike_views(kind: str, view: str) -> tuple[str, ...]:
    """The views that look like `view` for this class, itself included."""
    return next((group for group in _ALIKE.get(kind, ()) if view in group), (view,))


class Scorer(nn.Module):
    """Images [B, 64, 64, 3] in 0..1 -> logits of class [B, 16], colour [B, 8] and view [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        layers, last = [], 12
        for width, stride in ((32, 1), (64, 2), (64, 1), (96, 2), (128, 1), (128, 2)):
            layers += [nn.Conv2d(last, width, 3, stride, 1), nn.GroupNorm(8, width), nn.SiLU()]
            last = width
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(last * 16, 160), nn.SiLU())
        self.heads = nn.Linear(160, len(KINDS) + len(COLOR_NAMES) + len(VIEWS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = pixel_unshuffle(images.permute(0, 3, 1, 2) * 2 - 1, 2)
        return self.heads(self.features(x)).split([len(KINDS), len(COLOR_NAMES), len(VIEWS)], 1)

    @classmethod
    def load(cls, path: str | Path = WEIGHTS) -> Scorer:
        """The shipped scorer, or another; ValueError naming the file if it is missing or damaged."""
        from safetensors.torch import load_file

        scorer = cls()
        try:
            scorer.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        except Exception as error:  # OSError, SafetensorError, or RuntimeError for foreign shapes
            raise ValueError(f"path: {path} holds no scorer weights: {error}") from error
        return scorer.eval()

    def save(self, path: str | Path) -> None:
        """Writes the weights in half precision."""
        from safetensors.torch import save_file

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, path)


def _alike_table() -> Tensor:
    """[class, view, view] 1 where two views of a class look alike."""
    return torch.tensor([[[float(b in alike_views(k, a)) for b in VIEWS] for a in VIEWS] for k in KINDS])


def labels(descriptions: list[Description], camera: np.ndarray | Tensor) -> Tensor:
    """Class, colour and view numbers [N, 3] of single-object scenes seen from camera [N, 3] (radians)."""
    return torch.tensor([
        [KINDS.index(d.thing.kind), COLOR_NAMES.index(d.thing.color), VIEWS.index(view_word(float(c[0]), float(c[1])))]
        for d, c in zip(descriptions, camera, strict=True)
    ])


@torch.no_grad()
def judge(scorer: Scorer, images: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Which images [B, H, W, 3] show the class, colour and view of truth [B, 3]; bool [B] each, and "all"."""
    kind, color, view = (logits.argmax(1) for logits in scorer(images))
    right = {"class": kind == truth[:, 0], "color": color == truth[:, 1]}
    right["view"] = _alike_table()[truth[:, 0], truth[:, 2], view] > 0
    return {**right, "all": right["class"] & right["color"] & right["view"]}


def _usable(data: RenderedImages) -> RenderedImages:
    """Those with one object, shaded: colour and class are there to be seen."""
    return data.subset([k for k, d in enumerate(data.descriptions) if d.base is None and d.style == "shaded"])


def train_scorer(
    data: RenderedImages, steps: int = 1200, batch: int = 64, seed: int = 0, overhead: float = 0.15
) -> Scorer:
    """Trains on random backgrounds with a little noise and change of brightness, so that samples are not foreign.

    A share `overhead` is drawn from the views from above alone: a house or car is hardest to tell there.
    """
    data = _usable(data)
    truth, alike, above = labels(data.descriptions, data.camera), _alike_table(), torch.from_numpy(data.overhead)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = Scorer()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(scorer.parameters(), 2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        pick = torch.randint(len(data), (batch,), generator=generator)
        if len(above):
            from_above = torch.rand(batch, generator=generator) < overhead
            pick = torch.where(from_above, above[torch.randint(len(above), (batch,), generator=generator)], pick)
        background = random_backgrounds(batch, generator)[:, None, None]
        images = over(torch.from_numpy(data.images(pick.numpy())).float() / 255, background)
        scale = 1 + 0.1 * torch.randn(batch, 1, 1, 1, generator=generator)
        noise = 0.08 * torch.rand(batch, 1, 1, 1, generator=generator)
        images = (images * scale + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        kind, color, view = scorer(images)
        chosen = truth[pick]
        loss = nn.functional.cross_entropy(kind, chosen[:, 0]) + nn.functional.cross_entropy(color, chosen[:, 1])
        same = alike[chosen[:, 0], chosen[:, 2]]
        loss = loss - torch.log((view.softmax(1) * same).sum(1).clamp_min(1e-6)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"\rscorer: step {step + 1}/{steps}  loss {float(loss.detach()):.3f} ", end="", flush=True)
    print()
    return scorer.eval()


def accuracy(scorer: Scorer, data: RenderedImages, seed: int = 1) -> dict[str, float]:
    """Shares of held-out renders (every camera) whose class, colour, view and all three the scorer names rightly."""
    data = _usable(data)
    background = random_backgrounds(len(data), torch.Generator().manual_seed(seed))[:, None, None]
    truth = labels(data.descriptions, data.camera)
    parts = [
        judge(scorer, over(torch.from_numpy(data.images(rows)).float() / 255, background[rows]), truth[rows])
        for rows in np.array_split(np.arange(len(data)), -(-len(data) // 256))
    ]
    return {"count": len(data), **{name: _share([p[name] for p in parts]) for name in parts[0]}}


def _share(parts: list[Tensor]) -> float:
    return round(float(torch.cat(parts).float().mean()), 4)


def gate_cases(count: int, seed: int = 0) -> tuple[list[Description], Tensor, Tensor]:
    """Plain single objects (training pairs in turn), cameras [N, 3] within 20 degrees of the view asked for, and
    background colours [N, 3]; every view equally often."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(TRAINING_PAIRS), generator=generator)
    luck = torch.rand(count, 3, generator=generator)
    descriptions, cameras = [], []
    for k in range(count):
        view = VIEWS[k % len(VIEWS)]
        kind, color = TRAINING_PAIRS[int(order[k % len(order)])]
        descriptions.append(Description(Thing(kind, color), None, view, "shaded"))
        middle = {"front": 0, "left side": 90, "back": 180, "right side": 270, "overhead": 0}[view]
        elevation = 65 + 15 * luck[k, 0] if view == "overhead" else 5 + 30 * luck[k, 0]
        azimuth = (middle + 40 * luck[k, 1] - 20) % 360
        cameras.append([math.radians(elevation), math.radians(azimuth), 2.5 + 0.5 * float(luck[k, 2])])
    backgrounds = 0.35 + 0.65 * torch.rand(count, 1, generator=generator).expand(-1, 3)
    return descriptions, torch.tensor(cameras), backgrounds


def true_gate_accuracy(scorer: Scorer, count: int = 1000, seed: int = 0) -> dict[str, float]:
    """The scorer on true renders of cases like the gate's: what a perfect model would get."""
    descriptions, cameras, backgrounds = gate_cases(count, seed)
    generator, images = torch.Generator().manual_seed(seed + 1), []
    for description, camera, background in zip(descriptions, cameras, backgrounds, strict=True):
        scene = build_scene(replace(description, view=None), sample_parameters(description, generator))
        with torch.no_grad():
            images.append(over(render(scene, *camera.unsqueeze(1))[0], background))
    right = judge(scorer, torch.stack(images), labels(descriptions, cameras))
    return {name: _share([value]) for name, value in right.items()}


def gate(
    scorer: Scorer, model: ToyboxModel, count: int = 200, guidance_weight: float = 2.0, steps: int = 25,
    camera: bool = True, seed: int = 0,
) -> tuple[dict[str, float], Tensor]:
    """Shares of `count` samples that show the class, colour, view and all three asked for, and the samples.

    camera: whether the model is given the camera beside the words; the background is given always.
    """
    descriptions, cameras, backgrounds = gate_cases(count, seed)
    truth, parts, images = labels(descriptions, cameras), [], []
    generator = torch.Generator().manual_seed(seed)
    for k in range(0, count, 20):
        rows = slice(k, k + 20)
        texts = [caption(d) for d in descriptions[rows]]
        given = Conditions(texts, cameras[rows] if camera else None, backgrounds[rows])
        images.append(sample(model, given, guidance_weight, steps, generator).cpu())
        parts.append(judge(scorer, images[-1], truth[rows]))
    return {name: _share([p[name] for p in parts]) for name in parts[0]}, torch.cat(images)


def main() -> None:
    """The command line of `python -m examples.train_toybox.scorer`."""
    parser = argparse.ArgumentParser(description="Train the Toybox scorer, or judge the learned prior with it.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train on true renders and print the accuracy on held-out ones")
    training.add_argument("--data", required=True, help="folder of renders to learn from")
    training.add_argument("--test", required=True, help="folder of renders with another seed")
    training.add_argument("--steps", type=int, default=1200)
    training.add_argument("--out", default=str(WEIGHTS))
    judging = commands.add_parser("gate", help="judge samples of the learned prior")
    judging.add_argument("--model", default=MODEL_WEIGHTS, help="model folder (default: the shipped one)")
    judging.add_argument("--scorer", default=str(WEIGHTS))
    judging.add_argument("--samples", type=int, default=200)
    judging.add_argument("--guidance-weight", type=float, default=2.0)
    judging.add_argument("--steps", type=int, default=25, help="steps of the sampler")
    judging.add_argument("--words-only", action="store_true", help="do not give the camera")
    judging.add_argument("--seed", type=int, default=0, help="of the cases and the noise")
    judging.add_argument("--sheet", help="write the samples to this PNG")
    given = parser.parse_args()
    started = time.monotonic()
    if given.command == "train":
        scorer = train_scorer(RenderedImages(given.data), given.steps)
        scorer.save(given.out)
        scorer = Scorer.load(given.out)
        row = {"held_out_renders": accuracy(scorer, RenderedImages(given.test))}
        row["gate_renders"] = true_gate_accuracy(scorer)
    else:
        scorer = Scorer.load(given.scorer)
        model = ToyboxModel.load(given.model)
        shares, images = gate(
            scorer, model, given.samples, given.guidance_weight, given.steps, not given.words_only, given.seed
        )
        row = {"samples": given.samples, "guidance_weight": given.guidance_weight, "camera": not given.words_only,
               "seed": given.seed}
        row["shares"] = shares
        if given.sheet:
            save_sheet(images, given.sheet, columns=20, scale=1)
    print(json.dumps({**row, "seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
