"""What a hash grid looks like (scales, resolutions, offsets, index rules of its levels), a network, and a field."""

import functools
import itertools
import math
import operator
from dataclasses import dataclass, field, fields

import numpy as np

DIALECTS = ("tcnn", "ngp")
KINDS = ("hash", "dense", "tiled")
INTERPOLATIONS = ("linear", "smoothstep", "nearest")  # the kernels know them by their place here
PRIMES = (1, 2654435761, 805459861, 3674653429)
MAX_LEVELS = 32
_MAX_SIDE = {2: 65535, 3: 1625, 4: 255}  # of a level, by dim, for its vertices to be counted in 32 bits
ACTIVATIONS = ("none", "relu", "silu", "softplus", "sigmoid", "exp", "tanh")  # in the order of csrc/mlp/mlp.h
DENSITIES = ("softplus", "exp")
BLOBS = ("linear", "gaussian")
MLP_LIMITS = {"inputs": 256, "outputs": 128, "width": 128, "hidden_layers": 8}


@dataclass(frozen=True)
class HashGridSpec:
    """A multiresolution grid (Mueller et al. 2022, section 3), in the conventions of one of two code bases.

    dim: 2, 3 or 4; features: 1, 2, 4 or 8 per level; levels: 1 to 32; log2_table_size: at most 2^this entries a level.
    Level l has scale = base_resolution * per_level_scale^l - 1, its position is x * scale + 0.5.
    kind: "hash" (dense while it fits), "dense" (never hashed, every entry stored) or "tiled" (never hashed, wraps
        after base_resolution^dim entries, in the ngp dialect after 2^log2_table_size).
    interpolation: "linear", "smoothstep" for a continuous gradient, or "nearest": the cell's lowest vertex alone, and
        no gradient to x.
    dialect: "tcnn" (tiny-cuda-nn: x outside [0, 1] continues the grid, wrapping) or "ngp" (torch-ngp: output and
        gradient are zero there; dense levels have one more vertex a side).
    align_corners: "ngp" only; drops the 0.5.
    Scales are rounded as float32 host code rounds them, once, here: one ulp in exp2 could change a resolution.
    """

    dim: int = 3
    levels: int = 16
    features: int = 2
    log2_table_size: int = 19
    base_resolution: int = 16
    per_level_scale: float = 2.0
    kind: str = "hash"
    interpolation: str = "linear"
    dialect: str = "tcnn"
    align_corners: bool = False

    # Derived, one value a level:
    level_scales: tuple[float, ...] = field(init=False, repr=False, compare=False)
    level_resolutions: tuple[int, ...] = field(init=False, repr=False, compare=False)  # vertices a side
    level_offsets: tuple[int, ...] = field(init=False, repr=False, compare=False)  # in entries; levels + 1 values
    level_hashed: tuple[bool, ...] = field(init=False, repr=False, compare=False)
    level_strides: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)  # uint32, if not hashed
    key: str = field(init=False, repr=False, compare=False)  # what ops pass on; `parse` reads it

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.init:  # numpy's and torch's scalars become Python's, of which the key is made
                object.__setattr__(self, f.name, _plain(f.name, getattr(self, f.name), type(f.default)))
        _require_choice("dim", self.dim, (2, 3, 4))
        _require_choice("features", self.features, (1, 2, 4, 8))
        _require_choice("kind", self.kind, KINDS)
        _require_choice("interpolation", self.interpolation, INTERPOLATIONS)
        _require_choice("dialect", self.dialect, DIALECTS)
        _require_range("levels", self.levels, 1, MAX_LEVELS)
        _require_range("log2_table_size", self.log2_table_size, 1, 28)
        _require_range("base_resolution", self.base_resolution, 1, 1 << 16)
        if not 1.0 <= self.per_level_scale <= 16.0:
            raise ValueError(f"per_level_scale: expected 1 to 16, got {self.per_level_scale}")
        if self.align_corners and self.dialect != "ngp":
            raise ValueError("align_corners: expected False, as only the ngp dialect has it")
        scales, resolutions, offsets, hashed, strides = [], [], [0], [], []
        for level in range(self.levels):
            scale, resolution, entries = self._level(level)
            if offsets[-1] + entries > 1 << 30:
                raise ValueError(f"levels: level {level} of resolution {resolution} needs {entries} entries; "
                                 f"at most 2^30 in all are supported")
            vertices = resolution ** self.dim
            scales.append(scale)
            resolutions.append(resolution)
            offsets.append(offsets[-1] + entries)
            hashed.append(self.kind == "hash" and vertices > entries)
            steps = [resolution**d for d in range(self.dim)]
            if self.dialect == "ngp":  # repeats along the axes whose stride exceeds the table
                strides.append(tuple(step if step <= entries else 0 for step in steps))
            else:  # tiny-cuda-nn reads one entry only where the index would overflow
                strides.append(tuple(steps) if resolution <= _MAX_SIDE[self.dim] else (0,) * self.dim)
        derived = {"level_scales": tuple(scales), "level_resolutions": tuple(resolutions),
                   "level_offsets": tuple(offsets), "level_hashed": tuple(hashed), "level_strides": tuple(strides)}
        derived["key"] = ",".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.init)
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _level(self, level: int) -> tuple[float, int, int]:
        """scale, vertices a side, entries"""
        f32 = np.float32
        exponent = f32(level) * f32(math.log2(f32(self.per_level_scale)))
        power = f32(2.0 ** float(exponent))
        side = float(power) * self.base_resolution
        if side > 1 << 31:
            raise ValueError(f"levels: level {level} would have {side:.6g} vertices a side; at most 2^31 are supported")
        scale = f32(f32(power * f32(self.base_resolution)) - f32(1))
        if self.dialect == "tcnn":
            resolution = math.ceil(scale) + 1
            entries = _round_up(resolution**self.dim, 8)
            if self.kind == "hash":
                entries = min(entries, 1 << self.log2_table_size)
            elif self.kind == "tiled":
                entries = min(entries, self.base_resolution**self.dim)
        else:
            resolution = math.ceil(self.base_resolution * self.per_level_scale**level) + (not self.align_corners)
            entries = resolution**self.dim
            if self.kind != "dense":
                entries = min(entries, 1 << self.log2_table_size)
            entries = _round_up(entries, 8)
        return float(scale), resolution, entries

    @property
    def num_params(self) -> int:
        return self.level_offsets[-1] * self.features

    @property
    def output_dim(self) -> int:
        return self.levels * self.features

    @property
    def offset(self) -> float:
        """Added to x * scale."""
        return 0.0 if self.align_corners else 0.5

    def level_factors(self, level: int) -> tuple[int, ...]:
        """What one step along each axis adds to (dense) or multiplies into (hashed) the index."""
        return PRIMES[: self.dim] if self.level_hashed[level] else self.level_strides[level]

    @classmethod
    def with_max_resolution(cls, max_resolution: int, **others) -> "HashGridSpec":
        """The spec whose finest level has scale `max_resolution` - 1; the other arguments as for HashGridSpec."""
        levels, base = others.get("levels", cls.levels), others.get("base_resolution", cls.base_resolution)
        if max_resolution < base:
            raise ValueError(f"max_resolution: expected at least base_resolution = {base}, got {max_resolution}")
        growth = 2.0 ** (math.log2(max_resolution / base) / max(levels - 1, 1))
        return cls(**{**others, "per_level_scale": growth})

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(key: str) -> "HashGridSpec":
        """The spec that `key` was made from."""
        kinds = {f.name: type(f.default) for f in fields(HashGridSpec) if f.init}
        values = {}
        for item in key.split(","):
            name, _, text = item.partition("=")
            kind = kinds[name]
            values[name] = text == "True" if kind is bool else kind(text.strip("'"))
        return HashGridSpec(**values)


