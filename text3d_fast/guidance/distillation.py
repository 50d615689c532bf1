"""What every distillation loss shares: weightings, ranges of t, guidance, and the loss that carries a given gradient.

One step draws t and eps, compares what the prior predicts with something (the subclass says what), and descends along

    g = w(t) residual(x, t, eps)

through the encoder and the renderer. `DistillationLoss` is that step; what the residual is, sds.py, vsd.py and
variants.py say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from text3d_fast.guidance.prior import Conditions, Prior
from text3d_fast.guidance.schedule import NoiseSchedule
from text3d_fast.guidance.watch import FiniteWatch

# name -> w(alpha, sigma). With E over eps of SDS's g = w alpha^-1 sigma d/dx KL(q_t || p_t):
WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # sigma^2, DreamFusion's choice: little weight on nearly clean images
    "sigma2": lambda alpha, sigma: sigma**2,
    # 1: the gradient of E_t[sigma / alpha KL]
    "uniform": lambda alpha, sigma: torch.ones_like(sigma),
    # alpha / sigma: the gradient of the unweighted E_t[KL]
    "kl": lambda alpha, sigma: alpha / sigma.clamp(min=1e-4),
    # sigma / alpha: g is x minus the denoised image; at most 20, or pure noise would decide alone
    "sample": lambda alpha, sigma: (sigma / alpha.clamp(min=1e-4)).clamp(max=20.0),
    # sqrt(abar) (1 - abar): vanishes at both ends of t (Fantasia3D)
    "alpha_sigma2": lambda alpha, sigma: alpha * sigma**2,
}


@dataclass(frozen=True)
class Rows:
    """Random numbers for some rows of a batch: `generator` draws for all `count` of them, `here` are taken.

    A row's numbers so depend neither on the process that has it nor on the rows that it is evaluated with.
    """

    generator: torch.Generator
    count: int
    here: slice = field(default_factory=lambda: slice(None))

    def grouped(self, size: int) -> Rows:
        """One row for each `size` of these."""
        start, stop, _ = self.here.indices(self.count)
        return Rows(self.generator, self.count // size, slice(start // size, stop // size))


Source = torch.Generator | Sequence[Rows] | None


def draw_rows(
    function: Callable[..., Tensor], shape: Sequence[int], source: Source, device: torch.device | str | None = None
) -> Tensor:
    """function(shape), `torch.rand` or `torch.randn`, from one generator (None: the device's own) or by parts of rows.

    Drawn where the generator is, and moved to the device.
    """
    if source is None or isinstance(source, torch.Generator):
        return function(shape, generator=source, device=device if source is None else source.device).to(device)
    parts = [function((rows.count, *shape[1:]), generator=rows.generator, device=rows.generator.device)[rows.here]
             for rows in source]
    return torch.cat(parts).to(device)


@dataclass
class TimeRange:
    """t ~ U(low, high), and how the range moves with progress p in [0, 1] of the optimization.

    kind    "constant"   low and high stay
            "linear"     low, high move to final_low, final_high, linearly over p in [0, end]
            "sqrt"       the same along sqrt(p / end): fast at first (HiFA)
            "step"       final_low, final_high from p = end on (ProlificDreamer: 0.98 -> 0.5 at 5k of 25k steps)
    """

    low: float = 0.02
    high: float = 0.98
    final_low: float | None = None
    final_high: float | None = None
    kind: str = "constant"
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "sqrt", "step"):
            raise ValueError(f"kind: expected constant, linear, sqrt or step, got {self.kind!r}")
        final = (self.low if self.final_low is None else self.final_low,
                 self.high if self.final_high is None else self.final_high)
        for low, high in ((self.low, self.high), final):
            if not 0 <= low <= high <= 1:
                raise ValueError(f"low, high: expected 0 <= low <= high <= 1, got {low}, {high}")
        if not 0 < self.end <= 1:
            raise ValueError(f"end: expected a fraction in (0, 1], got {self.end}")

    def at(self, progress: float = 0.0) -> tuple[float, float]:
        """(low, high) at that progress."""
        if self.kind == "constant":
            return self.low, self.high
        fraction = min(max(progress / self.end, 0.0), 1.0)
        if self.kind == "step":
            fraction = float(fraction >= 1.0)
        elif self.kind == "sqrt":
            fraction = fraction**0.5
        final_low = self.low if self.final_low is None else self.final_low
        final_high = self.high if self.final_high is None else self.final_high
        return self.low + fraction * (final_low - self.low), self.high + fraction * (final_high - self.high)

    def sample(self, count: int, progress: float = 0.0, generator: Source = None, device=None) -> Tensor:
        """t [count], fp32, independent and uniform in the range of that progress."""
        low, high = self.at(progress)
        return low + (high - low) * draw_rows(torch.rand, (count,), generator, device)


def draw(
    x: Tensor, schedule: NoiseSchedule, time_range: TimeRange, progress: float, generator: Source, views: int = 1
) -> tuple[Tensor, Tensor]:
    """t [B] of the range, on the schedule's steps, one for each `views` rows, and eps of x's shape [B, ...] (fp32)."""
    if len(x) % views:
        raise ValueError(f"images: expected a multiple of {views}, the prior's views of an object, got {len(x)}")
    single = generator is None or isinstance(generator, torch.Generator)
    groups = generator if single else [rows.grouped(views) for rows in generator]
    t = schedule.snap(time_range.sample(len(x) // views, progress, groups, x.device).repeat_interleave(views))
    return t, draw_rows(torch.randn, x.shape, generator, x.device)


def predict_noises(prior: Prior, x_t: Tensor, t: Tensor, sides: Sequence[Conditions]) -> list[Tensor]:
    """eps(x_t; side, t) for each of these conditions, in one call of the prior; fp32 (fp64 if x_t is)."""
    if len(sides) == 1:
        return [full_precision(prior.predict_noise(x_t, t, sides[0]))]
    count = len(sides)
    every = prior.predict_noise(torch.cat([x_t] * count), torch.cat([t] * count), Conditions.concatenate(sides))
    return list(full_precision(every).chunk(count))


def guidance_sides(conditions: Conditions, unconditional: Conditions, weight: float) -> list[Conditions]:
    """The sides that guidance of this weight looks at: weight 0 the conditional one only, -1 the unconditional one."""
    return [conditions] if weight == 0 else [unconditional] if weight == -1 else [conditions, unconditional]


def guide(predicted: Sequence[Tensor], weight: float, amounts: Sequence[Tensor] = ()) -> Tensor:
    """(1 + weight) conditional - weight unconditional, from the predictions for `guidance_sides`.

    Perp-Neg (Armandpour et al., 2023): further predictions, one for each of `amounts` [B, 1, ...], are negative
    prompts; of each one's difference to the unconditional side, the part perpendicular to the text's own is
    subtracted, amount (1 + weight) times. What a negative prompt has in common with the text is so left alone.
    """
    if len(predicted) == 1:
        return predicted[0]
    conditional, unconditional, *negatives = predicted
    towards = conditional - unconditional
    guided = conditional + weight * towards
    image = tuple(range(1, towards.ndim))
    for negative, amount in zip(negatives, amounts, strict=True):
        away = negative - unconditional
        along = (away * towards).sum(image, keepdim=True) / towards.square().sum(image, keepdim=True).clamp(min=1e-12)
        guided = guided - (1 + weight) * amount.to(away) * (away - along * towards)
    return guided


def guided_noise(
    prior: Prior, x_t: Tensor, t: Tensor, conditions: Conditions, weight: float, unconditional: Conditions | None = None
) -> Tensor:
    """(1 + weight) eps(x_t; conditions, t) - weight eps(x_t; unconditional, t), both in one call of the prior.

    x_t [B, C, h, w], t [B]; weight 0 evaluates the conditional half only, -1 the unconditional one only.
    `unconditional` defaults to the same conditions with empty texts. Returns fp32 [B, C, h, w] (fp64 if x_t is).
    """
    if unconditional is None:
        unconditional = conditions.unconditional()
    return guide(predict_noises(prior, x_t, t, guidance_sides(conditions, unconditional, weight)), weight)


def full_precision(x: Tensor) -> Tensor:
    """x in fp32, or fp64 if it is that already: guidance differences cancel, so they are never taken in half."""
    return x if x.dtype == torch.float64 else x.float()


class _GivenGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to x is the one handed in, to the bit."""

    @staticmethod
    def forward(ctx, x: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return value.clone()

    @staticmethod
    def backward(ctx, cotangent: Tensor):
        (gradient,) = ctx.saved_tensors
        return (cotangent * gradient / gradient.numel()).to(ctx.dtype), None, None


def distillation_loss(x: Tensor, gradient: Tensor, value: Tensor | None = None) -> Tensor:
    """A scalar loss with d loss / d x = gradient / x.numel() exactly: the mean over images and elements.

    It stands for 0.5 mean((x - stopgrad(x - gradient))^2), whose value it has (unless `value` is given), without
    the rounding of that subtraction. The mean keeps its scale independent of batch and resolution.
    """
    if gradient.shape != x.shape:
        raise ValueError(f"gradient: expected x's shape {list(x.shape)}, got {list(gradient.shape)}")
    gradient = gradient.detach()
    if value is None:
        value = 0.5 * full_precision(gradient).square().mean()
    return _GivenGradient.apply(x, gradient, value.detach())


@dataclass
class Distillation:
    """What one step gives. All tensors stay on the device; reading a number from them is the caller's sync.

    loss            scalar to call backward() on (or add to others)
    gradient        [B, C, h, w] the distillation gradient with respect to x, after clipping, before the mean
    gradient_norm   scalar, root mean square of `gradient`
    t               [B] the times drawn
    skipped         scalar int, images whose gradient was not finite and was set to zero
    """

    loss: Tensor
    gradient: Tensor
    gradient_norm: Tensor
    t: Tensor
    skipped: Tensor


class DistillationLoss:
    """A distillation loss of a batch of rendered images; a subclass has `residual`.

    guidance_weight        s of the (1 + s) / s form; a float, or a function of progress in [0, 1]
    weighting              a name in WEIGHTINGS, or a function w(alpha, sigma) of tensors [B]
    time_range             TimeRange, or (low, high)
    clip                   largest root mean square of one image's gradient; larger ones are scaled down to it
    negative_prompt        the text of the unconditional half, "" by default
    perp_neg               for a text, negative prompts with their amounts: {"a mug, back view": {"a mug, front view":
                           1.0}}; see `guide`. Each is one more row of the prior; texts not listed have none
    guide_camera,          whether guidance also amplifies the camera and the background (drops them in the
      guide_background     unconditional half) or only the text
    """

    def __init__(
        self,
        prior: Prior,
        guidance_weight: float | Callable[[float], float] = 100.0,
        weighting: str | Callable[[Tensor, Tensor], Tensor] = "sigma2",
        time_range: TimeRange | tuple[float, float] = (0.02, 0.98),
        clip: float | None = None,
        negative_prompt: str = "",
        perp_neg: Mapping[str, Mapping[str, float]] | None = None,
        guide_camera: bool = False,
        guide_background: bool = False,
    ):
        if isinstance(weighting, str):
            if weighting not in WEIGHTINGS:
                raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
            weighting = WEIGHTINGS[weighting]
        if clip is not None and clip <= 0:
            raise ValueError(f"clip: expected a positive number or None, got {clip}")
        self.prior = prior
        self.guidance_weight = guidance_weight
        self.weighting = weighting
        self.time_range = time_range if isinstance(time_range, TimeRange) else TimeRange(*time_range)
        self.clip = clip
        self.negative_prompt = negative_prompt
        self.perp_neg = perp_neg or {}
        self.guide_camera = guide_camera
        self.guide_background = guide_background
        self._watch = FiniteWatch()

    def texts(self, texts: Sequence[str]) -> list[str]:
        """What the prior will be asked for, for images of these texts: to be embedded at once."""
        return [*texts, self.negative_prompt, *(other for text in texts for other in self.perp_neg.get(text, {}))]

    def unconditional(self, conditions: Conditions) -> Conditions:
        """The other half of the guidance for these conditions."""
        empty = conditions.unconditional(not self.guide_camera, not self.guide_background)
        empty.texts = [self.negative_prompt] * len(empty)
        return empty

    def sides(self, conditions: Conditions, guidance: float) -> tuple[list[Conditions], list[Tensor]]:
        """The conditions that guidance of these looks at, and the amounts of the negative prompts among them."""
        sides = guidance_sides(conditions, self.unconditional(conditions), guidance)
        amounts = []
        rows = [list(self.perp_neg.get(text, {}).items()) for text in conditions.texts]
        if len(sides) == 2:
            for column in zip_longest(*rows, fillvalue=(self.negative_prompt, 0.0)):
                sides.append(conditions.with_texts([text for text, _ in column]))
                amounts.append(torch.tensor([amount for _, amount in column]).reshape(-1, 1, 1, 1))
        return sides, amounts

    def guided(self, x_t: Tensor, t: Tensor, conditions: Conditions, guidance: float) -> Tensor:
        """eps_hat: the prior's prediction, guided, [B, C, h, w]."""
        sides, amounts = self.sides(conditions, guidance)
        return guide(predict_noises(self.prior, x_t, t, sides), guidance, amounts)

    def __call__(
        self,
        images: Tensor,
        conditions: Conditions,
        progress: float = 0.0,
        generator: Source = None,
    ) -> Distillation:
        """images [B, H, W, 3] in 0..1 with their graph; progress in [0, 1] moves t and the guidance weight.

        generator: of t and the noise; several `Rows` draw for one part of the batch each.
        """
        if images.ndim != 4 or len(images) != len(conditions):
            raise ValueError(
                f"images: expected [B, H, W, C] with B = {len(conditions)} as in conditions, got {list(images.shape)}"
            )
        return self.from_encoded(self.prior.encode(images), conditions, progress, generator)

    def from_encoded(
        self, x: Tensor, conditions: Conditions, progress: float = 0.0, generator: Source = None
    ) -> Distillation:
        """The same for x [B, C, h, w] that is already in the prior's space (latents optimized directly)."""
        t, noise = draw(x, self.prior.schedule, self.time_range, progress, generator, self.prior.views)
        gradient, value = self.gradient(x, t, noise, conditions, progress)
        finite = gradient.isfinite().flatten(1).all(1)
        self._watch(finite, x)
        rows = (-1,) + (1,) * (x.ndim - 1)
        gradient = torch.where(finite.reshape(rows), gradient, 0.0)
        if self.clip is not None:
            size = gradient.square().flatten(1).mean(1).sqrt().reshape(rows)
            gradient = gradient * (self.clip / size.clamp(min=self.clip))
        norm = gradient.square().mean().sqrt()
        if value is not None:
            value = torch.where(finite, value, 0.0).mean()
        return Distillation(distillation_loss(x, gradient, value), gradient, norm, t, (~finite).sum())

    def gradient(
        self, x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions, progress: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        """One sample of the gradient with respect to x, for given t [B] and noise [B, C, h, w], in fp32 and unclipped.

        Second value: what the loss reports, [B]; None for half the mean square of the gradient.
        """
        with torch.no_grad():
            x = full_precision(x)
            residual = self.residual(x, t, noise.to(x), conditions, self.guidance_at(progress))
            return self.weight_at(t, x) * residual, None

    def residual(self, x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions, guidance: float) -> Tensor:
        """What w(t) multiplies: x, noise [B, C, h, w], t [B], the guidance weight of this step -> [B, C, h, w]."""
        raise NotImplementedError

    def guidance_at(self, progress: float) -> float:
        return self.guidance_weight(progress) if callable(self.guidance_weight) else self.guidance_weight

    def weight_at(self, t: Tensor, x: Tensor) -> Tensor:
        """w(t) [B, 1, ...], to multiply x's like."""
        return self.weighting(*self.prior.schedule.alpha_sigma(t)).reshape((-1,) + (1,) * (x.ndim - 1)).to(x)
