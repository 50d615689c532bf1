"""SDS with and without the noise predictor's Jacobian: time, memory, and what each gradient draws.

    pytest benchmarks/bench_sds_jacobian.py --benchmark-only                            time
    python benchmarks/bench_sds_jacobian.py [--model MODEL --prompt TEXT] [--out DIR]   time and memory -> CSV, picture

Time and memory are those of one distillation step (guidance and gradient with respect to x, no renderer). Without
--model the network is a Stable-Diffusion-class U-Net of random weights (the full architecture on CUDA, a small one on
a CPU), and the picture descends both gradients from grey towards an exact prior, a narrow Gaussian around each of a
few images. With --model both use that model: what a trained network's Jacobian does to an image is seen there only.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import multiprocessing
import time
from pathlib import Path

import torch

from text3d_fast.guidance import Conditions, GaussianMixture, MixturePrior, NoiseSchedule, ScoreDistillation

MODES = {"without": False, "with": True}
REPEATS = 3


class RandomUnet:
    """A prior with random weights: only its cost matters. Latents in, no encoder."""

    def __init__(self, device: torch.device):
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        full = device.type == "cuda"
        self.shape = (4, 64, 64) if full else (4, 32, 32)
        self.image_size = self.shape[1]
        self.schedule = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.9999, 0.005, 1000))
        self.dtype = torch.float16 if full else torch.float32
        channels, width = ((320, 640, 1280, 1280), 768) if full else ((64, 128, 192, 192), 96)
        unet = UNet2DConditionModel(
            sample_size=self.image_size,
            block_out_channels=channels,
            layers_per_block=2 if full else 1,
            cross_attention_dim=width,
            attention_head_dim=8,
        )
        unet = torch.nn.Module.to(unet, device, self.dtype, memory_format=torch.channels_last)
        self.unet = unet.eval().requires_grad_(False)
        self.text = torch.randn(1, 77, width, device=device, dtype=self.dtype)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images.permute(0, 3, 1, 2)

    def predict_noise(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        text = self.text.expand(len(x_t), -1, -1)
        return self.unet(x_t.to(self.dtype), self.schedule.timestep(t), text, return_dict=False)[0].float()


def load(model: str | None, device: torch.device):
    """(prior, shape of x)."""
    if model is None:
        prior = RandomUnet(device)
        return prior, prior.shape
    from text3d_fast.guidance import DiffusionPrior

    prior = DiffusionPrior.from_pretrained(model, device, decoder=True)
    return prior, tuple(prior.folder.describe()["x_shape"])


def one_step(prior, shape: tuple, jacobian: bool, device: torch.device, prompt: str = ""):
    """A function that makes one step and returns the gradient on x."""
    sds = ScoreDistillation(prior, 7.5, jacobian=jacobian)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, *shape, device=device, generator=generator).requires_grad_()

    def step() -> torch.Tensor:
        x.grad = None
        sds.from_encoded(x, Conditions([prompt]), generator=generator).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return x.grad

    return step


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


try:
    import pytest

    @pytest.fixture(scope="module")
    def prior():
        pytest.importorskip("diffusers")
        return load(None, device_here())

    @pytest.mark.benchmark(group="SDS step, one image")
    @pytest.mark.parametrize("jacobian", MODES.values(), ids=MODES)
    def test_sds_step(benchmark, prior, jacobian):
        step = one_step(*prior, jacobian, device_here())
        gradient = step()
        assert bool(gradient.isfinite().all()) and float(gradient.norm()) > 0
        benchmark.pedantic(step, rounds=REPEATS, warmup_rounds=1)
except ImportError:  # as a script, pytest is not needed
    pass


def measure(model: str | None, prompt: str, jacobian: bool, results) -> None:
    """(wall and CPU seconds of a step, bytes above the model at its peak), in a process of its own for the peak.

    A CPU is measured with one thread: then the CPU seconds hold on a busy machine too.
    """
    device = device_here()
    if device.type == "cpu":
        torch.set_num_threads(1)
    prior, shape = load(model, device)
    step = one_step(prior, shape, jacobian, device, prompt)
    if device.type == "cuda":
        step()
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() - base
    else:
        with torch.no_grad():  # the libraries' own buffers are not what is compared
            prior.predict_noise(torch.randn(1, *shape), torch.tensor([0.5]), Conditions([prompt]))
        ctypes.CDLL(None).malloc_trim(0)
        base = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        step()
        peak = _status("VmHWM") - base
    wall, cpu = [], []
    for _ in range(REPEATS):
        starts = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - starts[0])
        cpu.append(time.process_time() - starts[1])
    results.put((min(wall), min(cpu), peak))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def example_images(size: int = 32) -> torch.Tensor:
    """[4, size, size, 3]: a disc, a ring, a cross and stripes, smooth enough for a picture of 32 x 32."""
    axis = torch.linspace(-1, 1, size, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius = (x**2 + y**2).sqrt()
    disc, ring = radius - 0.7, (radius - 0.55).abs() - 0.22
    cross, stripes = torch.minimum(x.abs(), y.abs()) - 0.22, torch.sin(7 * (x + y)) / 7
    colors = torch.tensor([[0.85, 0.2, 0.15], [0.15, 0.4, 0.8], [0.2, 0.6, 0.25], [0.9, 0.7, 0.1]], dtype=torch.float64)
    share = torch.sigmoid(-torch.stack([disc, ring, cross, stripes])[..., None] * 20)
    return share * colors[:, None, None] + (1 - share) * 0.95


def descend(prior, x: torch.Tensor, conditions: Conditions, guidance: float, jacobian: bool, moments: list[int]):
    """x at each of these steps, under Adam along the mean of four samples a step."""
    sds = ScoreDistillation(prior, guidance, "sigma2", (0.02, 0.98), jacobian=jacobian)
    generator = torch.Generator().manual_seed(1)
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], 0.02)
    path = []
    for step in range(moments[-1] + 1):
        if step in moments:
            path.append(x.detach().clone())
        optimizer.zero_grad()
        sds.from_encoded(x.expand(len(conditions), -1, -1, -1), conditions, generator=generator).loss.backward()
        optimizer.step()
    return path


def exact_pictures(moments: list[int]) -> tuple[torch.Tensor, dict]:
    """The prior's images, and for each mode [(picture, title)]."""
    images = example_images()
    size = images.shape[1]
    centred = (2 * images - 1).permute(0, 3, 1, 2).float()
    prior = MixturePrior(GaussianMixture(centred.flatten(1), 0.1), (3, size, size))
    start = 0.05 * torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    drawn = {}
    for name, jacobian in MODES.items():
        path = descend(prior, start, Conditions([""] * 4), 0.0, jacobian, moments)
        distances = [float((centred - x).square().flatten(1).mean(1).min().sqrt()) for x in path]
        drawn[name] = [
            ((x[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1), f"step {moment}, distance {distance:.3f}")
            for x, moment, distance in zip(path, moments, distances)
        ]
    return images, drawn


def model_pictures(model: str, prompt: str, moments: list[int]) -> tuple[None, dict]:
    device = device_here()
    prior, shape = load(model, device)
    start = (0.05 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))).to(device)
    drawn = {}
    for name, jacobian in MODES.items():
        path = descend(prior, start, Conditions([prompt] * 4), 7.5, jacobian, moments)
        drawn[name] = [(prior.decode(x)[0].cpu(), f"step {moment}") for x, moment in zip(path, moments)]
    return None, drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, .safetensors file or hub id")
    parser.add_argument("--prompt", default="a red mug, front view")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    rows = []
    for name, jacobian in MODES.items():
        results = context.Queue()
        process = context.Process(target=measure, args=(given.model, given.prompt, jacobian, results))
        process.start()
        wall, cpu, peak = results.get()
        process.join()
        rows.append({"jacobian": name, "seconds": round(wall, 4), "cpu_seconds": round(cpu, 4),
                     "peak_mib": round(peak / 2**20, 1)})
        print(rows[-1], flush=True)
    with (given.out / "sds_jacobian.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    moments = [0, given.steps // 20, given.steps // 10, given.steps // 4, given.steps]
    images, drawn = model_pictures(given.model, given.prompt, moments) if given.model else exact_pictures(moments)
    draw(rows, images, drawn, given.out / "sds_jacobian.png")


def draw(rows: list[dict], images: torch.Tensor | None, drawn: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 4.6), layout="constrained")
    bars, pictures = figure.subfigures(1, 2, width_ratios=[1, 2.4])
    key = "seconds" if torch.cuda.is_available() else "cpu_seconds"
    titles = {key: f"{key.replace('_', ' ')} a step", "peak_mib": "MiB above the model"}
    for panel, (key, title) in zip(bars.subplots(1, 2), titles.items()):
        panel.bar([row["jacobian"] for row in rows], [row[key] for row in rows], color=["tab:blue", "tab:orange"])
        panel.set(title=title)
        panel.bar_label(panel.containers[0], fmt="%.3g")
    lines = {f"{name}\nJacobian": line for name, line in drawn.items()}
    if images is not None:
        lines = {"the prior's\nimages": [(image, "") for image in images]} | lines
    grid = pictures.subplots(len(lines), len(drawn["with"]))
    for panels, (name, line) in zip(grid, lines.items()):
        panels[0].set_ylabel(name)
        for panel, (image, title) in zip(panels, line):
            panel.imshow(image)
            panel.set_title(title, fontsize=8)
    for panel in grid.flat:
        panel.set(xticks=[], yticks=[])
        panel.set_frame_on(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
