"""Volume rendering of a field, fused against part by part: time of a step and memory.

    python benchmarks/bench_render_field.py steps    DreamFusion's rendering at 64^2 by mode, forward and backward
    python benchmarks/bench_render_field.py memory   peak memory beyond inputs and outputs at two sizes, timed

Values and gradients are compared before anything is timed. `--csv FILE` appends the rows.
"""

import argparse
import csv
import resource
import time

import torch
from bench_mlp import measure

from text3d_fast import ops
from text3d_fast.guidance import GaussianMixture, MixturePrior
from text3d_fast.pipelines.config import DreamFusionConfig
from text3d_fast.pipelines.dreamfusion import DreamFusionStage

FIELDS = ("commit", "threads", "case", "way", "rays", "samples", "ms", "cpu_ms", "MB")


def make() -> tuple[DreamFusionStage, torch.Generator]:
    """DreamFusion's defaults with a field that has a shape: a sharp ball, and its occupancy."""
    config = DreamFusionConfig(prompt="", seed=1)
    training = DreamFusionStage(config, config, MixturePrior(GaussianMixture([[0.0] * 3], 1.0)))
    with torch.no_grad():
        training.field.grid.params.mul_(20)
    for _ in range(4):
        training.renderer.update(training.field, 0, training.generator, every=1,
                                 threshold=training.config.sampling.threshold)
    return training, training.generator


def steps(seconds: float):
    training, generator = make()
    config, field, renderer = training.config, training.field, training.renderer
    cameras = config.cameras.sample(1, config.size, torch.Generator().manual_seed(2))
    lights = config.lights.sample(cameras, torch.Generator().manual_seed(3))
    background = torch.rand(1, 3, generator=generator)
    origins, directions = (part.reshape(-1, 3) for part in cameras.rays())
    samples = renderer.march(origins, directions, None)
    parameters = list(field.parameters())
    cotangent = torch.randn(1, config.size, config.size, 3, generator=generator)

    for mode, normals in (("albedo", None), ("albedo", "analytic"), ("lambertian", None), ("textureless", None)):
        def step(fused: bool, gradients: bool = True, mode=mode, normals=normals):
            way = ops.renders_fused if fused else (lambda device: False)
            kept, ops.renders_fused = ops.renders_fused, way
            try:
                with torch.set_grad_enabled(gradients):
                    out = renderer(field, cameras, background, lights, mode, normals)
                    if not gradients:
                        return [out.color]
                    loss = (out.color * cotangent).sum() + out.depth_variance.mean()
                    if out.orientation is not None:
                        loss = loss + out.orientation
                    return [out.color.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]
            finally:
                ops.renders_fused = kept

        for got, want in zip(step(True), step(False)):
            if want is not None:
                torch.testing.assert_close(got / want.abs().max(), want / want.abs().max(), rtol=1e-3, atol=1e-3)
        for gradients in (False, True):
            for way in (False, True):
                ms = measure(lambda way=way, gradients=gradients: step(way, gradients), seconds)
                name = f"{mode}{' with normals' if normals else ''} {'step' if gradients else 'forward'}"
                yield name, "fused" if way else "parts", len(origins), samples.num_samples, *ms, ""


def memory(seconds: float):
    """Peak of the process beyond what stood before, for a forward and a backward pass."""
    training, generator = make()
    field = training.field
    for size, along in ((128, 128), (512, 128)):
        rays = size * size
        ends = torch.linspace(-0.9, 0.9, size)
        y, x = torch.meshgrid(ends, ends, indexing="ij")
        origins = torch.stack([x.flatten(), y.flatten(), torch.full((rays,), 1.5)], 1)
        directions = torch.tensor([0.0, 0.0, -1.0]).expand(rays, 3).contiguous()
        offsets = torch.arange(rays + 1, dtype=torch.int32) * along
        starts = (0.6 + 1.8 / along * torch.arange(along)).repeat(rays)
        samples = ops.RaySamples(torch.arange(rays, dtype=torch.int32).repeat_interleave(along), starts,
                                 starts + 1.8 / along, offsets)
        leaves = (field.grid.params, field.weights.detach().requires_grad_())
        for mode in ("albedo", "textureless"):
            lights = ops.PointLights(*(torch.rand(1, 3, generator=generator) for _ in range(3)))
            begin, start = _peak(reset=True), (time.perf_counter(), time.process_time())
            out = ops.render_field(origins, directions, *leaves, samples, field.spec, mode=mode,
                                   lights=lights if mode != "albedo" else None, early_stop=0.0)
            values = out.values.square().sum() + out.depth.sum()
            grads = torch.autograd.grad(values, leaves)
            ms = 1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1])
            kept = sum(t.numel() * 4 for t in (*out, *grads) if t is not None)
            added = _peak() - begin - kept
            yield f"{mode} step, all samples", "fused", rays, samples.num_samples, *ms, round(added / 1e6, 1)
            del out, values, grads


def _peak(reset: bool = False) -> int:
    """Bytes: the highest resident size since the last reset (the current one at a reset)."""
    try:
        if reset:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmRSS" if reset else "VmHWM"].split()[0]) * 1024
    except OSError:  # not Linux: of the whole life of the process
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "memory"))
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--commit", default="")
    parser.add_argument("--csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for row in {"steps": steps, "memory": memory}[options.what](options.seconds):
        rows.append((options.commit, options.threads, *row))
        print("  ".join(str(round(v, 2) if isinstance(v, float) else v) for v in rows[-1][2:]), flush=True)
    if options.csv:
        with open(options.csv, "a", newline="") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(FIELDS)
            writer.writerows(rows)


if __name__ == "__main__":
    main()