@dataclass(frozen=True)
class MLPSpec:
    """A multilayer perceptron: `hidden_layers` layers of `width`, each followed by `activation`, and an output layer.

    inputs: 1 to 256; outputs, width: 1 to 128; hidden_layers: 1 to 8.
    activation, output_activation: none, relu, silu, softplus, sigmoid, exp or tanh.
    bias: whether the layers have one.
    The parameters are one flat vector, layer after layer: the weight [out, in] row by row, then the bias [out].
    """

    inputs: int
    outputs: int
    width: int = 64
    hidden_layers: int = 1
    activation: str = "relu"
    output_activation: str = "none"
    bias: bool = True

    key: str = field(init=False, repr=False, compare=False)  # what ops pass on; `parse` reads it

    def __post_init__(self) -> None:
        for name, most in MLP_LIMITS.items():
            _require_range(name, getattr(self, name), 1, most)
        for name in ("activation", "output_activation"):
            _require_choice(name, getattr(self, name), ACTIVATIONS)
        key = ",".join(str(getattr(self, f.name)) for f in fields(self) if f.init)
        object.__setattr__(self, "key", key)

    @property
    def layer_shapes(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of every layer."""
        sizes = (self.inputs, *[self.width] * self.hidden_layers, self.outputs)
        return tuple((out, into) for into, out in itertools.pairwise(sizes))

    @property
    def num_params(self) -> int:
        return sum(out * (into + self.bias) for out, into in self.layer_shapes)

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(key: str) -> "MLPSpec":
        """The spec that `key` was made from."""
        *numbers, activation, output_activation, bias = key.split(",")
        return MLPSpec(*map(int, numbers), activation, output_activation, bias == "True")


@dataclass(frozen=True)
class FieldSpec:
    """A radiance field in the box [-radius, radius]^3: density and albedo = network(grid(x)) + blob.

    grid: of dimension 3. mlp: from grid.output_dim to 4, raw density and raw albedo; no output activation.
    x = (position + radius) / (2 radius), clamped to [0, 1], is the grid's coordinate; raw = mlp_0 + blob(position).
    density: "softplus" or "exp" of raw (kept below 15 for exp), times sharpness; albedo = sigmoid(mlp_1, mlp_2, mlp_3).
    blob: "linear" scale (1 - |p| / width), or "gaussian" scale exp(-|p|^2 / (2 width^2)).
    """

    grid: HashGridSpec
    mlp: MLPSpec
    radius: float = 1.0
    density: str = "softplus"
    sharpness: float = 1.0
    blob: str = "linear"
    blob_scale: float = 0.0
    blob_width: float = 0.5

    key: str = field(init=False, repr=False, compare=False)  # what ops pass on; `parse` reads it

    def __post_init__(self) -> None:
        _require_choice("grid.dim", self.grid.dim, (3,))
        _require_choice("mlp.inputs", self.mlp.inputs, (self.grid.output_dim,))
        _require_choice("mlp.outputs", self.mlp.outputs, (4,))
        _require_choice("mlp.output_activation", self.mlp.output_activation, ("none",))
        _require_choice("density", self.density, DENSITIES)
        _require_choice("blob", self.blob, BLOBS)
        for name in ("radius", "sharpness", "blob_width"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        rest = (self.radius, self.density, self.sharpness, self.blob, self.blob_scale, self.blob_width)
        object.__setattr__(self, "key", "|".join((self.grid.key, self.mlp.key, *map(str, rest))))

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(key: str) -> "FieldSpec":
        """The spec that `key` was made from."""
        grid, mlp, radius, density, sharpness, blob, scale, width = key.split("|")
        return FieldSpec(HashGridSpec.parse(grid), MLPSpec.parse(mlp), float(radius), density, float(sharpness), blob,
                         float(scale), float(width))


def _plain(name: str, value: object, kind: type) -> int | float | bool | str:
    """`value` as the Python type `kind`."""
    try:
        if kind is float:
            return float(value)
        if kind is int and not isinstance(value, bool):
            return operator.index(value)
        if kind is str and isinstance(value, str):
            return str(value)
        if kind is bool and (value is True or value is False or value in (0, 1)):
            return bool(value)
    except (TypeError, ValueError):
        pass
    wanted = {float: "a number", int: "an integer", str: "a string", bool: "True or False"}[kind]
    raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def _require_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")


def _require_range(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: expected an integer from {low} to {high}, got {value!r}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
