"""One generator an op: valid arguments by name, and the call made of them. `GENERATORS` is the table to extend.

A dotted name is a field of an argument: "samples.t_starts".
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from text3d_fast import ops


@dataclass
class Call:
    """run(arguments) calls the op; differentiable: names of tensors whose gradients are compared too.

    near_ties: rounding may decide what is returned (which cell, which level), so values are compared in the mean.
    """

    arguments: dict[str, Any]
    run: Callable[[dict[str, Any]], Any]
    differentiable: tuple[str, ...] = ()
    near_ties: bool = False


class Draw:
    """Random choices, all from one seed."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))

    def size(self, largest: int = 9) -> int:
        """Now and then 0."""
        return 0 if self.random.random() < 0.04 else self.random.randint(1, largest)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def indices(self, count: int, *shape: int) -> torch.Tensor:
        if count == 0:
            shape = (0, *shape[1:])
        return torch.randint(max(count, 1), shape, generator=self.generator, dtype=torch.int32)

    def choice(self, *options):
        return self.random.choice(options)


def _samples(draw: Draw) -> dict[str, Any]:
    counts = torch.tensor([draw.size(7) for _ in range(draw.size(6))], dtype=torch.int64)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    ids = torch.repeat_interleave(torch.arange(len(counts)), counts).int()
    starts = torch.arange(len(ids)) * 0.1 + 0.02 * draw.uniform(len(ids))
    return {"samples.ray_ids": ids, "samples.t_starts": starts, "samples.t_ends": starts + 0.05,
            "samples.ray_offsets": offsets}


def _grouped(arguments: dict[str, Any]) -> dict[str, Any]:
    """Dotted names become objects again."""
    grouped: dict[str, Any] = {}
    for name, value in arguments.items():
        owner, _, field = name.partition(".")
        if field:
            grouped.setdefault(owner, {})[field] = value
        else:
            grouped[name] = value
    if isinstance(grouped.get("samples"), dict):
        grouped["samples"] = ops.RaySamples(**grouped["samples"])
    if isinstance(grouped.get("occupancy"), dict):
        grouped["occupancy"] = SimpleNamespace(**grouped["occupancy"])
    return grouped


def _call(function: Callable, arguments: dict[str, Any], *differentiable: str, near_ties: bool = False) -> Call:
    return Call(arguments, lambda given: function(**_grouped(given)), differentiable, near_ties)


def composite(draw: Draw) -> Call:
    samples = _samples(draw)
    count = len(samples["samples.ray_ids"])
    arguments = {"sigma": 3 * draw.uniform(count), "values": draw.normal(count, draw.size(5)), **samples,
                 "early_stop": draw.choice(0.0, 1e-4)}
    return _call(ops.composite, arguments, "sigma", "values", "samples.t_starts", "samples.t_ends")


def segmented_scan(draw: Draw) -> Call:
    offsets = _samples(draw)["samples.ray_offsets"]
    values = draw.uniform(int(offsets[-1]) + draw.choice(0, 0, 3)) + 0.5
    arguments = {"values": values, "offsets": offsets, "op": draw.choice("sum", "product"),
                 "exclusive": draw.choice(True, False), "reverse": draw.choice(True, False)}
    return _call(ops.segmented_scan, arguments, "values")


def prune_samples(draw: Draw) -> Call:
    samples = _samples(draw)
    arguments = {**samples, "sigma": 3 * draw.uniform(len(samples["samples.ray_ids"])),
                 "early_stop": draw.choice(0.0, 1e-2), "alpha_threshold": draw.choice(0.0, 0.05),
                 "capacity": draw.choice(None, 0, 5, 100)}
    return _call(ops.prune_samples, arguments)


def _hash_grid(draw: Draw) -> dict[str, Any]:
    dialect = draw.choice("tcnn", "ngp")
    spec = ops.HashGridSpec(
        dim=draw.choice(2, 3), levels=draw.random.randint(1, 5), features=draw.choice(1, 2, 4, 8),
        log2_table_size=draw.random.randint(3, 9), base_resolution=draw.random.randint(1, 6),
        per_level_scale=draw.choice(1.0, 1.5, 2.0), kind=draw.choice("hash", "tiled"),
        interpolation=draw.choice("linear", "smoothstep"), dialect=dialect)  # fmt: skip
    return {"x": draw.uniform(draw.size(), spec.dim), "params": draw.normal(spec.num_params), "spec": spec,
            "active_levels": draw.choice(None, draw.random.randint(0, spec.levels)),
            "compute_dtype": draw.choice(None, torch.float32, torch.float16, torch.bfloat16)}


