"""`text3d-fast view`: a picture of what it is given, or one sentence."""

import struct
import zlib

import numpy as np
import pytest

from text3d_fast.app import cli

PLAIN = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"


def shown(folder, *options, text=PLAIN):
    from PIL import Image

    (folder / "a.obj").write_text(text)
    out = folder / "out.png"
    assert cli.main(["view", str(folder / "a.obj"), "--out", str(out), "--size", "32", *options]) == 0
    return np.asarray(Image.open(out)).astype(int)


def test_a_mesh_without_colours(tmp_path):
    picture = shown(tmp_path, "--azimuth", "0", "--elevation", "0")
    inside = picture[20, 10]
    assert np.ptp(inside) == 0 and 30 < inside[0] < 255 and (picture[0, 31] == 255).all()


@pytest.mark.parametrize("scale", [1e25, 1e37, 1e-30, 1])
def test_any_scale_gives_the_same_picture(scale, tmp_path):
    text = f"v 0 0 0\nv {scale} 0 0\nv 0 {scale} 0\nv 1e38 1e38 1e38\nf 1 2 3\n"  # one that nothing uses, too
    assert abs(shown(tmp_path, text=text) - shown(tmp_path)).max() <= 1


@pytest.mark.parametrize("options, words", [
    (["--light-color", "nan", "nan", "nan"], "light color: expected 0 to 100"),
    (["--light", "0", "0", "0"], "light: expected a direction"), (["--light", "inf", "0", "0"], "light: expected"),
    (["--ambient", "-1", "0", "0"], "ambient"), (["--distance", "1e-9"], "distance: expected 0.1 to 90"),
    (["--distance", "nan"], "distance"), (["--background", "2", "-1", "5"], "background: expected 0 to 1"),
    (["--azimuth", "nan"], "azimuth"), (["--elevation", "inf"], "elevation"), (["--size", "0"], "size"),
    (["--size", "1000000"], "size"), (["--serve", "--port", "-1"], "port: expected 1 to 65535, got -1"),
    (["--serve", "--port", "99999"], "port"), (["--serve", "--host", "nowhere.invalid"], "host: 'nowhere.invalid'"),
    (["--background-image", "huge.png"], "more than 64 million"),
    (["--background-image", "text.png"], "not a readable image"), (["--background-image", "none.png"], "none.png")])
def test_absurd_settings_are_one_sentence(options, words, tmp_path, capsys, monkeypatch):
    pytest.importorskip("viser", reason="the extra `viewer` is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.obj").write_text(PLAIN)
    (tmp_path / "text.png").write_text("no picture")
    header = struct.pack(">IIBBBBB", 30000, 20000, 8, 2, 0, 0, 0)  # 600 megapixels, of which the file has none
    with open(tmp_path / "huge.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header)
        file.write(struct.pack(">I", zlib.crc32(b"IHDR" + header)))
        file.write(struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT")))
    assert cli.main(["view", "a.obj", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "view.png").exists()


def test_nothing_to_see_is_said(tmp_path, capsys):
    (tmp_path / "a.obj").write_text("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n")
    assert cli.main(["view", str(tmp_path / "a.obj"), "--out", str(tmp_path / "x.png")]) == 2
    assert "all its points coincide" in capsys.readouterr().err


def test_what_is_left_out_is_said(tmp_path, capsys):
    shown(tmp_path, text="mtllib gone.mtl\n" + PLAIN)
    assert "warning: material file 'gone.mtl' is left out" in capsys.readouterr().err


def test_serve_listens_on_loopback(tmp_path, monkeypatch):
    viser = pytest.importorskip("viser", reason="the extra `viewer` is not installed")
    (tmp_path / "a.obj").write_text(PLAIN)
    asked = []

    def server(**options):
        asked.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(viser, "ViserServer", server)
    command = ["view", str(tmp_path / "a.obj"), "--serve", "--port", "8473"]
    assert cli.main(command) == cli.main([*command, "--host", "0.0.0.0"]) == 130
    assert [(one["host"], one["port"]) for one in asked] == [("127.0.0.1", 8473), ("0.0.0.0", 8473)]


def test_views_for_gpteval3d(tmp_path, capsys):
    from PIL import Image

    (tmp_path / "a.obj").write_text(PLAIN)
    out = tmp_path / "views"
    words = ["view", str(tmp_path / "a.obj"), "--export-views", "4", "--elevation", "0", "--size", "32", "--out",
             str(out)]
    assert cli.main(words) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"{kind}_00{n}.png" for kind in ("normal", "rgb")
                                                          for n in range(4)]
    color, normal = (np.asarray(Image.open(out / f"{kind}_000.png")).astype(int) for kind in ("rgb", "normal"))
    assert color.shape == (32, 32, 3) and (color[0, 31] == 255).all() and (normal[0, 31] == 0).all()
    assert abs(normal[20, 10] - [128, 128, 255]).max() <= 1  # from the front: +Z
    back = np.asarray(Image.open(out / "normal_002.png")).astype(int)
    assert abs(back[20, 21] - [128, 128, 0]).max() <= 1  # two-sided: towards the camera
    assert cli.main(words) == 0  # again: these are views
    (out / "mine.png").write_text("a picture")
    assert cli.main(words) == 2 and "holds other files than views (mine.png)" in capsys.readouterr().err
    assert cli.main([*words[:3], "0", *words[4:]]) == 2
    assert "export views: expected 1 to 1000" in capsys.readouterr().err
