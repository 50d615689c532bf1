"""A step of VSD and the training of its score, in each way of calling the networks: FLOPs, time, memory.

    python benchmarks/bench_vsd.py             FLOPs of Stable Diffusion 2.1's U-Net at 512^2, time and memory at 128^2
    pytest benchmarks/bench_vsd.py --benchmark-only                      time alone; on a CPU with a small U-Net

A step is the VSD gradient on x (no renderer, no encoder) and one update of the LoRA; one image, guidance weight 6.5.
"zero row" is what the other open implementation evaluates: a second row of the LoRA, multiplied by zero afterwards.
The variants' gradients are compared before they are timed. Rows are appended to benchmarks/results/vsd.csv.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import subprocess
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from text3d_fast.guidance import Conditions, LoraPrior, NoiseSchedule, VariationalScoreDistillation

VARIANTS = ("zero row", "separate", "together", "reused")
RESULTS = Path(__file__).parent / "results" / "vsd.csv"
FULL = {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024, "use_linear_projection": True}
SMALL = {"block_out_channels": (64, 128, 192, 192), "attention_head_dim": 8, "cross_attention_dim": 96,
         "layers_per_block": 1}


class RandomPrior:
    """A prior of random weights, with what `LoraPrior` needs of its base: only its cost matters."""

    prediction_type, views = "epsilon", 1

    def __init__(self, configuration: dict, device: torch.device, dtype: torch.dtype = torch.float32):
        from diffusers import UNet2DConditionModel

        self.device, self.dtype, self.image_size = device, dtype, 64
        self.schedule = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.9999, 0.005, 1000))
        with torch.device("meta"):
            unet = UNet2DConditionModel(sample_size=64, **configuration)
        if device.type != "meta":
            unet = torch.nn.Module.to(unet.to_empty(device=device), dtype, memory_format=torch.channels_last)
            torch.manual_seed(0)
            with torch.no_grad():
                for name, parameter in unet.named_parameters():
                    if parameter.ndim > 1:
                        parameter.uniform_(-1, 1).mul_(parameter[0].numel() ** -0.5)
                    else:  # a bias, or a normalization's scale
                        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        self.unet = unet.eval().requires_grad_(False)
        self.text = torch.randn(2, 77, configuration["cross_attention_dim"], device=device, dtype=dtype)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images.permute(0, 3, 1, 2)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        text = self.text[[int(text == "") for text in conditions.texts]]
        return self.unet(x_t.to(self.dtype), self.schedule.timestep(t), text, return_dict=False)[0].float()

    predict_noise = predict


class ZeroRow(VariationalScoreDistillation):
    """The score's call with a second row, without a camera, whose weight is zero."""

    def residual(self, x, t, noise, conditions, guidance):
        x_t = self.prior.schedule.add_noise(x, noise, t)
        self.score.predict(x_t, t, conditions.unconditional(keep_camera=False))
        return super().residual(x, t, noise, conditions, guidance)


def one_step(prior: RandomPrior, variant: str, latent: int):
    """A function that makes one step and returns the gradient on x."""
    lora = LoraPrior(prior)
    generator = None if prior.device.type == "meta" else torch.Generator(prior.device).manual_seed(0)
    with torch.no_grad():
        for layer in lora.module["layers"].values():  # as if trained; otherwise the adapters would not matter
            layer["B"].weight.uniform_(-0.3, 0.3, generator=generator)
    kind, calls = (ZeroRow, "separate") if variant == "zero row" else (VariationalScoreDistillation, variant)
    vsd = kind(prior, lora, calls=calls)
    conditions = Conditions(["a mug"], pose=torch.eye(4, device=prior.device)[None])
    x = torch.randn(1, 4, latent, latent, device=prior.device, generator=generator)

    def step() -> torch.Tensor:
        gradient = vsd.from_encoded(x, conditions, generator=generator).gradient
        if calls != "reused":
            vsd.train_score_encoded(x, conditions, generator)
        if prior.device.type == "cuda":
            torch.cuda.synchronize()
        return gradient

    return step


def check(device: torch.device) -> None:
    """The first step's gradient is the same for every variant, to 1e-4 of its size.

    Batches of other sizes are summed in another order, and guidance multiplies that.
    """
    prior = RandomPrior(SMALL, device)
    first, *others = (one_step(prior, variant, 16)() for variant in VARIANTS)
    assert bool(first.isfinite().all()) and float(first.norm()) > 0
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-4 * float(first.abs().max()))


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def record(**row) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = f"CPU {torch.backends.cpu.get_cpu_capability()}"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    row = {"date": datetime.date.today().isoformat(), "commit": commit, "machine": machine, **row}
    print(row, flush=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def flops(variants: list[str], latent: int) -> None:
    prior = RandomPrior(FULL, torch.device("meta"))
    for variant in variants:
        step = one_step(prior, variant, latent)
        with FlopCounterMode(display=False) as counter:
            step()
        record(case=f"SD2.1 U-Net, latents {latent}^2", variant=variant,
               tflop=round(counter.get_total_flops() / 1e12, 3), ms="", cpu_ms="", mib="", threads="")


def measure(variants: list[str], latent: int, repeats: int, small: bool) -> None:
    """Wall and CPU milliseconds of a step (the best), and MiB above the model at its peak, of each variant."""
    device = device_here()
    check(device)
    prior = RandomPrior(SMALL if small else FULL, device, torch.float16 if device.type == "cuda" else torch.float32)
    name = "small" if small else "SD2.1"
    for variant in variants:
        step = one_step(prior, variant, latent)
        step()  # the libraries' own buffers
        if device.type == "cuda":
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            base = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        wall, cpu = [], []
        for _ in range(repeats):
            starts = time.perf_counter(), time.process_time()
            step()
            wall.append(time.perf_counter() - starts[0])
            cpu.append(time.process_time() - starts[1])
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")
        record(case=f"{name} U-Net, latents {latent}^2", variant=variant, tflop="", ms=round(1000 * min(wall), 1),
               cpu_ms=round(1000 * min(cpu), 1), mib=round((peak - base) / 2**20, 1), threads=torch.get_num_threads())


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


try:
    import pytest

    @pytest.fixture(scope="module")
    def prior():
        pytest.importorskip("peft")
        device = device_here()
        check(device)
        return RandomPrior(FULL if device.type == "cuda" else SMALL, device)

    @pytest.mark.benchmark(group="VSD step, one image")
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_vsd_step(benchmark, prior, variant):
        step = one_step(prior, variant, 64 if prior.device.type == "cuda" else 32)
        benchmark.pedantic(step, rounds=3, warmup_rounds=1)
except ImportError:  # as a script, pytest is not needed
    pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--latent", type=int, default=16, help="size of the latents to time: an eighth of the image's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="time a small U-Net instead of Stable Diffusion 2.1's")
    given = parser.parse_args()
    flops(given.variants, 64)
    measure(given.variants, given.latent, given.repeats, given.small)
