"""Marching tetrahedra in plain torch: the oracle for `ops.marching_tets`."""

import torch

# For each of the 16 sign patterns (bit i: corner i is inside), one or two triangles as numbers of the tet's edges
# 01, 02, 03, 12, 13, 23. Orders and windings are those of kaolin's tetmesh.
TRIANGLES = ("", "102", "403", "142134", "315", "230253", "140154", "425",
             "452", "410451", "320352", "135", "412431", "304", "201", "")  # fmt: skip
TRIANGLE_COUNTS = tuple(len(t) // 3 for t in TRIANGLES)


def marching_tets(
    positions: torch.Tensor, sdf: torch.Tensor, tets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [V, 3], sdf [V], tets int [T, 4] -> vertices [N, 3], faces int32 [M, 3]; as `ops.marching_tets`.

    Any floating dtype, differentiable any number of times.
    """
    inside = (sdf.detach() > 0)[tets.long()]
    case = (inside * torch.tensor([1, 2, 4, 8], device=sdf.device)).sum(-1)
    counts = torch.tensor(TRIANGLE_COUNTS, device=sdf.device)[case]
    active, case, counts = tets[counts > 0].long(), case[counts > 0], counts[counts > 0]

    first, second = torch.triu_indices(4, 4, 1, device=sdf.device)  # 01, 02, 03, 12, 13, 23
    pairs = torch.stack([active[:, first], active[:, second]], -1)
    pairs = torch.stack([pairs.amin(-1), pairs.amax(-1)], -1)
    edges, rows = torch.unique(pairs.reshape(-1, 2), dim=0, return_inverse=True)
    crossing = (sdf.detach()[edges] > 0).sum(-1) == 1
    number = torch.cumsum(crossing, 0) - 1
    rows = number[rows].reshape(-1, 6)

    a, b = edges[crossing].unbind(-1)
    t = sdf[a] / (sdf[a] - sdf[b])
    vertices = positions[a] + t[:, None] * (positions[b] - positions[a])

    table = torch.tensor([[int(c) for c in t.ljust(6, "0")] for t in TRIANGLES], device=sdf.device)
    one, two = counts == 1, counts == 2
    faces = torch.cat([
        torch.gather(rows[one], 1, table[case[one], :3]),
        torch.gather(rows[two], 1, table[case[two]]).reshape(-1, 3),
    ])
    return vertices, faces.int()
