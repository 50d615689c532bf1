"""The settings of a run, which hold those of its stages; saved to and read from config.yaml."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self

from text3d_fast.guidance.models.options import ModelOptions
from text3d_fast.pipelines.settings import check_ranges, names_of, nearest
from text3d_fast.pipelines.stage_config import (
    CoarseConfig,
    FieldConfig,
    GuidanceConfig,
    MeshConfig,
    OptimizerConfig,
    ParticleConfig,
    PenaltyConfig,
    RateConfig,
    SamplingConfig,
    ScoreConfig,
    SurfaceConfig,
    SurfaceOptimizerConfig,
    SurfacePenaltyConfig,
    TextureConfig,
    VolumeConfig,
    VsdConfig,
    require_positive,
)

__all__ = [
    "CoarseConfig", "DreamFusionConfig", "EditConfig", "FieldConfig", "GuidanceConfig", "Magic3DConfig", "MeshConfig",
    "OptimizerConfig", "ParticleConfig", "PenaltyConfig", "ProlificDreamerConfig", "RateConfig", "RunConfig",
    "SamplingConfig", "ScoreConfig", "SurfaceConfig", "SurfaceOptimizerConfig", "SurfacePenaltyConfig",
    "TextureConfig", "VolumeConfig", "VsdConfig",
]

END = "\n...\n"  # of a configuration as it is saved, by which one can tell that nothing is missing


@dataclass(kw_only=True)
class RunConfig:
    """What every run has, whatever its pipeline. Everything that decides the result, besides the machine, is in it.

    mesh_resolution, faces, texture   of the exported mesh: the extraction grid (a multiple of 4), at most so many
                 triangles (0: all of them), and the texels of the texture's side (0: vertex colours). Fewer faces
                 with a texture bring a normal map that shows what they lack
    threads      CPU threads the run was made with; another number changes the last bits
    prior        how `model` is loaded
    """

    pipeline: str = ""
    prompt: str = ""
    model: str = "toybox"
    seed: int = 0
    checkpoint_every: int = 250
    preview_every: int = 100
    mesh_resolution: int = 128
    faces: int = 0
    texture: int = 0
    threads: int | None = None
    prior: ModelOptions = dataclasses.field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        require_positive(self, "checkpoint_every", "preview_every", "mesh_resolution")
        if self.mesh_resolution % 4:  # found out now, not after all steps
            raise ValueError(f"mesh_resolution: expected a multiple of 4, got {self.mesh_resolution}")
        if self.faces != 0 and self.faces < 4:
            raise ValueError(f"faces: expected 0 for all of them, or at least 4, got {self.faces}")

    def stage(self, name: str) -> Any:
        """The settings of a stage: a group of that name, or, in a pipeline of one stage, these."""
        return getattr(self, name, self)

    def with_steps(self, steps: int, stages: Sequence[str] | None = None) -> Self:
        """A copy in which these stages (None: all) take `steps` steps together, divided in proportion."""
        names = self.stage_names() if stages is None else stages
        total = self.total_steps(names)
        shares = {f"{name}.steps": max(1, round(steps * self.stage(name).steps / total)) for name in names}
        return self.updated(shares or {"steps": steps})

    def total_steps(self, stages: Sequence[str] | None = None) -> int:
        """Of these stages; None: of all."""
        names = self.stage_names() if stages is None else stages
        return sum(self.stage(name).steps for name in names) if names else getattr(self, "steps", 0)

    def stage_names(self) -> list[str]:
        """Of the groups that are stages, in order; none in a pipeline of one stage."""
        return [entry.name for entry in dataclasses.fields(self) if hasattr(getattr(self, entry.name), "steps")]

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(_plain(self), sort_keys=False, allow_unicode=True, explicit_end=True)

    @classmethod
    def from_yaml(cls, text: str, source: str = "config.yaml") -> Self:
        """Read a saved config. Raises ValueError naming the file and the setting that is wrong."""
        import yaml

        try:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
                raise ValueError("expected no references (*)")  # a few lines of them can mean gigabytes
            config = _build(cls, yaml.safe_load(text), "")
            check_ranges(config)
            return config
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{source}: {' '.join(str(error).split())}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        return cls.from_yaml(Path(path).read_text(encoding="utf-8"), str(path))

    def updated(self, changes: dict[str, Any]) -> Self:
        """A copy with settings replaced, named by dotted paths: {"guidance.weight": 7.5}. ValueError if unknown."""
        content = _plain(self)
        for name, value in changes.items():
            *groups, last = name.split(".")
            place = content
            for group in groups:
                place = place.get(group) if isinstance(place, dict) else None
            if not isinstance(place, dict) or last not in place:
                close = nearest(name, names_of(self))
                raise ValueError(f"{name}: no such setting{close}; `generate --help-settings` lists them")
            place[last] = value
        changed = _build(type(self), content, "")
        check_ranges(changed)
        return changed


@dataclass(kw_only=True)
class DreamFusionConfig(VolumeConfig, RunConfig):
    """DreamFusion is one stage: its settings stand beside those of the run."""

    pipeline: str = "dreamfusion"

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        VolumeConfig.__post_init__(self)


@dataclass(kw_only=True)
class Magic3DConfig(RunConfig):
    """Magic3D is two stages; `model` guides the coarse one, `fine_model` the fine one ("": the same)."""

    pipeline: str = "magic3d"
    fine_model: str = ""
    faces: int = 20_000
    texture: int = 1024
    coarse: CoarseConfig = dataclasses.field(default_factory=CoarseConfig)
    fine: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(steps=1000))


@dataclass(kw_only=True)
class EditConfig(Magic3DConfig):
    """A finished Magic3D run, continued with another prompt: its fine stage goes on as `edit`."""

    pipeline: str = "edit"
    edit: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclass(kw_only=True)
class ProlificDreamerConfig(RunConfig):
    """ProlificDreamer: n particles through three stages; steps are those of each particle (unless each_step is one)."""

    pipeline: str = "prolificdreamer"
    particles: int = 1
    vsd: VsdConfig = dataclasses.field(default_factory=VsdConfig)
    geometry: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    texturing: TextureConfig = dataclasses.field(default_factory=TextureConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "particles")


def _short(value: Any) -> str:
    """For a message, whatever it is."""
    text = repr(value)
    return text if len(text) < 100 else text[:97] + "..."


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _build(kind: type, content: Any, path: str) -> Any:
    """A dataclass from nested dicts, with the types checked."""
    if not isinstance(content, dict):
        raise ValueError(f"{path or 'content'}: expected a mapping of settings, got {_short(content)}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(content) - set(hints))
    if unknown:
        raise ValueError(f"{path}{unknown[0]}: no such setting")
    values = {}
    for name, value in content.items():
        where, hint = f"{path}{name}", hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _build(hint, value, where + ".")
        else:
            values[name] = _checked(value, hint, where)
    return kind(**values)


def _checked(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
    if type(None) in options:
        if value is None:
            return None
        hint = next(option for option in options if option is not type(None))
    if typing.get_args(hint)[1:] == (...,):
        parts = value if isinstance(value, list | tuple) else [value]
        return tuple(_checked(part, typing.get_args(hint)[0], where) for part in parts)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise ValueError(f"{where}: expected two numbers, got {_short(value)}")
        return tuple(_checked(part, float, where) for part in value)
    if hint is float:
        # YAML reads 1e-3 without a dot as text
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(f"{where}: expected a number, got {_short(value)}")
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{where}: expected a number, got {_short(value)}") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {hint.__name__}, got {_short(value)}")
    return value