def hash_grid(draw: Draw) -> Call:
    return _call(ops.hash_grid, _hash_grid(draw), "x", "params")


def hash_grid_grad(draw: Draw) -> Call:
    return _call(ops.hash_grid_grad, _hash_grid(draw), "params")


def hash_grid_vjp(draw: Draw) -> Call:
    arguments = _hash_grid(draw)
    arguments["cotangent"] = draw.normal(len(arguments["x"]), arguments["spec"].output_dim)
    return _call(ops.hash_grid_vjp, arguments, "params", "cotangent")


def mlp(draw: Draw) -> Call:
    spec = ops.MLPSpec(inputs=draw.random.randint(1, 9), outputs=draw.random.randint(1, 5),
                       width=draw.choice(16, 32), hidden_layers=draw.random.randint(1, 2))  # fmt: skip
    arguments = {"x": draw.normal(draw.size(), spec.inputs), "weights": 0.3 * draw.normal(spec.num_params),
                 "spec": spec}
    return _call(ops.mlp, arguments, "x", "weights")


def hash_mlp(draw: Draw) -> Call:
    arguments = _hash_grid(draw)
    grid = arguments.pop("spec")
    del arguments["compute_dtype"]
    spec = ops.MLPSpec(grid.output_dim, draw.random.randint(1, 5), draw.choice(3, 16), draw.choice(1, 2), "silu")
    arguments |= {"weights": 0.3 * draw.normal(spec.num_params), "grid_spec": grid, "mlp_spec": spec}
    return _call(ops.hash_mlp, arguments, "x", "params", "weights")


def render_field(draw: Draw) -> Call:
    samples = _samples(draw)
    rays = len(samples["samples.ray_offsets"]) - 1
    grid = ops.HashGridSpec(levels=draw.random.randint(1, 4), features=draw.choice(1, 2, 4), log2_table_size=6,
                            base_resolution=3, interpolation=draw.choice("linear", "smoothstep"))  # fmt: skip
    network = ops.MLPSpec(grid.output_dim, 4, draw.choice(5, 16), draw.choice(1, 2), draw.choice("silu", "softplus"))
    spec = ops.FieldSpec(grid, network, radius=1.5, density=draw.choice("softplus", "exp"),
                         blob=draw.choice("linear", "gaussian"), blob_scale=1.0)  # fmt: skip
    mode = draw.choice("albedo", "lambertian", "textureless")
    lights = ops.PointLights(2 * draw.normal(1, 3), draw.uniform(1, 3), draw.uniform(1, 3))
    arguments = {"origins": 0.5 * draw.normal(rays, 3), "directions": draw.normal(rays, 3),
                 "params": draw.normal(grid.num_params), "weights": 0.3 * draw.normal(network.num_params), **samples,
                 "spec": spec, "mode": mode, "lights": None if mode == "albedo" else lights,
                 "normals": draw.choice(True, False), "active_levels": draw.choice(None, 0, grid.levels),
                 "early_stop": draw.choice(0.0, 1e-4)}  # fmt: skip
    return _call(ops.render_field, arguments, "params", "weights")


def march_rays(draw: Draw) -> Call:
    rays, levels = draw.size(), draw.random.randint(1, 3)
    directions = draw.normal(rays, 3)
    arguments = {
        "origins": draw.normal(rays, 3), "directions": directions / directions.norm(dim=-1, keepdim=True),
        "occupancy.aabb": torch.tensor([-1.0, -1, -1, 1, 1, 1]),
        "occupancy.binaries": draw.uniform(levels, *(draw.random.randint(1, 6) for _ in range(3))) < 0.5,
        "near": draw.choice(0.0, 0.2, 0.1 + draw.uniform(rays)), "far": draw.choice(4.0, float("inf")),
        "step": draw.choice(0.05, 0.3), "jitter": draw.choice(None, 0.9 * draw.uniform(rays)),
        "cone_angle": draw.choice(0.0, 0.01), "capacity": draw.choice(None, 0, 40, 1000)}  # fmt: skip
    return _call(ops.march_rays, arguments, near_ties=True)


