"""What a model will need: predicted on the meta device, measured on this one; options that lower it."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_models import save_model

from text3d_fast.guidance import Conditions, DiffusionPrior, ModelOptions, ScoreDistillation, open_model
from text3d_fast.guidance.models.memory import estimate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# activations of some hundred MB, so that a process's own noise does not count: 256 pixels, latents of 32
WIDE = {"unet": {"sample_size": 32, "block_out_channels": (32, 64)},
        "vae": {"sample_size": 256, "block_out_channels": (32, 32, 64, 64),
                "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}}
MEASURE = """
import sys, torch
from text3d_fast.guidance import Conditions, DiffusionPrior, ScoreDistillation
def line(name):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
prior = DiffusionPrior.from_pretrained(sys.argv[1], vae_slicing=len(sys.argv) > 2)
prior.prepare(["a red mug"])
prior.unet, prior.vae
def step(size):
    images = torch.rand(2, size, size, 3, requires_grad=True)
    ScoreDistillation(prior, 7.5)(images, Conditions(["a red mug"] * 2)).loss.backward()
prior.image_size, whole = 32, prior.image_size
step(32)  # what libraries allocate at their first call
prior.image_size = whole
before = line("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
step(whole)
print(line("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "wide", **WIDE)


def measured(folder, *options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder), *options], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the process's peak memory is read from /proc")
@pytest.mark.parametrize("slicing", [False, True])
def test_the_prediction_is_what_a_step_takes(wide, slicing):
    predicted = estimate(open_model(wide), CPU, ModelOptions(vae_slicing=slicing), pictures=2)
    taken = measured(wide, *(["slicing"] if slicing else []))
    assert predicted.step > 80e6
    print(f"predicted {predicted.step / 1e6:.0f} MB, measured {taken / 1e6:.0f} MB")
    assert 0.75 < taken / predicted.step < 1.35, (taken, predicted)


def test_weights_are_those_that_are_loaded(wide):
    predicted = estimate(open_model(wide), CPU)
    prior = DiffusionPrior.from_pretrained(wide)
    held = sum(p.numel() * 4 for part in (prior.unet, prior.vae) for p in part.parameters())
    assert predicted.weights == held and predicted.peak >= predicted.weights + predicted.step
    half = estimate(open_model(wide), CUDA)
    assert half.weights * 2 == held and half.step < 0.6 * predicted.step
    offloaded = estimate(open_model(wide), CUDA, ModelOptions(offload=True))
    unet = sum(p.numel() * 2 for p in prior.unet.parameters())
    assert offloaded.weights == unet and offloaded.text == 0


def test_forward_alone_takes_less_and_more_pictures_more(wide):
    folder = open_model(wide)
    one, two = estimate(folder, CPU), estimate(folder, CPU, pictures=2)
    assert one.forward < one.step < two.step and 1.9 < two.operations / one.operations < 2.1
    sliced = estimate(folder, CPU, ModelOptions(vae_slicing=True), pictures=2)
    assert sliced.step < 0.75 * two.step and sliced.operations > two.operations


@pytest.mark.parametrize("options", [{"vae_slicing": True}, {"offload": True}, {"vae_slicing": True, "offload": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lean_encoding_is_the_same_encoding(tmp_path, options, dtype):
    folder = save_model(tmp_path / "model")
    images = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    probe = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    results = []
    for chosen in ({}, options):
        prior = DiffusionPrior.from_pretrained(folder, dtype=dtype, **chosen)
        leaf = images.clone().requires_grad_()
        x = prior.encode(leaf)
        results.append((x.detach(), *torch.autograd.grad((x * probe).sum(), leaf)))
        with torch.no_grad():
            torch.testing.assert_close(prior.encode(images), x.detach())
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
    for plain, lean in zip(*results):
        torch.testing.assert_close(lean, plain, **close)


def test_the_step_through_offloaded_parts_runs(wide):
    prior = DiffusionPrior.from_pretrained(wide, offload=True, vae_slicing=True)
    images = torch.rand(1, 256, 256, 3, requires_grad=True)
    ScoreDistillation(prior, 7.5)(images, Conditions(["a red mug"])).loss.backward()
    assert float(images.grad.norm()) > 0
