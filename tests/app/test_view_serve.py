"""`text3d-fast view --serve` in a real headless browser: the page shows the mesh in its colours."""

import contextlib
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


def share_of_red(url, folder):
    """Of the page's pixels. A busy machine may draw the page later than the picture of it is taken."""
    from PIL import Image

    picture = folder / "page.png"
    folder.mkdir()
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}", url]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, timeout=80, capture_output=True)
    if not picture.exists():
        return 0.0
    red, green, blue = np.asarray(Image.open(picture).convert("RGB")).astype(int).transpose(2, 0, 1)
    return ((red > green + 40) & (red > blue + 40)).mean()  # the light's own colours are nearly white


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium to look with")
def test_the_browser_shows_the_mesh_in_its_colours(tmp_path):
    pytest.importorskip("viser", reason="the extra `viewer` is not installed")
    corners = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)
    write_mesh(tmp_path / "square.glb", Mesh(corners, faces, colors=torch.tensor([[0.8, 0.1, 0.1]]).expand(4, 3)))
    command = [sys.executable, "-m", "text3d_fast", "view", str(tmp_path / "square.glb"), "--serve", "--port", "8471"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = iter(server.stdout.readline, "")
        address = next(line for line in lines if "Ctrl-C ends" in line)
        url = re.search(r"http://\S+", address)[0]
        shown = any(share_of_red(url, tmp_path / f"look{look}") > 0.03 for look in range(3))  # a twentieth of the page
    finally:
        server.send_signal(signal.SIGINT)
        status = server.wait(120)
    assert shown and status == 130
