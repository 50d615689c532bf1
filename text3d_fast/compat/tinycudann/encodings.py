"""tiny-cuda-nn's encodings by their configurations. Each maps float32 [N, dims] to float32 [N, width].

What tiny-cuda-nn says of them (DOCUMENTATION.md and include/tiny-cuda-nn/encodings, version 2.0) holds: order of the
outputs, padding (its value and where it goes), order of the parameters, initial values from a seed.
"""

import math

import numpy as np
import torch
from torch.nn.functional import pad

from text3d_fast import ops
from text3d_fast.compat.tinycudann.pcg32 import PCG32


class Base:
    """An encoding without parameters whose outputs are padded with ones at the end."""

    alignment = 1  # of the first output, where encodings are concatenated
    n_params = 0
    padding = 1.0

    def __init__(self, dims: int, width: int, **hyperparams) -> None:
        self.dims, self.unpadded, self.width = dims, width, width
        self.hyperparams = {"otype": type(self).__name__, **hyperparams}

    def align(self, multiple: int) -> None:
        """Pad the outputs to a multiple of this and of the encoding's own alignment."""
        self.pad_to(_round_up(self.width, math.lcm(multiple, self.alignment)))

    def pad_to(self, width: int) -> None:
        if width < self.unpadded:
            raise ValueError(f"{type(self).__name__}: {self.unpadded} outputs do not fit into {width}")
        self.width = width

    def initial_params(self, random: PCG32) -> np.ndarray:
        return np.empty(0, np.float32)

    def __call__(self, x: torch.Tensor, params: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x [N, dims] in the original's range, params of this encoding; dtype: what parameters are rounded to."""
        y = self.encode(x, params, dtype)
        return y if self.width == self.unpadded else pad(y, (0, self.width - self.unpadded), value=self.padding)

    def encode(self, x: torch.Tensor, params: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError


class Identity(Base):
    def __init__(self, dims: int, config: dict) -> None:
        self.scale, self.offset = float(config.get("scale", 1.0)), float(config.get("offset", 0.0))
        super().__init__(dims, dims, scale=self.scale, offset=self.offset)

    def encode(self, x, params, dtype):
        return x if (self.scale, self.offset) == (1.0, 0.0) else x * self.scale + self.offset


class Empty(Base):
    def __init__(self, dims: int, config: dict) -> None:
        super().__init__(dims, 0)

    def encode(self, x, params, dtype):
        return x[:, :0]


class Frequency(Base):
    """sin and cos of 2^k pi x, side by side, for each k, for each input (NeRF's)."""

    def __init__(self, dims: int, config: dict) -> None:
        self.frequencies = int(config.get("n_frequencies", 12))
        super().__init__(dims, dims * self.frequencies * 2, n_frequencies=self.frequencies)

    def encode(self, x, params, dtype):
        angles = x[:, :, None] * _powers(self.frequencies, x) * math.pi
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)


class TriangleWave(Base):
    """Waves of period 2^(1-k), shifted by k / 4 periods, for each k, for each input."""

    def __init__(self, dims: int, config: dict) -> None:
        self.frequencies = int(config.get("n_frequencies", 12))
        super().__init__(dims, dims * self.frequencies, n_frequencies=self.frequencies)

    def encode(self, x, params, dtype):
        shift = torch.arange(self.frequencies, dtype=x.dtype, device=x.device) / 4
        phase = x[:, :, None] * (_powers(self.frequencies, x) / 2) + shift
        return ((phase - phase.floor() - 0.5).abs() * 4 - 1).flatten(1)


class OneBlob(Base):
    """How much of a bump of width 2 / bins around x (a quartic kernel) falls into each bin of [0, 1], which wraps."""

    def __init__(self, dims: int, config: dict) -> None:
        self.bins = int(config.get("n_bins", 16))
        if self.bins < 1 or self.bins & (self.bins - 1):
            raise ValueError(f"n_bins: expected a power of 2, got {self.bins}")
        super().__init__(dims, dims * self.bins, n_bins=self.bins)

    def encode(self, x, params, dtype):
        distance = torch.arange(self.bins + 1, dtype=x.dtype, device=x.device) / self.bins - x[:, :, None]
        below = sum(self._cdf(distance + around) for around in (0.0, -1.0, 1.0))
        return below.diff(dim=-1).flatten(1)

    def _cdf(self, distance):
        u = distance * self.bins
        square = u * u
        return ((15 / 16) * u * (1 - (2 / 3) * square + (1 / 5) * square * square) + 0.5).clamp(0, 1)


class SphericalHarmonics(Base):
    """Real spherical harmonics (Sloan 2013, appendix A1) of the direction 2 x - 1, taken as polynomials where it has
    not length 1; degree^2 outputs, in the order of l^2 + l + m. Padding comes first."""

    def __init__(self, dims: int, config: dict) -> None:
        self.degree = int(config.get("degree", 4))
        if dims != 3:
            raise ValueError(f"SphericalHarmonics: expected 3 inputs, got {dims}")
        if not 1 <= self.degree <= 8:
            raise ValueError(f"degree: expected 1 to 8, got {self.degree}")
        super().__init__(dims, self.degree**2, degree=self.degree)

    def __call__(self, x, params, dtype):
        y = self.encode(x, params, dtype)
        return y if self.width == self.unpadded else pad(y, (self.width - self.unpadded, 0), value=self.padding)

    def encode(self, x, params, dtype):
        x, y, z = (2 * x - 1).unbind(1)
        one = torch.ones_like(x)
        outputs: dict[int, torch.Tensor] = {}
        cosine, sine = one, torch.zeros_like(x)  # real and imaginary part of (x + i y)^m
        top = 1.0  # of the Legendre polynomial of degree m and order m, without its power of the sine
        for m in range(self.degree):
            before, polynomial = torch.zeros_like(x), top * one
            for l in range(m, self.degree):
                norm = math.sqrt((2 * l + 1) / (4 * math.pi) * math.factorial(l - m) / math.factorial(l + m))
                if m == 0:
                    outputs[l * l + l] = norm * polynomial
                else:
                    outputs[l * l + l + m] = math.sqrt(2) * norm * cosine * polynomial
                    outputs[l * l + l - m] = math.sqrt(2) * norm * sine * polynomial
                before, polynomial = polynomial, (z * (2 * l + 1) * polynomial - (l + m) * before) / (l + 1 - m)
            cosine, sine = x * cosine - y * sine, x * sine + y * cosine
            top *= -(2 * m + 1)
        return torch.stack([outputs[i] for i in range(self.degree**2)], 1)


class Grid(Base):
    """HashGrid, DenseGrid and TiledGrid: ops.hash_grid in the tcnn dialect."""

    padding = 0.0

    def __init__(self, dims: int, config: dict) -> None:
        for key, only in (("hash", "CoherentPrime"), ("stochastic_interpolation", False), ("fixed_point_pos", False)):
            if str(config.get(key, only)).lower() != str(only).lower():
                raise ValueError(f"{key}: expected {only}, the only kind there is here, got {config[key]!r}")
        default = {"tiledgrid": "Tiled", "densegrid": "Dense"}.get(str(config.get("otype", "Grid")).lower(), "Hash")
        kind = str(config.get("type", default)).lower()
        features = int(config.get("n_features_per_level", 2))
        total = config.get("n_features", config.get("n_grid_features"))
        if total is not None and "n_levels" in config:
            raise ValueError("n_features: expected either n_features or n_levels, as one determines the other")
        levels = int(config.get("n_levels", 16)) if total is None else int(total) // max(features, 1)
        if total is not None and int(total) % features:
            raise ValueError(f"n_features: expected a multiple of n_features_per_level = {features}, got {total}")
        base = int(config.get("base_resolution", 16))
        growth = config.get("per_level_scale")
        if growth is None:
            growth = (256 / base) ** (1 / max(levels - 1, 1)) if kind == "dense" else 2.0
        interpolation = str(config.get("interpolation", "Linear"))
        self.spec = ops.HashGridSpec(dim=dims, levels=levels, features=features, base_resolution=base,
                                     log2_table_size=int(config.get("log2_hashmap_size", 19)), per_level_scale=growth,
                                     kind=kind, interpolation=interpolation.lower())
        self.alignment, self.n_params = features, self.spec.num_params
        super().__init__(dims, self.spec.output_dim, type=kind.capitalize(), n_levels=levels,
                         n_features_per_level=features, base_resolution=base, per_level_scale=self.spec.per_level_scale,
                         interpolation=interpolation, log2_hashmap_size=self.spec.log2_table_size)

    def initial_params(self, random):
        # the original's threads draw four numbers each, a whole grid of threads apart
        count = self.n_params
        threads = _round_up(_round_up(count, 4) // 4, 128)
        state = random.state
        values = random.floats(4 * threads).reshape(threads, 4).T.reshape(-1)[:count]
        random.state = state
        random.floats(count)
        low = np.float32(-1e-4)
        return values * (np.float32(1e-4) - low) + low

    def encode(self, x, params, dtype):
        return ops.hash_grid(x, params, self.spec, compute_dtype=dtype)


class Composite(Base):
    """Several encodings of some of the inputs each, their outputs side by side, summed or multiplied."""

    def __init__(self, dims: int, config: dict) -> None:
        nested = config.get("nested")
        if not isinstance(nested, (list, tuple)):
            raise ValueError(f"nested: expected a list of encodings, got {nested!r}")
        self.reduction = str(config.get("reduction", "Concatenation")).lower()
        if self.reduction not in ("concatenation", "sum", "product"):
            raise ValueError(f"reduction: expected Concatenation, Sum or Product, got {config['reduction']!r}")
        self.nested: list[Base] = []
        self.begins: list[int] = []
        placed = any("dims_to_encode_begin" in part for part in nested)
        taken = sum(int(part.get("n_dims_to_encode", 0)) for part in nested)
        if not placed and taken > dims:
            raise ValueError(f"nested: expected at most {dims} dims to encode in all, got {taken}")
        rest = None if placed else dims - taken
        begin = 0
        for part in nested:
            if "n_dims_to_encode" in part:
                begin = int(part.get("dims_to_encode_begin", begin))
                count = int(part["n_dims_to_encode"])
            elif rest is None:
                raise ValueError("nested: n_dims_to_encode may be left out of one encoding, of none where others have "
                                 "dims_to_encode_begin")
            else:
                count, rest = rest, None
            if begin + count > dims:
                raise ValueError(f"nested: inputs {begin} to {begin + count} are wanted of {dims}")
            if count:
                self.nested.append(create_encoding(count, part, 1))
                self.begins.append(begin)
            begin += count
        if not self.nested:
            raise ValueError("nested: expected at least one encoding of at least one input")
        self.alignment = math.lcm(*(part.alignment for part in self.nested))
        if self.reduction == "concatenation":
            so_far = 0
            for part, following in zip(self.nested, self.nested[1:]):
                part.pad_to(_round_up(so_far + part.width, following.alignment) - so_far)
                so_far += part.width
        else:
            for part in self.nested:
                part.align(self.alignment)
            widths = {part.width for part in self.nested}
            if len(widths) > 1:
                raise ValueError(f"nested: expected encodings of one width, got {sorted(widths)}")
        self.n_params = sum(part.n_params for part in self.nested)
        super().__init__(dims, self._width(), nested=[part.hyperparams for part in self.nested])

    def _width(self) -> int:
        return sum(part.width for part in self.nested) if self.reduction == "concatenation" else self.nested[0].width

    def pad_to(self, width):
        if self.reduction == "concatenation":
            self.nested[-1].pad_to(width - self._width() + self.nested[-1].width)
        else:
            for part in self.nested:
                part.pad_to(width)
        self.width = self.unpadded = width

    def initial_params(self, random):
        return np.concatenate([part.initial_params(random) for part in self.nested])

    def encode(self, x, params, dtype):
        shares = params.split([part.n_params for part in self.nested])
        outputs = [part(x[:, begin : begin + part.dims], share, dtype)
                   for part, begin, share in zip(self.nested, self.begins, shares)]
        if self.reduction == "concatenation":
            return torch.cat(outputs, 1)
        stacked = torch.stack(outputs)
        return stacked.sum(0) if self.reduction == "sum" else stacked.prod(0)


def _neural_radiance_cache(dims: int, config: dict) -> Composite:
    return Composite(dims, {"nested": [
        {"n_dims_to_encode": 3, "otype": "TriangleWave", "n_frequencies": config.get("n_frequencies", 12)},
        {"n_dims_to_encode": 5, "otype": "OneBlob", "n_bins": config.get("n_bins", 4)},
        {"otype": "Identity"}]})


_ENCODINGS = {kind.__name__.lower(): kind
              for kind in (Composite, Empty, Frequency, Grid, Identity, OneBlob, SphericalHarmonics, TriangleWave)}
_ENCODINGS |= dict.fromkeys(("hashgrid", "tiledgrid", "densegrid"), Grid)
_ENCODINGS |= dict.fromkeys(("nrc", "oneblobfrequency"), _neural_radiance_cache)


def create_encoding(dims: int, config: dict, alignment: int = 0) -> Base:
    """The encoding that `config` describes; its outputs padded to a multiple of `alignment`, if that is not 0."""
    name = str(config.get("otype", "OneBlob"))
    if name.lower() not in _ENCODINGS:
        raise ValueError(f"otype: expected an encoding ({', '.join(sorted(_ENCODINGS))}), got {name!r}")
    encoding = _ENCODINGS[name.lower()](int(dims), config)
    if alignment:
        encoding.align(alignment)
    return encoding


def _powers(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.exp2(torch.arange(count, dtype=like.dtype, device=like.device))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
