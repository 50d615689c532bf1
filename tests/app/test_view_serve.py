"""`text3d-fast view --serve` in a real headless browser: the page shows the mesh in its colours."""

import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from text3d_fast.geometry import Mesh, write_mesh

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1000,700", "--virtual-time-budget=90000",
]


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium to look with")
def test_the_browser_shows_the_mesh_in_its_colours(tmp_path):
    pytest.importorskip("viser", reason="the extra `viewer` is not installed")
    from PIL import Image

    corners = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)
    write_mesh(tmp_path / "square.glb", Mesh(corners, faces, colors=torch.tensor([[0.8, 0.1, 0.1]]).expand(4, 3)))
    command = [sys.executable, "-m", "text3d_fast", "view", str(tmp_path / "square.glb"), "--serve", "--port", "8471"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = iter(server.stdout.readline, "")
        address = next(line for line in lines if "Ctrl-C ends" in line)
        url = re.search(r"http://\S+", address)[0]
        picture = tmp_path / "page.png"
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        subprocess.run([CHROMIUM, *FLAGS, profile, f"--screenshot={picture}", url], timeout=200, capture_output=True)
        seen = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    finally:
        server.send_signal(signal.SIGINT)
        status = server.wait(30)
    red, green, blue = seen[..., 0], seen[..., 1], seen[..., 2]
    shown = (red > green + 40) & (red > blue + 40)  # the light's own colours are nearly white
    assert shown.mean() > 0.03  # the square fills about a twentieth of the page
    assert status == 130
