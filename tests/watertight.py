"""Cracks and double hits at shared edges of `ops.rasterize`, counted exactly.

Each mesh is planar in clip space along z = w / 3 (or bent), triangulated from random points, and fills the whole image
once: every pixel must be covered in the first layer (else: a crack) and in no second one (else: a double hit).
`python tests/watertight.py 1000000` runs the fuzz at full size.
"""

import sys

import torch

from text3d_fast import ops

KINDS = ("random", "axis-aligned", "sliver", "huge", "tiny", "near-plane")


def grid_mesh(columns: int, rows: int, generator: torch.Generator, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A jittered grid over more than [-1, 1]^2, its cells split at random: positions [V, 2], triangles [F, 3]."""
    along = [torch.linspace(-1.5, 1.5, n + 1) for n in (columns, rows)]
    y, x = torch.meshgrid(along[1], along[0], indexing="ij")
    points = torch.stack([x, y], -1)
    if kind not in ("axis-aligned",):
        room = torch.tensor([3 / columns, 3 / rows]) * 0.24
        points = points + (torch.rand(points.shape, generator=generator) * 2 - 1) * room
    else:
        points = (points * 64).round() / 64  # corners on pixel centres and borders
    a = torch.arange(rows)[:, None] * (columns + 1) + torch.arange(columns)
    b, c, d = a + 1, a + columns + 1, a + columns + 2
    split = torch.rand(a.shape, generator=generator) < 0.5
    one = torch.where(split[..., None], torch.stack([a, b, d], -1), torch.stack([a, b, c], -1))
    two = torch.where(split[..., None], torch.stack([a, d, c], -1), torch.stack([b, d, c], -1))
    faces = torch.cat([one.view(-1, 3), two.view(-1, 3)])
    turn = torch.randint(0, 3, (len(faces), 1), generator=generator)
    faces = faces.gather(1, (turn + torch.arange(3)) % 3)
    flip = torch.rand(len(faces), generator=generator) < 0.5
    return points.view(-1, 2), torch.where(flip[:, None], faces.flip(1), faces).int()


def mesh(kind: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Positions [1, V, 4], triangles [F, 3] and the image's size."""
    columns, rows, size = {"tiny": (150, 150, (64, 61)), "sliver": (170, 3, (63, 64)), "huge": (4, 3, (61, 67))}.get(
        kind, (24, 22, (64, 64))
    )
    points, faces = grid_mesh(columns, rows, generator, kind)
    w = torch.rand(len(points), generator=generator) * 2 + 0.5
    if kind == "axis-aligned":
        w = torch.ones_like(w)
    if kind == "huge":
        points = points * torch.tensor([300.0, 5000.0])
    pos = torch.stack([points[:, 0] * w, points[:, 1] * w, w / 3, w], -1)
    if kind == "near-plane":
        # A floor through the camera, from far before it to far behind it, and the image looks down at it.
        depth = points[:, 1] * 40
        near, far = 0.1, 1000.0
        z = ((far + near) * depth - 2 * far * near) / (far - near)
        pos = torch.stack([points[:, 0] * 400, torch.full_like(depth, -0.5), z, depth], -1)
    return pos[None], faces, size


def count_errors(kind: str, edges: int, seed: int) -> tuple[int, int, int]:
    """(cracks, double hits, edges tried) of meshes with at least this many shared edges."""
    generator = torch.Generator().manual_seed(seed)
    cracks = doubles = tried = 0
    while tried < edges:
        pos, faces, size = mesh(kind, generator)
        with ops.DepthPeeler(pos, faces, size) as peeler:
            first, second = (peeler.rasterize_next_layer()[0][0, ..., 3] > 0 for _ in range(2))
        if kind == "near-plane":  # all below the horizon but what is nearer than the near plane
            height = size[0]
            row = torch.arange(height)
            depth = 0.5 / -((2 * row + 1) / height - 1)
            expected = ((depth > 0.11) & (depth < 30))[:, None].expand(size)
        else:
            expected = torch.ones(size, dtype=torch.bool)
        cracks += int((expected & ~first).sum())
        doubles += int(second.sum())
        tried += 3 * len(faces) // 2
    return cracks, doubles, tried


if __name__ == "__main__":
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    total = [0, 0, 0]
    for kind in KINDS:
        result = count_errors(kind, wanted // len(KINDS), seed=0)
        total = [a + b for a, b in zip(total, result)]
        print(f"{kind:12s} cracks {result[0]} double hits {result[1]} shared edges {result[2]}")
    print(f"all          cracks {total[0]} double hits {total[1]} shared edges {total[2]}")
    sys.exit(total[0] + total[1] > 0)