def _mesh(draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    batch, vertices = draw.size(2), draw.size(12)
    w = 0.5 + draw.uniform(batch, vertices, 1)
    pos = torch.cat([draw.normal(batch, vertices, 2), draw.uniform(batch, vertices, 1) - 0.3, w], -1)
    # Corners differ: the neighbour of a triangle without area lies on their edge, and rounding says on which side.
    count = draw.size(9) if vertices > 2 else 0
    triangles = [draw.random.sample(range(vertices), 3) for _ in range(count)]
    return pos, torch.tensor(triangles, dtype=torch.int32).reshape(count, 3)


def rasterize(draw: Draw) -> Call:
    pos, tri = _mesh(draw)
    arguments = {"pos": pos, "tri": tri, "resolution": (draw.size(), draw.size()), "ranges": None,
                 "grad_db": draw.choice(True, False)}
    if len(pos) and draw.random.random() < 0.3:
        start = draw.random.randint(0, len(tri))
        arguments |= {"pos": pos[0], "ranges": torch.tensor([[start, len(tri) - start]], dtype=torch.int32)}
    return _call(ops.rasterize, arguments, near_ties=True)


def interpolate(draw: Draw) -> Call:
    pos, tri = _mesh(draw)
    rast, rast_db = ops.rasterize(pos, tri, (draw.size(), draw.size()))
    count = draw.size(4)
    arguments = {"attr": draw.normal(*draw.choice((), (1,), (len(pos),)), pos.shape[1], count), "rast": rast,
                 "tri": tri, "rast_db": rast_db, "diff_attrs": draw.choice(None, "all", list(range(count))[:1])}
    return _call(ops.interpolate, arguments, "attr")


def antialias(draw: Draw) -> Call:
    pos, tri = _mesh(draw)
    rast, _ = ops.rasterize(pos, tri, (draw.size(), draw.size()))
    arguments = {"color": draw.uniform(*rast.shape[:3], draw.size(4)), "rast": rast, "pos": pos, "tri": tri,
                 "topology": draw.choice(None, ops.antialias_topology(tri)), "pos_gradient_boost": 1.0}
    return _call(ops.antialias, arguments, "color", near_ties=True)


def antialias_topology(draw: Draw) -> Call:
    return _call(ops.antialias_topology, {"tri": draw.indices(9, draw.size(12), 3)})


def texture(draw: Draw) -> Call:
    batch, channels, cube = draw.size(2), draw.size(5), draw.random.random() < 0.25
    boundary = "cube" if cube else draw.choice("wrap", "clamp", "zero")
    side = draw.choice(1, 2, 4, 8)
    faces = (6, side, side) if cube else (side, draw.choice(1, 2, 4, 8))
    tex = draw.normal(draw.choice(1, batch), *faces, channels)
    grid = (batch, draw.size(5), draw.size(5))
    mode = draw.choice("auto", "nearest", "linear", "linear-mipmap-nearest", "linear-mipmap-linear")
    arguments = {
        "tex": tex, "uv": draw.normal(*grid, 3 if cube else 2), "uv_da": 0.2 * draw.normal(*grid, 6 if cube else 4),
        "mip_level_bias": draw.choice(None, draw.normal(*grid)),
        "mip": ops.mip_stack(tex) if draw.random.random() < 0.3 else None, "filter_mode": mode,
        "boundary_mode": boundary, "max_mip_level": draw.choice(None, 0, 1, 3)}  # fmt: skip
    return _call(ops.texture, arguments, "tex", near_ties=mode in ("nearest", "linear-mipmap-nearest"))


def mip_stack(draw: Draw) -> Call:
    arguments = {"tex": draw.normal(draw.size(2), draw.choice(1, 2, 4, 6, 8), draw.choice(1, 4, 8), draw.size(3)),
                 "max_mip_level": draw.choice(0, 1)}
    return _call(ops.mip_stack, arguments, "tex")


def marching_tets(draw: Draw) -> Call:
    make = draw.choice(lambda: ops.TetGrid.kuhn(draw.random.randint(1, 4)),
                       lambda: ops.TetGrid.kuhn((1, draw.random.randint(1, 70), 2)), lambda: ops.TetGrid.a15(4))
    grid = make()
    arguments = {"positions": grid.positions + 0.01 * draw.normal(grid.num_vertices, 3),
                 "sdf": draw.normal(grid.num_vertices), "grid": grid}
    return _call(ops.marching_tets, arguments)


def tet_grid(draw: Draw) -> Call:
    arguments = {"positions": draw.normal(9, 3), "tets": draw.indices(9, draw.size(8), 4)}
    return _call(lambda positions, tets: ops.TetGrid.from_tets(positions, tets).edges, arguments)


GENERATORS: dict[str, Callable[[Draw], Call]] = {
    generate.__name__: generate
    for generate in (composite, segmented_scan, prune_samples, hash_grid, hash_grid_grad, hash_grid_vjp, mlp,
                     hash_mlp, render_field,
                     march_rays, rasterize, interpolate, antialias, antialias_topology, texture, mip_stack,
                     marching_tets, tet_grid)
}
