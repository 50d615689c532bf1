"""FlexiCubes (Shen et al. 2023) with kaolin's interface, order and results, in torch."""

from collections.abc import Callable

import torch
from torch.nn.functional import normalize

from text3d_fast.compat.kaolin.ops.conversions import _dual_cases as cases

__all__ = ["FlexiCubes"]


class FlexiCubes:
    """Dual marching cubes with weights: surfaces (or tetrahedra) of a scalar field that is negative inside.

    device: where the tables are, and where the inputs must be.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        def table(values):
            return torch.tensor(values, dtype=torch.long, device=device)

        self.device = device
        self._edges, self._edge_axes = table(cases.EDGES), table(cases.EDGE_AXES)
        self._loops, self._flips, self._face_edges = table(cases.loops()), table(cases.flips()), table(
            cases.edges_of_faces())

    def construct_voxel_grid(self, resolution: int | list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Corners [V, 3] of resolution (one number or three) cubes in [-0.5, 0.5]^3, and each cube's eight [C, 8]."""
        sizes = [resolution] * 3 if isinstance(resolution, int) else list(resolution)
        axes = [torch.arange(n + 1, device=self.device) / n - 0.5 for n in sizes]
        corners = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        index = torch.arange(len(corners), device=self.device).reshape([n + 1 for n in sizes])
        nx, ny, nz = sizes
        cubes = [index[x : x + nx, y : y + ny, z : z + nz] for z in (0, 1) for y in (0, 1) for x in (0, 1)]
        return corners, torch.stack(cubes, -1).reshape(-1, 8)

    def __call__(
        self,
        voxelgrid_vertices: torch.Tensor,
        scalar_field: torch.Tensor,
        cube_idx: torch.Tensor,
        resolution: int | list[int],
        qef_reg_scale: float = 1e-3,
        weight_scale: float = 0.99,
        beta: torch.Tensor | None = None,
        alpha: torch.Tensor | None = None,
        gamma_f: torch.Tensor | None = None,
        training: bool = False,
        output_tetmesh: bool = False,
        grad_func: Callable[[torch.Tensor], torch.Tensor] | None = None,
        voxelgrid_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """
        voxelgrid_vertices: [V, 3], deformed or not; scalar_field: [V], negative inside; cube_idx: int64 [C, 8], cubes
            in C order of `resolution`; beta [C, 12], alpha [C, 8], gamma_f [C]: weights of edges, corners and quads,
            any real numbers; voxelgrid_features: [V, F].
        training: each quad becomes four triangles around a weighted middle, otherwise two.
        grad_func: gradient of the field at points [N, 3]; then vertices minimize the error to the planes (with
            qef_reg_scale), not differentiably.
        Returns vertices [N, 3]; faces [M, 3], counter-clockwise seen from outside (or tets [M, 4]); the deviation of
        each crossing from its dual vertex's mean distance (the paper's equation 8); features [N, F] if given.
        Differentiable by vertices, field, weights and features. Raises ValueError for wrong shapes.
        """
        self._check(voxelgrid_vertices, scalar_field, cube_idx, beta, alpha, gamma_f, voxelgrid_features)
        if voxelgrid_features is not None and (output_tetmesh or grad_func is not None):
            raise ValueError("voxelgrid_features: expected None with output_tetmesh or grad_func")
        inside = scalar_field < 0
        inside_corners = inside[cube_idx]
        count = inside_corners.sum(1)
        surface = (count > 0) & (count < 8)
        if not bool(surface.any()):
            empty = [voxelgrid_vertices.new_zeros(0, 3), cube_idx.new_zeros(0, 4 if output_tetmesh else 3),
                     voxelgrid_vertices.new_zeros(0)]
            return tuple(empty) if voxelgrid_features is None else (*empty, voxelgrid_features[:0])

        case = self._cases(inside_corners, surface, resolution)
        cubes = cube_idx[surface]
        edges, edge_of, sharing = _unique_pairs(cubes[:, self._edges].reshape(-1, 2), len(inside))
        crossed = inside[edges].sum(1) == 1
        crossing_of = torch.where(crossed, crossed.cumsum(0) - 1, -1)[edge_of]  # [cubes * 12], -1: not crossed
        ends = edges[crossed]
        ends_x, ends_s = voxelgrid_vertices[ends], scalar_field[ends][..., None]
        crossings = _zero(ends_s, ends_x)

        # every (dual vertex, edge of its loop), cubes with fewer dual vertices first
        loop_counts = (self._loops[:, :, 0] >= 0).sum(1)[case]
        order = loop_counts.argsort(stable=True)
        loops = self._loops[case[order]]
        used = loops >= 0
        dual = (used[..., 0].flatten().cumsum(0) - 1).reshape(-1, 4, 1).expand_as(loops)[used]
        member = (order[:, None, None] * 12 + loops)[used]  # cube * 12 + edge
        crossing, total = crossing_of[member], int(used[..., 0].sum())
        gamma = _weights(gamma_f, surface, lambda g: g.sigmoid() * weight_scale + (1 - weight_scale) / 2)
        dual_gamma = None if gamma is None else gamma[order].repeat_interleave(loop_counts[order])

        features = None
        if grad_func is None:
            def soft(values):
                return values.tanh() * weight_scale + 1

            corner_weights, edge_weights = _weights(alpha, surface, soft), _weights(beta, surface, soft)
            s = ends_s[crossing]
            if corner_weights is not None:
                s = s * corner_weights[:, self._edges].reshape(-1, 2)[member][..., None]
            share = torch.ones_like(s[:, 0]) if edge_weights is None else edge_weights.reshape(-1)[member][:, None]
            share_sum = share.new_zeros(total, 1).index_add(0, dual, share)
            points = _mean(_zero(s, ends_x[crossing]), share, dual, share_sum)
            deviation = _deviation(points, crossings[crossing], dual)
            if voxelgrid_features is not None:
                features = _mean(_zero(s, voxelgrid_features[ends][crossing]), share, dual, share_sum)
        else:
            points = self._least_squares(voxelgrid_vertices[cubes[:, 0]][order], crossings, grad_func, loops, used,
                                         crossing, qef_reg_scale)
            deviation = points.new_zeros(1)
            dual_gamma = None
        dual_of = torch.zeros_like(crossing_of).index_put((member,), dual)

        shared = (sharing[edge_of] == 4) & (crossing_of >= 0)
        group, by_edge = crossing_of[shared].sort(stable=True)
        quads, quad_edge = dual_of[shared][by_edge].reshape(-1, 4), group[::4]
        start = scalar_field[ends[quad_edge, 0]] > 0  # the edge leads inwards
        quads = torch.cat((quads[start][:, [0, 1, 3, 2]], quads[~start][:, [2, 3, 1, 0]]))
        quad_edge = torch.cat((quad_edge[start], quad_edge[~start]))
        if grad_func is not None:
            with torch.no_grad():
                normals = normalize(grad_func(points), dim=-1)[quads]
                first, second = ((normals[:, i] * normals[:, i + 2]).sum(-1) for i in (0, 1))
        elif dual_gamma is None:
            first = second = points.new_ones(len(quads))
        else:
            first, second = (dual_gamma[quads[:, i]] * dual_gamma[quads[:, i + 2]] for i in (0, 1))
        if training:
            middle = len(points) + torch.arange(len(quads), device=quads.device)
            points = torch.cat((points, _middle(points, quads, first, second)))
            if features is not None:
                features = torch.cat((features, _middle(features, quads, first, second)))
            rim = torch.stack((quads, quads.roll(-1, 1)), -1)
            faces = torch.cat((rim, middle[:, None, None].expand(-1, 4, 1)), -1).reshape(-1, 3)
        else:
            faces = torch.where((first > second)[:, None], quads[:, [0, 1, 2, 0, 2, 3]], quads[:, [0, 1, 3, 3, 1, 2]])
            faces = faces.reshape(-1, 3)
        if not output_tetmesh:
            return (points, faces, deviation) if features is None else (points, faces, deviation, features)

        vertex_of = torch.where(inside, inside.cumsum(0) - 1 + len(points), -1)
        tip = torch.where(scalar_field[ends[quad_edge, 0]] < 0, ends[quad_edge, 0], ends[quad_edge, 1])
        tips = vertex_of[tip].repeat_interleave(4 if training else 2)
        outer = torch.cat((faces, tips[:, None]), 1)
        return self._fill(voxelgrid_vertices, cube_idx, inside, surface, count == 8, case, dual_of, points, vertex_of,
                          outer, deviation)

    def _check(self, vertices, field, cubes, beta, alpha, gamma, features) -> None:
        count, number = len(vertices), len(cubes)
        shapes = {"voxelgrid_vertices": (vertices, (count, 3)), "scalar_field": (field, (count,)),
                  "cube_idx": (cubes, (number, 8)), "beta": (beta, (number, 12)), "alpha": (alpha, (number, 8)),
                  "gamma_f": (gamma, (number,)),
                  "voxelgrid_features": (features, (count, *(() if features is None else features.shape[1:2])))}
        for name, (tensor, shape) in shapes.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")

    def _cases(self, inside_corners, surface, resolution):
        """The case of each cube on the surface, turned over where two ambiguous ones meet."""
        sizes = torch.tensor([resolution] * 3 if isinstance(resolution, int) else list(resolution),
                             device=surface.device)
        if int(sizes.prod()) != len(surface):
            raise ValueError(f"resolution: expected that of {len(surface)} cubes, got {resolution}")
        case = (inside_corners[surface].long() << torch.arange(8, device=surface.device)).sum(1)
        step, other = self._flips[case].split((3, 1), 1)
        risky = other[:, 0] > 0
        everywhere = torch.zeros_like(surface)
        everywhere[surface] = risky
        cube = surface.nonzero()[:, 0]
        ny, nz = sizes[1], sizes[2]
        place = torch.stack((cube // (ny * nz), cube // nz % ny, cube % nz), 1) + step
        exists = ((place >= 0) & (place < sizes)).all(1)
        neighbour = ((place[:, 0] * ny + place[:, 1]) * nz + place[:, 2]).where(exists, 0)
        return other[:, 0].where(risky & exists & everywhere[neighbour], case)

    def _least_squares(self, origins, crossings, grad_func, loops, used, crossing, scale):
        """The point next to the planes through a loop's crossings, drawn to their middle (Schaefer et al. 2007)."""
        with torch.no_grad():
            present = used[..., 0]
            origin = origins[:, None].expand(-1, 4, -1)[present][:, None]
            mask = used[present][..., None]
            index = torch.zeros_like(loops).masked_scatter(used, crossing)[present]
            normals = normalize(grad_func(crossings), dim=-1)[index] * mask
            offsets = (crossings[index] - origin) * mask
            centre = offsets.sum(1) / mask.sum(1)
            pull = scale * torch.eye(3, dtype=offsets.dtype, device=offsets.device).expand(len(centre), 3, 3)
            planes = torch.cat((normals, pull), 1)
            sides = torch.cat(((offsets * normals).sum(-1), scale * centre), 1)[..., None]
            return torch.linalg.lstsq(planes, sides).solution[..., 0] + origin[:, 0]

    def _fill(self, positions, cube_idx, inside, surface, full, case, dual_of, points, vertex_of, outer, deviation):
        """Tetrahedra inside: around each grid edge with both ends inside, between cubes that follow each other."""
        centres = positions[cube_idx[full]].mean(1)
        inner = positions[inside]
        either = surface | full
        number = int(either.sum())
        own = outer.new_full((number, 13), -1)  # the vertex of each cube's edges, and its centre
        own[surface[either], :12] = dual_of.reshape(-1, 12)
        own[full[either], 12] = len(points) + len(inner) + torch.arange(len(centres), device=outer.device)
        cases_of = outer.new_full((number,), 255)
        cases_of[surface[either]] = case
        edges, edge_of, sharing = _unique_pairs(cube_idx[either][:, self._edges].reshape(-1, 2), len(inside))
        within = inside[edges].sum(1) == 2
        around = (within & (sharing == 4))[edge_of]
        group, by_edge = edge_of[around].sort(stable=True)
        member = around.nonzero()[:, 0][by_edge].reshape(-1, 4)
        cube, axis = member // 12, self._edge_axes[member[:, 0] % 12]
        following = torch.tensor([0, 1, 1, 3, 3, 2, 2, 0], device=outer.device)
        # of the axes across the edge, the cubes' order counts along `fast` first: up, along `slow`, down and back
        fast, slow = (2 * torch.tensor(axes, device=outer.device)[axis] for axes in ((2, 2, 1), (1, 0, 0)))
        faces = torch.stack((fast + 1, fast, slow + 1, slow, fast, fast + 1, slow, slow + 1), 1)
        cube = cube[:, following]
        pair = own[cube, self._face_edges[cases_of[cube], faces]].reshape(-1, 2)
        ends = vertex_of[edges[group[::4]]].repeat_interleave(4, 0)
        tets = torch.cat((pair, ends), 1)[(pair >= 0).all(1)]
        return torch.cat((points, inner, centres)), torch.cat((outer, tets)), deviation


def _weights(values, surface, function):
    return None if values is None else function(values)[surface]


def _unique_pairs(pairs: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unique rows in lexicographic order, the place of each row among them, and how often each occurs."""
    keys, place, counts = torch.unique(pairs[:, 0] * size + pairs[:, 1], return_inverse=True, return_counts=True)
    return torch.stack((keys // size, keys % size), 1), place, counts


def _zero(s: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values [N, 2, K] at both ends of edges, interpolated to where s [N, 2, 1] is zero."""
    return (values[:, 0] * s[:, 1] - values[:, 1] * s[:, 0]) / (s[:, 1] - s[:, 0])


def _mean(values, share, dual, share_sum):
    return values.new_zeros(len(share_sum), values.shape[1]).index_add(0, dual, values * share) / share_sum


def _deviation(points, crossings, dual):
    distance = (crossings - points[dual]).norm(dim=-1)
    count = torch.bincount(dual, minlength=len(points))
    mean = distance.new_zeros(len(points)).index_add(0, dual, distance) / count
    return (distance - mean[dual]).abs()


def _middle(values, quads, first, second):
    a, b, c, d = values[quads].unbind(1)
    middle = (a + c) / 2 * first[:, None] + (b + d) / 2 * second[:, None]
    return middle / (first + second + 1e-8)[:, None]
