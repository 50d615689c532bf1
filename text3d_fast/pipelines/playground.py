"""Pictures instead of scenes: what sampling and each distillation loss make of one prompt, side by side.

The 2D experiment of ProlificDreamer (Wang et al., 2023): pixels, or latents, are the parameters, so what is seen is the
loss alone. `figure` compares all methods; `grid` sampling, SDS and VSD over guidance weights: by the paper, VSD takes
guidance as sampling does, SDS needs much of it and pays in saturation and diversity.

A network that takes pixels in blocks (4 x 4 are one of the built-in model's) errs differently in each place of a
block. Scenes never show it, for every view has other blocks; a picture always seen in the same ones collects it as a
lattice. So each step sees the pictures shifted by a few pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from text3d_fast.guidance import (
    DISTILLATIONS,
    Conditions,
    DistillationLoss,
    LoraPrior,
    ParticleScore,
    Prior,
    TimeRange,
    guided_noise,
)
from text3d_fast.guidance.variants import FLAWS

# name -> (title, guidance weight in the (1 + w) / w form): each method with the guidance that its authors give it; CSD
# and the bridge have no other term than guidance
METHODS: dict[str, tuple[str, float]] = {
    "ancestral": ("ancestral sampling", 6.5),
    "sds": ("SDS", 99.0),
    "vsd": ("VSD", 6.5),
    "csd": ("CSD", 7.5),
    "ism": ("ISM", 6.5),
    "bridge": ("SDS-Bridge", 7.5),
}
GRID_METHODS = ("ancestral", "sds", "vsd")
GRID_WEIGHTS = (1.0, 3.0, 7.5, 30.0, 100.0)
CLIP = 0.3  # of the root mean square of a picture's gradient: guidance of 99 would throw it about
SHIFTS = 4  # pixels, as wide as a block
Report = Callable[[str, int, int], Any]


@dataclass
class Playground:
    """count pictures of a prompt by any method: sampled from noise, or distilled from one plain colour each.

    count, steps   pictures, and steps of the losses; sampling_steps  of the sampler
    rate           of descent on x, whose range is about -1..1, falling to 0
    score_rate     of the second score of VSD
    report         called with (what, steps done, steps in all) of one set of pictures
    """

    prior: Prior
    prompt: str
    count: int = 4
    steps: int = 80
    sampling_steps: int = 25
    rate: float = 0.4
    score_rate: float = 2e-3
    seed: int = 0
    report: Report | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("count", "steps", "sampling_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive integer, got {getattr(self, name)}")
        self.prompt = self.prior.canonical(self.prompt)
        self.source = self.prior.flaw_words or FLAWS
        self.prior.prepare([self.prompt, f"{self.prompt}, {self.source}"])
        self.conditions = Conditions([self.prompt] * self.count)

    def pictures(self, method: str, weight: float | None = None) -> Tensor:
        """[count, H, W, 3] in 0..1. weight: of the guidance, None: that of METHODS."""
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        weight = METHODS[method][1] if weight is None else weight
        generator = torch.Generator().manual_seed(self.seed)
        device = getattr(self.prior, "device", torch.device("cpu"))
        size, what = self.prior.image_size, f"{METHODS[method][0]}, w = {weight:g}"
        colors = (0.5 + 0.15 * torch.randn(self.count, 1, 1, 3, generator=generator)).clamp(0, 1).to(device)
        plain = colors.expand(-1, size, size, -1)
        if method == "ancestral":
            x = self.prior.encode(plain)
            x = self._sample(torch.randn(x.shape, generator=generator).to(x), weight, what)
            return self.prior.decode(x).clamp(0, 1).cpu()
        start = self.prior.encode(plain) if self.latent else 2 * plain - 1
        x = self._distill(start, self._losses(method, weight), generator, what)
        return (self.prior.decode(x) if self.latent else x / 2 + 0.5).clamp(0, 1).cpu()

    @property
    def latent(self) -> bool:
        return self.prior.kind == "latent"

    @torch.no_grad()
    def _sample(self, x: Tensor, weight: float, what: str) -> Tensor:
        """DDIM (Song et al., 2021), eta = 0. Pixels are kept in their range: strong guidance leaves it."""
        schedule = self.prior.schedule
        times = torch.linspace(0.99, 0.0, self.sampling_steps + 1, device=x.device)
        for step, (now, then) in enumerate(pairwise(times), 1):
            t, s = (schedule.snap(time.expand(self.count)) for time in (now, then))
            clean = schedule.to_sample(guided_noise(self.prior, x, t, self.conditions, weight), x, t, "epsilon")
            if not self.latent:
                clean = clean.clamp(-1, 1)
            x = schedule.add_noise(clean, schedule.to_noise(clean, x, t, "sample"), s)
            self._tell(what, step, self.sampling_steps)
        return x

    def _distill(
        self, x: Tensor, losses: Sequence[DistillationLoss], generator: torch.Generator, what: str
    ) -> Tensor:
        """x: latents, or pictures [count, H, W, 3] in -1..1, which they have at the end too. Each of the losses has its
        part of the steps.
        """
        # Pixels have no smoothness of their own, and differences of two scores take no noise out of them: so none to
        # begin with, and no Adam, whose steps are as long where the gradient is nothing but noise
        x = x.clone().requires_grad_()
        optimizer = torch.optim.SGD([x], self.rate, momentum=0.8, dampening=0.8)
        for step in range(self.steps):
            loss, progress = losses[step * len(losses) // self.steps], step / self.steps
            learned = getattr(loss, "score", None)
            exact = isinstance(learned, ParticleScore)
            optimizer.param_groups[0]["lr"] = self.rate * (1 - progress)
            seen = self._seen(x, generator)
            if exact:
                loss.train_score_encoded(seen, self.conditions, generator)
            optimizer.zero_grad()
            distilled = loss.from_encoded(seen, self.conditions, progress, generator)
            (distilled.loss * seen.numel()).backward()  # the sum, not the mean
            optimizer.step()
            if not self.latent:
                with torch.no_grad():
                    x.clamp_(-1, 1)
            if learned is not None and not exact:
                loss.train_score_encoded(self._seen(x.detach(), generator), self.conditions, generator)
            self._tell(what, step + 1, self.steps)
        return x.detach()

    def _seen(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x in the prior's space, pictures shifted by a random part of a block."""
        if self.latent:
            return x
        shift = torch.randint(-(SHIFTS // 2), SHIFTS // 2, (2,), generator=generator).tolist()
        return self.prior.encode((x / 2 + 0.5).roll(shift, (1, 2)))

    def _losses(self, method: str, weight: float) -> list[DistillationLoss]:
        options = {"time_range": TimeRange(0.02, 0.98, final_high=0.5, kind="step", end=0.5), "clip": CLIP}
        kind = DISTILLATIONS[method]
        if method == "vsd":
            network = getattr(self.prior, "unet", None) is not None
            score = LoraPrior(self.prior, seed=self.seed) if network else ParticleScore(self.prior.schedule)
            return [kind(self.prior, score, weight, score_rate=self.score_rate, **options)]
        if method == "bridge":  # leads away from what SDS makes, which has to be there
            before = DISTILLATIONS["sds"](self.prior, weight, **options)
            return [before, kind(self.prior, weight, source=self.source, **options)]
        return [kind(self.prior, weight, **options)]

    def _tell(self, what: str, step: int, steps: int) -> None:
        if self.report is not None:
            self.report(what, step, steps)


@dataclass
class Cell:
    """The pictures of one method at one guidance weight, and figures about them."""

    method: str
    weight: float
    pictures: Tensor

    @property
    def figures(self) -> dict[str, float]:
        return {"saturation": saturation(self.pictures), "sharpness": sharpness(self.pictures),
                "diversity": diversity(self.pictures)}

    @property
    def row(self) -> dict[str, Any]:
        """Of the table."""
        figures = {name: round(value, 4) for name, value in self.figures.items()}
        return {"method": self.method, "weight": self.weight, **figures}


def figure(playground: Playground, methods: Sequence[str] = tuple(METHODS)) -> Iterator[Cell]:
    """All methods, each with its own guidance: the paper's comparison in 2D (the post's figure 7)."""
    return (Cell(method, METHODS[method][1], playground.pictures(method)) for method in methods)


def grid(playground: Playground, weights: Sequence[float] = GRID_WEIGHTS) -> Iterator[Cell]:
    """Sampling, SDS and VSD at each guidance weight."""
    return (Cell(method, weight, playground.pictures(method, weight)) for method in GRID_METHODS for weight in weights)


def saturation(pictures: Tensor) -> float:
    """Of [n, H, W, 3]: sum of max - min over the sum of max of the channels; 0 is grey, 1 pure colours."""
    high, low = pictures.amax(-1), pictures.amin(-1)
    return float((high - low).sum() / high.sum().clamp(min=1e-6))


def sharpness(pictures: Tensor) -> float:
    """Root mean square of the five-point Laplacian of the mean channel, which noise raises as edges do."""
    grey = pictures.mean(-1)
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return float((around - 4 * grey[:, 1:-1, 1:-1]).square().mean().sqrt())


def diversity(pictures: Tensor) -> float:
    """Root mean square difference of two pictures, averaged over the pairs; 0 of a single one."""
    count = len(pictures)
    if count < 2:
        return 0.0
    flat = pictures.flatten(1)
    distance = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    return float(distance.sum() / (count * (count - 1)))


def mosaic(pictures: Tensor, enlarge: int = 1) -> Tensor:
    """[n, H, W, 3] as one picture, two in a row, each pixel `enlarge` wide; an odd last place is white."""
    if len(pictures) % 2:
        pictures = torch.cat([pictures, torch.ones_like(pictures[:1])])
    rows = [torch.cat(list(pair), 1) for pair in pictures.split(2)]
    return torch.cat(rows).repeat_interleave(enlarge, 0).repeat_interleave(enlarge, 1)


def sheet(cells: Sequence[Cell], enlarge: int = 1) -> tuple[Tensor, list[str]]:
    """Pictures and labels for `images.write_views`."""
    labels = [f"{METHODS[cell.method][0]}, w = {cell.weight:g}" for cell in cells]
    return torch.stack([mosaic(cell.pictures, enlarge) for cell in cells]), labels
