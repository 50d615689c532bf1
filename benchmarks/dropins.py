"""The drop-ins on a CPU against the libraries' own torch code, or plain torch of the same formulae: a table for
docs/dropins.md. Equal results first, gradients too, then the least time of interleaved rounds.

    python -m benchmarks.dropins [--kaolin CHECKOUT] [--only NAME]

nerfacc and tiny-cuda-nn have no torch code for what is measured here, so theirs is written down below as one would
without kernels; kaolin's marching tetrahedra are torch, and are taken from a checkout.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from text3d_fast import use_backend
from text3d_fast.compat import nerfacc
from text3d_fast.compat import tinycudann as tcnn
from text3d_fast.compat.kaolin.ops.conversions import marching_tetrahedra
from text3d_fast.ops.tet_grid import TetGrid

RAYS = 4096


class Case(NamedTuple):
    """ours(*leaves) and theirs(*leaves) give lists of tensors; tolerance: of the largest number of each."""

    name: str
    ours: Callable
    theirs: Callable
    leaves: list[torch.Tensor]
    tolerance: float = 1e-4


def packed(samples: int) -> dict[str, torch.Tensor]:
    """Rays of random lengths, as an occupancy grid leaves them."""
    torch.manual_seed(0)
    ids = torch.randint(RAYS, (samples,)).sort()[0]
    info = nerfacc.pack_info(ids, RAYS)
    place = torch.arange(samples) - info[ids, 0]
    starts = 0.5 + place * 0.01
    return {"ids": ids, "info": info, "place": place, "t0": starts, "t1": starts + 0.01}


def running_sum(x: torch.Tensor, rays: dict, exclusive: bool = True) -> torch.Tensor:
    """One running sum over all rays; in float32 it would be wrong after some thousand of them."""
    before = x.cumsum(0, dtype=torch.float64) - x
    out = before - before[rays["info"][:, 0].clamp(max=len(x) - 1)][rays["ids"]]
    return (out if exclusive else out + x).float()


def running_product(x: torch.Tensor, rays: dict) -> torch.Tensor:
    """Rays as rows of a table, filled up with ones."""
    longest = int(rays["info"][:, 1].max())
    table = x.new_ones(RAYS, longest + 1).index_put((rays["ids"], rays["place"] + 1), x)
    return table.cumprod(1)[rays["ids"], rays["place"]]


def weights_of(sigma: torch.Tensor, rays: dict) -> torch.Tensor:
    optical = sigma * (rays["t1"] - rays["t0"])
    return torch.exp(-running_sum(optical, rays)) * (1 - torch.exp(-optical))


def along(source: torch.Tensor, rays: dict) -> torch.Tensor:
    return source.new_zeros(RAYS, source.shape[1]).index_add(0, rays["ids"], source)


def nerfacc_cases() -> Iterator[Case]:
    for samples in (2**18, 2**20):
        rays = packed(samples)
        ids, info, t0, t1 = (rays[key] for key in ("ids", "info", "t0", "t1"))
        middle, size = 0.5 * (t0 + t1)[:, None], f"2^{samples.bit_length() - 1} samples"
        x, rgb = torch.rand(samples), torch.rand(samples, 3)
        where = {"ray_indices": ids, "n_rays": RAYS}
        yield Case(f"nerfacc.exclusive_sum, {size}", lambda x, i=info: [nerfacc.exclusive_sum(x, i)],
                   lambda x, r=rays: [running_sum(x, r)], [x])
        yield Case(f"nerfacc.exclusive_prod, {size}", lambda x, i=info: [nerfacc.exclusive_prod(x, i)],
                   lambda x, r=rays: [running_product(x, r)], [0.9 + 0.1 * x], 1e-3)
        yield Case(f"nerfacc.render_weight_from_density, {size}",
                   lambda s, t0=t0, t1=t1, w=where: [nerfacc.render_weight_from_density(t0, t1, s, **w)[0]],
                   lambda s, r=rays: [weights_of(s, r)], [5 * x])
        yield Case(f"nerfacc.accumulate_along_rays, 3 channels, {size}",
                   lambda w, v, where=where: [nerfacc.accumulate_along_rays(w, v, **where)],
                   lambda w, v, r=rays: [along(w[:, None] * v, r)], [x, rgb])

        def threestudio(sigma, rgb, t0=t0, t1=t1, m=middle, where=where):
            """Its renderer's weights, opacity, depth and colour, one call each."""
            weights = nerfacc.render_weight_from_density(t0, t1, sigma, **where)[0]
            return [nerfacc.accumulate_along_rays(weights, values, **where) for values in (None, m, rgb)]

        def plain(sigma, rgb, r=rays, m=middle):
            weights = weights_of(sigma, r)[:, None]
            return [along(source, r) for source in (weights, weights * m, weights * rgb)]

        yield Case(f"the same and three accumulate_along_rays, {size}", threestudio, plain, [5 * x, rgb])

        def rendering(sigma, rgb, t0=t0, t1=t1, where=where):
            return list(nerfacc.rendering(t0, t1, **where, rgb_sigma_fn=lambda *_: (rgb, sigma))[:3])

        def plain_rendering(sigma, rgb, plain=plain):
            opacity, depth, colour = plain(sigma, rgb)
            return [colour, opacity, depth / opacity.clamp(min=1e-7)]

        yield Case(f"nerfacc.rendering, {size}", rendering, plain_rendering, [5 * x, rgb])


