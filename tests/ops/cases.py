"""One small differentiable case of each op, for what must hold of all of them."""

from collections.abc import Callable

import torch

from text3d_fast import ops

Case = tuple[Callable[..., torch.Tensor], list[torch.Tensor]]  # a function of its leaves, and the leaves
SPEC = ops.HashGridSpec(levels=3, features=2, log2_table_size=6, base_resolution=3)


def _samples(device: torch.device) -> ops.RaySamples:
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32, device=device)
    ids = torch.tensor([0, 0, 0, 2, 2, 2, 2], dtype=torch.int32, device=device)
    starts = torch.linspace(0, 1, 7, device=device)
    return ops.RaySamples(ids, starts, starts + 0.2, offsets)


def _triangles(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    pos = torch.tensor([[-0.8, -0.7, 0.1, 1.0], [0.9, -0.5, 0.2, 1.1], [0.0, 0.8, 0.3, 0.9], [0.9, 0.9, 0.5, 1.0]],
                       device=device)
    return pos[None], torch.tensor([[0, 1, 2], [1, 3, 2]], dtype=torch.int32, device=device)


def composite(device: torch.device, generator: torch.Generator) -> Case:
    samples = _samples(device)
    leaves = [torch.rand(7, generator=generator, device=device), torch.rand(7, 3, generator=generator, device=device)]
    return lambda sigma, values: ops.composite(sigma, values, samples).values, leaves


def segmented_scan(device: torch.device, generator: torch.Generator) -> Case:
    offsets = _samples(device).ray_offsets
    return (lambda values: ops.segmented_scan(values, offsets, "product", True),
            [torch.rand(7, generator=generator, device=device)])


def _grid_leaves(device: torch.device, generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.rand(5, 3, generator=generator, device=device),
            torch.randn(SPEC.num_params, generator=generator, device=device)]


def hash_grid(device: torch.device, generator: torch.Generator) -> Case:
    return lambda x, params: ops.hash_grid(x, params, SPEC), _grid_leaves(device, generator)


def hash_grid_half(device: torch.device, generator: torch.Generator) -> Case:
    return (lambda x, params: ops.hash_grid(x, params, SPEC, compute_dtype=torch.float16),
            _grid_leaves(device, generator))


def hash_grid_grad(device: torch.device, generator: torch.Generator) -> Case:
    return lambda x, params: ops.hash_grid_grad(x, params, SPEC)[1], _grid_leaves(device, generator)


def hash_grid_vjp(device: torch.device, generator: torch.Generator) -> Case:
    cotangent = torch.randn(5, SPEC.output_dim, generator=generator, device=device)
    return lambda x, params: ops.hash_grid_vjp(x, params, cotangent, SPEC), _grid_leaves(device, generator)


NETWORK = ops.MLPSpec(SPEC.output_dim, 4, 17, 2, "silu")


def _weights(device: torch.device, generator: torch.Generator) -> torch.Tensor:
    return 0.3 * torch.randn(NETWORK.num_params, generator=generator, device=device)


def mlp(device: torch.device, generator: torch.Generator) -> Case:
    x = torch.randn(3, 7, NETWORK.inputs, generator=generator, device=device)
    return lambda x, weights: ops.mlp(x, weights, NETWORK), [x, _weights(device, generator)]


def mlp_half(device: torch.device, generator: torch.Generator) -> Case:
    x = torch.randn(5, NETWORK.inputs, generator=generator, device=device)
    return (lambda x, weights: ops.mlp(x, weights, NETWORK, compute_dtype=torch.float16),
            [x, _weights(device, generator)])


def hash_mlp(device: torch.device, generator: torch.Generator) -> Case:
    return (lambda x, params, weights: ops.hash_mlp(x, params, weights, SPEC, NETWORK),
            [*_grid_leaves(device, generator), _weights(device, generator)])


def _render_field(device: torch.device, generator: torch.Generator, mode: str) -> Case:
    spec = ops.FieldSpec(SPEC, NETWORK, blob_scale=2.0)
    samples = _samples(device)
    origins = 0.3 * torch.randn(3, 3, generator=generator, device=device) - torch.tensor([0, 0, 0.6], device=device)
    directions = torch.tensor([[0.0, 0.1, 1.0]] * 3, device=device)
    lights = ops.PointLights(*torch.rand(3, 1, 3, generator=generator, device=device)) if mode != "albedo" else None
    return (lambda params, weights: torch.cat([out[:, None] if out.dim() == 1 else out for out in ops.render_field(
                origins, directions, params, weights, samples, spec, mode=mode, lights=lights) if out is not None], 1),
            [_grid_leaves(device, generator)[1], _weights(device, generator)])


def render_field(device: torch.device, generator: torch.Generator) -> Case:
    return _render_field(device, generator, "albedo")


def render_field_lit(device: torch.device, generator: torch.Generator) -> Case:
    return _render_field(device, generator, "lambertian")


def rasterize(device: torch.device, generator: torch.Generator) -> Case:
    pos, tri = _triangles(device)
    return lambda pos: torch.cat(ops.rasterize(pos, tri, (6, 7)), -1), [pos]


def interpolate(device: torch.device, generator: torch.Generator) -> Case:
    pos, tri = _triangles(device)
    rast, rast_db = ops.rasterize(pos, tri, (6, 7))
    attr = torch.randn(4, 3, generator=generator, device=device)
    return (lambda attr, rast, rast_db: torch.cat(ops.interpolate(attr, rast, tri, rast_db, "all"), -1),
            [attr, rast, rast_db])


def texture(device: torch.device, generator: torch.Generator) -> Case:
    tex, uv = (torch.rand(1, *shape, generator=generator, device=device) for shape in ((4, 8, 3), (3, 2, 2)))
    uv_da = 0.3 * torch.randn(1, 3, 2, 4, generator=generator, device=device)
    return lambda tex, uv, uv_da: ops.texture(tex, uv, uv_da), [tex, uv, uv_da]


def antialias(device: torch.device, generator: torch.Generator) -> Case:
    pos, tri = _triangles(device)
    rast, topology = ops.rasterize(pos, tri, (6, 7))[0], ops.antialias_topology(tri)
    color = torch.rand(1, 6, 7, 3, generator=generator, device=device)
    return lambda color, pos: ops.antialias(color, rast, pos, tri, topology), [color, pos]


def _tets(grid: ops.TetGrid, generator: torch.Generator) -> Case:
    if grid.kind != "kuhn":
        grid.tet_edges, grid.incidence  # noqa: B018  made now: what is made while export traces stays in the grid
    sdf = 0.7 - grid.positions.norm(dim=-1) + 0.05 * torch.rand(
        grid.num_vertices, generator=generator, device=grid.device)
    return lambda positions, sdf: ops.marching_tets(positions, sdf, grid)[0], [grid.positions.clone(), sdf]


def marching_tets_kuhn(device: torch.device, generator: torch.Generator) -> Case:
    return _tets(ops.TetGrid.kuhn(3, device), generator)


def marching_tets_a15(device: torch.device, generator: torch.Generator) -> Case:
    return _tets(ops.TetGrid.a15(4, device), generator)


CASES = {case.__name__: case for case in (
    composite, segmented_scan, hash_grid, hash_grid_half, hash_grid_grad, hash_grid_vjp, mlp, mlp_half, hash_mlp,
    render_field, render_field_lit, rasterize, interpolate, texture, antialias, marching_tets_kuhn, marching_tets_a15)}
TWICE = ("hash_grid", "hash_grid_half", "mlp", "mlp_half", "hash_mlp")  # differentiable twice
