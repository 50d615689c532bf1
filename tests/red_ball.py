"""A prior that knows one picture, and settings with which a pipeline learns it in seconds."""

import torch

from text3d_fast.guidance import Conditions, NoiseSchedule, Prior

TINY = {
    "field.levels": 2, "field.start_levels": 2, "field.log2_table_size": 10, "field.base_resolution": 4,
    "field.max_resolution": 8, "field.hidden": 8, "sampling.occupancy": 8, "sampling.step": 0.15, "size": 12,
    "mesh_resolution": 16, "preview_every": 1000, "checkpoint_every": 1000, "steps": 6,
    "guidance.weighting": "sample", "guidance.weight": 0.0, "background": "solid",
    "guidance.time": (0.02, 0.5), "shading.albedo_until": 1.0,
    "optimizer.grid": 0.05, "optimizer.network": 0.02, "field.sharpness": 30.0, "field.blob_scale": 8.0,
}

MESH = {"size": 24, "surface.resolution": 16, "surface.further_levels": 1, "guidance.weight": 0.0,
        "guidance.weighting": "sample", "shading.lit": 0.0, "optimizer.grid": 0.05, "optimizer.network": 0.02}
RUN = ("mesh_resolution", "preview_every", "checkpoint_every")
PARTICLES = {name if name in RUN else f"vsd.{name}": value for name, value in TINY.items()} | {
    f"{stage}.{name}": value for stage in ("geometry", "texturing") for name, value in MESH.items()
} | {"particles": 2, "vsd.steps": 30, "geometry.steps": 2, "texturing.steps": 10}


def few_pictures(patch):
    """Pictures of a finished run are tested on their own; elsewhere they would take most of the time."""
    from text3d_fast.pipelines import mesh_stage, pictures, results, surface

    choose = surface.choose_threshold
    for module in (surface, mesh_stage):
        patch.setattr(module, "choose_threshold", lambda *args: choose(*args, 16))
    patch.setattr(results, "views", lambda mesh, cameras: pictures.views(mesh, cameras, size=8))
    patch.setattr(results, "turntable", lambda mesh, cameras: pictures.turntable(mesh, cameras, 2, size=8))


class RedBall(Prior):
    """The exact denoiser of one picture: a red disc over the background, from every side."""

    name, kind = "red ball", "exact"
    schedule = NoiseSchedule.cosine()
    image_size = 12
    conditions = ("camera", "background")
    color = (0.9, 0.1, 0.1)

    def __init__(self):
        self.seen: list[Conditions] = []

    def encode(self, images):
        return images.permute(0, 3, 1, 2) * 2 - 1

    def predict_noise(self, x_t, t, conditions):
        self.seen.append(conditions)
        axis = torch.linspace(-1, 1, 12)
        disc = (axis[:, None] ** 2 + axis**2 < 0.4)[None, None].float()
        ground = conditions.background.cpu()[:, :, None, None]
        clean = 2 * (disc * torch.tensor(self.color)[:, None, None] + (1 - disc) * ground) - 1
        alpha, sigma = (value.to(x_t)[:, None, None, None] for value in self.schedule.alpha_sigma(t))
        return (x_t - alpha * clean.to(x_t)) / sigma.clamp(min=1e-3)