def every_interval(origins, directions, estimator, step, far):
    """Every interval of the lattice looked up, in portions of 512 rays."""
    low, high = estimator.aabbs[0].split(3)
    starts, found = torch.arange(0, far, step), []
    for begin in range(0, len(origins), 512):
        o, d = origins[begin : begin + 512, None], directions[begin : begin + 512, None]
        cell = ((o + (starts + step / 2)[:, None] * d - low) / (high - low) * estimator.resolution).floor().long()
        inside = ((cell >= 0) & (cell < estimator.resolution)).all(-1)
        x, y, z = cell.clamp(min=0).minimum(estimator.resolution - 1).unbind(-1)
        ray, k = (inside & estimator.binaries[0, x, y, z]).nonzero(as_tuple=True)
        found.append((ray + begin, starts[k]))
    rays, starts = (torch.cat(part) for part in zip(*found))
    return [rays, starts, starts + step]


def sampling_case() -> Case:
    torch.manual_seed(0)
    estimator = nerfacc.OccGridEstimator([-1.0, -1, -1, 1, 1, 1], resolution=32)
    estimator.update_every_n_steps(0, lambda x: (x.norm(dim=-1, keepdim=True) < 0.7).float())
    axis = torch.linspace(-0.35, 0.35, 64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    directions = torch.nn.functional.normalize(torch.stack([x, y, -torch.ones_like(x)], -1).view(-1, 3), dim=-1)
    origins = torch.tensor([0.0, 0.0, 3.0]).expand_as(directions).contiguous()

    def count(samples):
        """How many on each ray: a middle within a rounding of a cell's face may fall on either side."""
        return torch.bincount(samples[0], minlength=RAYS).float()

    ours = lambda: [count(estimator.sampling(origins, directions, render_step_size=0.005))]
    theirs = lambda: [count(every_interval(origins, directions, estimator, 0.005, 5.0))]
    return Case("nerfacc.OccGridEstimator.sampling, 32^3 cells, 4096 rays", ours, theirs, [], 2e-2)


def tinycudann_cases() -> Iterator[Case]:
    grid = {"otype": "HashGrid", "n_levels": 16, "n_features_per_level": 2, "log2_hashmap_size": 19,
            "base_resolution": 16, "per_level_scale": 1.447}
    network = {"otype": "FullyFusedMLP", "activation": "ReLU", "output_activation": "None", "n_neurons": 64,
               "n_hidden_layers": 2}
    torch.manual_seed(0)
    x = torch.rand(2**17, 3)
    encoding, mlp = tcnn.Encoding(3, grid, dtype=torch.float32), tcnn.Network(32, 16, network)
    both = tcnn.NetworkWithInputEncoding(3, 16, grid, network)
    with torch.no_grad():
        encoding.params.mul_(1e3), both.params[-encoding.params.numel() :].mul_(1e3)

    def of(module, x):
        def ours(params):
            return [torch.func.functional_call(module, {"params": params}, (x,)).float()]

        def theirs(params):
            with use_backend("reference"):
                return ours(params)

        return ours, theirs, [module.params.detach().clone()]

    # a rounding of the position, 4096 cells wide, moves a value by 2e-4 of its entries
    yield Case("tinycudann HashGrid, L16 F2 T19, 2^17 points", *of(encoding, x), 2e-3)
    features = torch.rand(2**17, 32)
    yield Case("tinycudann FullyFusedMLP, 64 wide, 2 hidden layers, 2^17 points", *of(mlp, features), 1e-2)  # halves
    yield Case("tinycudann NetworkWithInputEncoding of the two", *of(both, x), 1e-2)


def kaolin_case(checkout: Path) -> Case:
    spec = importlib.util.spec_from_file_location("tetmesh", checkout / "kaolin/ops/conversions/tetmesh.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    grid = TetGrid.kuhn(64)
    tets = grid.tets.long()
    sdf = 0.7 - grid.positions.norm(dim=-1)
    run = lambda convert: lambda positions, sdf: [convert(positions[None], tets, sdf[None])[0][0]]
    return Case("kaolin marching_tetrahedra, 64^3 cells of 6", run(marching_tetrahedra),
                run(module.marching_tetrahedra), [grid.positions.clone(), sdf])


def results(function: Callable, leaves: list[torch.Tensor], gradient: bool) -> list[torch.Tensor]:
    if not gradient:
        with torch.no_grad():
            return function(*leaves)
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator) for o in outputs]
    return list(torch.autograd.grad(outputs, leaves, cotangents))


def measure(case: Case, gradient: bool, rounds: int = 7) -> str:
    leaves = [leaf.requires_grad_(gradient) for leaf in case.leaves]
    apart = 0.0
    for a, b in zip(results(case.ours, leaves, gradient), results(case.theirs, leaves, gradient)):
        apart = max(apart, float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)))
    if not apart <= case.tolerance:
        raise AssertionError(f"{case.name}: results differ by {apart:.1e} of the largest, {case.tolerance:.0e} allowed")
    least = [float("inf")] * 2
    for _ in range(rounds):
        for i, function in enumerate((case.ours, case.theirs)):
            begun = time.perf_counter()
            results(function, leaves, gradient)
            least[i] = min(least[i], time.perf_counter() - begun)
    ours, theirs = (1e3 * t for t in least)
    what = "forward + backward" if gradient else "forward"
    return f"| {case.name} | {what} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.1f} | {apart:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kaolin", type=Path, help="a checkout of kaolin")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    cases = [*nerfacc_cases(), sampling_case(), *tinycudann_cases()]
    cases += [kaolin_case(options.kaolin)] if options.kaolin else []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| call | | drop-in, ms | torch, ms | times | apart |\n|---|---|---|---|---|---|")
    for case in cases:
        if options.only in case.name:
            for gradient in (False, True) if case.leaves else (False,):
                print(measure(case, gradient), flush=True)
    if not options.kaolin:
        print("| kaolin marching_tetrahedra | no checkout: --kaolin | | | | |")


if __name__ == "__main__":
    main()
