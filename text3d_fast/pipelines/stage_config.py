"""The settings of a stage, as nested dataclasses: how it guides, what it optimizes, where it looks from."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from text3d_fast.scene.cameras import CameraDistribution
from text3d_fast.scene.lights import LightDistribution
from text3d_fast.scene.shading import ShadingSchedule


@dataclass
class GuidanceConfig:
    """Score distillation; see `guidance.DistillationLoss`.

    distillation   what is descended: "sds"; "csd", the guidance alone, w (eps(text) - eps(empty)), without SDS's
                   eps_theta - eps; "bridge", from spoiled pictures to the text; "ism", along DDIM inversion
    weight         w of (1 + w) eps(text) - w eps(empty); other projects' "scale" is w + 1
    weighting      w(t): sigma2, uniform, kl, sample, alpha_sigma2
    time           t is uniform in (low, high) at the start and in final_time at the end
    time_moves     how it gets there until the progress time_end: "linear", "sqrt", or in one "step" at time_end
    camera         give the camera to a prior that knows it; False is the faithful setting: words only
    background     give the background colour to a prior that knows it
    jacobian       backpropagate through the network as well
    clip           largest root mean square of one image's gradient, or null
    perp_neg       how strongly each view is pushed off the prompts of other views (Perp-Neg, against faces on every
                   side); up to two more rows of the network a picture
    debias         folder or hub id of a masked language model (a BERT): words that contradict a view are left out of
                   its prompt; null: none
    """

    distillation: str = "sds"
    weight: float = 100.0
    weighting: str = "sigma2"
    time: tuple[float, float] = (0.02, 0.98)
    final_time: tuple[float, float] | None = None
    time_end: float = 1.0
    time_moves: str = "linear"
    camera: bool = True
    background: bool = True
    jacobian: bool = False
    clip: float | None = None
    negative_prompt: str = ""
    perp_neg: float = 0.0
    debias: str | None = None

    def __post_init__(self) -> None:
        if self.distillation not in ("sds", "csd", "bridge", "ism"):
            raise ValueError(f"distillation: expected sds, csd, bridge or ism, got {self.distillation!r}")
        if self.jacobian and self.distillation != "sds":
            raise ValueError(f"jacobian: only sds has one, not {self.distillation}")


@dataclass
class FieldConfig:
    """The radiance field; see `scene.field.RadianceField`.

    levels, features, log2_table_size, base_resolution, max_resolution   the hash grid
    smooth           smoothstep instead of linear interpolation: normals without creases
    start_levels, levels_end   levels on at the start, and the progress at which all are
    """

    levels: int = 8
    features: int = 2
    log2_table_size: int = 15
    base_resolution: int = 8
    max_resolution: int = 96
    start_levels: int = 4
    levels_end: float = 0.4
    hidden: int = 32
    density: str = "softplus"
    sharpness: float = 30.0
    blob_scale: float = 8.0
    blob_width: float = 0.5
    blob_profile: str = "linear"
    normals: str = "analytic"
    smooth: bool = True


@dataclass
class SamplingConfig:
    """Where the field is asked.

    radius            everything lies in this ball
    step              length between samples along a ray
    occupancy         cells of the occupancy grid along an axis
    prune_from        progress before which nothing is pruned
    update_every      steps between looks at the field
    threshold         opacity of one sample below which a cell is empty
    """

    radius: float = 0.9
    step: float = 0.04
    occupancy: int = 32
    prune_from: float = 0.05
    update_every: int = 10
    threshold: float = 0.01


@dataclass
class PenaltyConfig:
    """Weights of the mean-reduced penalties of `scene.regularizers`: (at the start, at the end), linear between.

    The distillation loss is a mean over images and elements as well, so they hold for any batch and resolution.
    """

    orientation: tuple[float, float] = (1e-4, 1e-2)
    opacity: tuple[float, float] = (1e-3, 1e-3)
    entropy: tuple[float, float] = (0.0, 0.0)
    thickness: tuple[float, float] = (0.0, 0.0)


@dataclass(kw_only=True)
class RateConfig:
    """Adam, betas (0.9, 0.99); rates fall to `final` of themselves along a cosine, after `warmup` of the steps."""

    warmup: float = 0.02
    final: float = 0.03

    def rate(self, base: float, step: int, steps: int) -> float:
        """The learning rate at a step, for one whose highest is `base`."""
        warm = min(1.0, (step + 1) / max(1.0, self.warmup * steps))
        return base * warm * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * (step / steps))))


@dataclass(kw_only=True)
class OptimizerConfig(RateConfig):
    """The rates of a radiance field: its hash grid, its layers, its background."""

    grid: float = 2e-2
    network: float = 5e-3
    background: float = 1e-3


@dataclass(kw_only=True)
class VolumeConfig:
    """A stage that optimizes a radiance field.

    size         pixels along a side of the renders; `Prior.encode` enlarges them where the model wants more
    background   "solid": a colour drawn anew for each image; "network": an MLP of the ray direction
    view_words   a name in guidance.prompts.WORDINGS; view_sectors the half-widths of front and back, degrees
    """

    steps: int = 1000
    batch: int = 1
    size: int = 64
    background: str = "solid"
    view_words: str = "side"
    view_sectors: tuple[float, float] = (45.0, 45.0)
    guidance: GuidanceConfig = dataclasses.field(default_factory=GuidanceConfig)
    field: FieldConfig = dataclasses.field(default_factory=FieldConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    penalties: PenaltyConfig = dataclasses.field(default_factory=PenaltyConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    cameras: CameraDistribution = dataclasses.field(default_factory=CameraDistribution)
    lights: LightDistribution = dataclasses.field(default_factory=LightDistribution)
    shading: ShadingSchedule = dataclasses.field(default_factory=ShadingSchedule)

    def __post_init__(self) -> None:
        if self.background not in ("solid", "network"):
            raise ValueError(f"background: expected solid or network, got {self.background!r}")
        require_positive(self, "steps", "batch", "size")


@dataclass
class SurfaceConfig:
    """The deformable tetrahedral grid and the texture in space; see `nn.DeformableTetGrid`, `scene.ColorField`.

    further_levels   of the texture's hash grid, beyond those of the field that it comes from
    """

    resolution: int = 128
    lattice: str = "a15"
    further_levels: int = 3


@dataclass
class SurfacePenaltyConfig:
    """Weights of the surface's penalties in `scene.regularizers`: (at the start, at the end), linear between.

    normals: normal consistency; laplacian, in shortest edges of the grid; sign: of the distances across the surface
    """

    normals: tuple[float, float] = (0.04, 0.04)
    laplacian: tuple[float, float] = (0.003, 0.003)
    sign: tuple[float, float] = (1e-3, 1e-4)


@dataclass(kw_only=True)
class SurfaceOptimizerConfig(RateConfig):
    """The rates of a surface: sdf in shortest edges of the grid a step, deformation before its tanh, the texture's hash
    grid, its layers.
    """

    sdf: float = 0.04
    deformation: float = 0.04
    grid: float = 1e-2
    network: float = 2e-3


@dataclass(kw_only=True)
class MeshConfig:
    """A stage that optimizes a surface and its texture.

    size         pixels along a side of the renders: a multiple of the prior's is averaged down to it, otherwise
                 `Prior.encode` resizes
    view_words   a name in guidance.prompts.WORDINGS; view_sectors the half-widths of front and back, degrees
    """

    steps: int = 400
    batch: int = 1
    size: int = 256
    view_words: str = "side"
    view_sectors: tuple[float, float] = (45.0, 45.0)
    guidance: GuidanceConfig = dataclasses.field(default_factory=lambda: GuidanceConfig(time=(0.02, 0.5)))
    surface: SurfaceConfig = dataclasses.field(default_factory=SurfaceConfig)
    penalties: SurfacePenaltyConfig = dataclasses.field(default_factory=SurfacePenaltyConfig)
    optimizer: SurfaceOptimizerConfig = dataclasses.field(default_factory=SurfaceOptimizerConfig)
    cameras: CameraDistribution = dataclasses.field(default_factory=CameraDistribution)
    lights: LightDistribution = dataclasses.field(default_factory=LightDistribution)
    shading: ShadingSchedule = dataclasses.field(default_factory=lambda: ShadingSchedule(albedo_until=0.0))

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch", "size")


@dataclass(kw_only=True)
class CoarseConfig(VolumeConfig):
    """Magic3D's coarse stage: density bias 10 (1 - |x| / 0.5), soft shading, light near the camera axis, low views."""

    steps: int = 600
    field: FieldConfig = dataclasses.field(default_factory=lambda: FieldConfig(blob_scale=10.0))
    cameras: CameraDistribution = dataclasses.field(
        default_factory=lambda: CameraDistribution(elevation=(-10.0, 45.0), distance=(2.2, 3.0), fov_y=(40.0, 55.0)))
    lights: LightDistribution = dataclasses.field(
        default_factory=lambda: LightDistribution(angle=60.0, diffuse=(0.0, 1.0), soft=True))


