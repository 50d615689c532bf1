"""nvdiffrec's DMTet, which runs on any torch device, against the kaolin drop-in's marching tetrahedra."""

import importlib.util
import sys
from types import ModuleType

import torch
from common import largest
from kaolin.ops.conversions import marching_tetrahedra

package = sys.modules["render"] = ModuleType("render")
for name in ("mesh", "render"):
    setattr(package, name, ModuleType(name))
spec = importlib.util.spec_from_file_location("dmtet", sys.argv[1] + "/geometry/dmtet.py")
dmtet = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dmtet)

torch.manual_seed(0)
size = 12
corner = torch.stack(torch.meshgrid(*[torch.arange(size + 1)] * 3, indexing="ij"), -1).view(-1, 3).float()
index = lambda p: (p[..., 0] * (size + 1) + p[..., 1]) * (size + 1) + p[..., 2]
cells = torch.stack(torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij"), -1).view(-1, 1, 3)
paths = torch.tensor([[[0, 0, 0], *torch.eye(3).long()[list(p)].cumsum(0).tolist()] for p in
                      ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))])  # fmt: skip
tets = torch.cat([index(cells + path) for path in paths])
positions = (corner / size * 2 - 1 + 0.02 * torch.randn_like(corner)).requires_grad_()
sdf = (0.7 - positions.detach().norm(dim=-1) + 0.05 * torch.randn(len(corner))).requires_grad_()


def triangles(vertices, faces):
    """The centres of the triangles, sorted."""
    rows = vertices[faces].detach().mean(1)
    return rows[rows[:, 0].argsort()]


vertices, faces, *_ = dmtet.DMTet()(positions, sdf, tets)
ours, our_faces = (x[0] for x in marching_tetrahedra(positions[None], tets, sdf[None]))
area = lambda v, f: torch.linalg.cross(v[f[:, 1]] - v[f[:, 0]], v[f[:, 2]] - v[f[:, 0]]).norm(dim=-1).sum() / 2
assert vertices.shape == ours.shape and faces.shape == our_faces.shape
gradients = [torch.autograd.grad(area(v, f), (positions, sdf)) for v, f in ((vertices, faces), (ours, our_faces))]
difference = max(largest(a, b) / float(a.abs().max()) for a, b in zip(*gradients))
centres = largest(triangles(vertices, faces), triangles(ours, our_faces))
assert centres < 1e-5 and difference < 1e-3, (centres, difference)
print(f"{len(faces)} triangles in {len(tets)} tetrahedra: the same, centres within {centres:.1e}, gradients of their "
      f"area within {difference:.1e}")
