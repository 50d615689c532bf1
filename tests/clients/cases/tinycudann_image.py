"""tiny-cuda-nn's sample that learns an image, 21 steps of 2^18 points: its own losses, and what it wrote."""

import contextlib
import io
import re
import runpy
import sys

import imageio.v3 as imageio
import numpy as np

y, x = np.mgrid[:96, :96] / 96
picture = np.stack((x, y, 0.5 + 0.5 * np.sin(20 * x) * np.sin(20 * y)), -1)
imageio.imwrite("picture.png", (picture * 255).astype(np.uint8))
checkout = sys.argv[1]
sys.argv[1:] = ["picture.png", f"{checkout}/data/config_hash.json", "21", "learned.png"]
said = io.StringIO()
with contextlib.redirect_stdout(said):
    runpy.run_path(f"{checkout}/samples/mlp_learning_an_image_pytorch.py", run_name="__main__")
losses = [float(loss) for loss in re.findall(r"loss=(\S+)", said.getvalue())]
error = np.abs(imageio.imread("learned.png") / 255 - picture).mean()
assert losses[-1] < 0.1 * losses[0] and error < 0.15, (losses, error)
print(f"loss {losses[0]:.3g} -> {losses[-1]:.3g} in 10 steps; picture within {error:.3f} on average after 21")