@dataclass(kw_only=True)
class ScoreConfig:
    """The score of the particles' own noisy pictures; see `guidance.VariationalScoreDistillation`.

    kind           "lora": learned by adapters on the prior's network; "particles": the exact one of n pictures, for
                   priors without a network
    rank, rate     of the adapters, and of their AdamW
    calls          "separate", "together" or "reused" calls of the network
    pose_dropout   share of its training pictures whose camera is dropped
    """

    kind: str = "lora"
    rank: int = 4
    rate: float = 1e-4
    calls: str = "separate"
    pose_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "particles"):
            raise ValueError(f"kind: expected lora or particles, got {self.kind!r}")


@dataclass(kw_only=True)
class ParticleConfig:
    """How n particles take their steps: "all" of them in each, or "one" drawn at random, as in the authors' code."""

    each_step: str = "all"
    score: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)

    def __post_init__(self) -> None:
        if self.each_step not in ("all", "one"):
            raise ValueError(f"each_step: expected all or one, got {self.each_step!r}")
        if self.score.kind == "particles" and self.each_step != "all":
            raise ValueError("each_step: the exact score of the particles needs pictures of all of them")


def _variational() -> GuidanceConfig:
    return GuidanceConfig(weight=6.5, final_time=(0.02, 0.5), time_end=0.2, time_moves="step")


@dataclass(kw_only=True)
class VsdConfig(ParticleConfig, VolumeConfig):
    """ProlificDreamer's first stage: radiance fields under VSD; entropy makes rays hit or miss."""

    guidance: GuidanceConfig = dataclasses.field(default_factory=_variational)
    penalties: PenaltyConfig = dataclasses.field(default_factory=lambda: PenaltyConfig(entropy=(0.0, 1e-3)))

    def __post_init__(self) -> None:
        VolumeConfig.__post_init__(self)
        ParticleConfig.__post_init__(self)


@dataclass(kw_only=True)
class TextureConfig(ParticleConfig, MeshConfig):
    """ProlificDreamer's third stage: the texture under VSD; the surface's rates and penalties are not used."""

    guidance: GuidanceConfig = dataclasses.field(default_factory=_variational)

    def __post_init__(self) -> None:
        MeshConfig.__post_init__(self)
        ParticleConfig.__post_init__(self)


def require_positive(config: Any, *names: str) -> None:
    """ValueError unless these settings are at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected a positive integer, got {getattr(config, name)}")
