"""Damaged files, a full disk, a folder that cannot be written, little memory: one sentence, and nothing is lost."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys

import pytest
import torch
import yaml
from red_ball import TINY, RedBall

from text3d_fast.app import cli
from text3d_fast.app.commands.outcome import USER_ERROR
from text3d_fast.geometry import read_mesh
from text3d_fast.pipelines import pipeline, results, surface
from text3d_fast.pipelines.config import END
from text3d_fast.pipelines.run_folder import CHANGEABLE

SMALL = ["--set", *(f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in TINY.items())]


@pytest.fixture(autouse=True)
def red_ball():
    with pytest.MonkeyPatch.context() as patch:
        _small(patch)
        yield


def _small(patch):
    patch.setattr(pipeline, "load_prior", lambda model, device, options: RedBall())
    patch.setattr(surface, "choose_threshold", lambda *_: ("auto", 1.0))
    patch.setattr(results, "views", lambda mesh, cameras: torch.zeros(8, 8, 8, 3))
    patch.setattr(results, "turntable", lambda mesh, cameras: torch.zeros(2, 8, 8, 3))


def generate(out, *words):
    return cli.main(["generate", "a ball", "--out", str(out), *SMALL, *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 6 steps."""
    out = tmp_path_factory.mktemp("damage") / "run"
    with pytest.MonkeyPatch.context() as patch:
        _small(patch)
        assert generate(out) == 0
    return out


def one_sentence(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ") or "Error" in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 600, lines
    return lines[0]


def _header(data, change):
    """A safetensors file with another header."""
    (size,) = struct.unpack("<Q", data[:8])
    content = json.loads(data[8:8 + size])
    change(content)
    header = json.dumps(content).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size:]


def _about(**changes):
    def change(content):
        about = json.loads(content["__metadata__"]["about"])
        content["__metadata__"]["about"] = json.dumps(about | changes)

    return lambda data, _: _header(data, change)


def _at(data, place, new):
    return data[:place] + new + data[place + len(new):]


def _cut(data, draw):
    return data[: draw.randrange(len(data))]


def _flip(data, draw):
    place = draw.randrange(len(data))
    return _at(data, place, bytes([data[place] ^ (1 << draw.randrange(8))]))


def _zeros(data, draw):  # where there was something
    place = draw.choice([k for k in range(0, len(data) - 64, 16) if any(data[k:k + 64])])
    return _at(data, place, bytes(64))


def _lost(data, draw):
    place = draw.randrange(len(data) - 8)
    return data[:place] + data[place + 8:]


def _noise(data, draw):
    return _at(data, draw.randrange(len(data) - 256), draw.randbytes(256))


CHECKPOINTS = {
    **{f"{change.__name__[1:]} {k}": (change, k) for change, count in
       ((_cut, 5), (_flip, 12), (_zeros, 6), (_lost, 4), (_noise, 4)) for k in range(count)},
    "empty": (lambda data, _: b"", 0),
    "text": (lambda data, _: b"no checkpoint at all, but a text", 0),
    "picture": (lambda data, _: b"\x89PNG\r\n\x1a\n" + bytes(1000), 0),
    "pickle": (lambda data, _: b"\x80\x04\x95" + bytes(1000), 0),
    "huge header": (lambda data, _: struct.pack("<Q", 1 << 60) + data[8:], 0),
    "more at the end": (lambda data, _: data + b"more", 0),
    "no metadata": (lambda data, _: _header(data, lambda content: content.pop("__metadata__")), 0),
    "another format": (lambda data, _: _header(data, lambda content: content["__metadata__"].update(format="9")), 0),
    "no checksum": (lambda data, _: _header(data, lambda content: content["__metadata__"].pop("crc32")), 0),
    "no json": (lambda data, _: _header(data, lambda content: content["__metadata__"].update(about="{")), 0),
    "a list": (lambda data, _: _header(data, lambda content: content["__metadata__"].update(about="[1]")), 0),
    "a tensor less": (lambda data, _: _header(data, lambda content: content.pop(sorted(content)[3])), 0),
    "step back": (_about(step=-3), 0), "a step of text": (_about(step="3"), 0), "no stage": (_about(stage=None), 0),
    "another stage": (_about(stage="coarse"), 0), "other settings": (_about(settings={"seed": 9}), 0),
}


def _line(name, value):
    """The config with another value."""
    def change(data, _):
        lines = data.decode().splitlines(keepends=True)
        place = next(k for k, line in enumerate(lines) if line.strip().startswith(f"{name}:"))
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        return "".join([*lines[:place], f"{indent}{name}: {value}\n", *lines[place + 1:]]).encode()

    return change


def _flip_text(data, draw):  # in a line that decides something
    starts = [k + 1 for k, byte in enumerate(data) if byte == 10]
    free = [k for k in range(len(data) - len(END)) if not any(
        data[max([0, *(s for s in starts if s <= k)]):].startswith(name.encode()) for name in CHANGEABLE)]
    while True:
        place = draw.choice(free)
        changed = _at(data, place, bytes([data[place] ^ (1 << draw.randrange(7))]))
        if not _says_the_same(data, changed):
            return changed


def _says_the_same(first, second):
    """As `0.05` and ` .05` do."""
    try:
        return yaml.safe_load(first) == yaml.safe_load(second)
    except (yaml.YAMLError, UnicodeDecodeError):
        return False


# 9^8 letters, if references were followed
BOMB = "preview_every: [&a [x, x, x, x, x, x, x, x, x]" + "".join(
    f", &{new} [{', '.join(['*' + old] * 9)}]" for old, new in zip("abcdefg", "bcdefgh")) + "]"
CONFIGS = {
    **{f"{change.__name__[1:]} {k}": (change, k) for change, count in ((_cut, 6), (_flip_text, 14), (_noise, 3))
       for k in range(count)},
    **{f"{name}: {value}": (_line(name, value), 0) for name, value in (
        ("steps", "many"), ("steps", "-1"), ("steps", "[1, 2, 3]"), ("steps", ".nan"), ("seed", "1.5"),
        ("batch", "null"), ("weight", ".inf"), ("weight", "yes"), ("elevation", "7"), ("elevation", "[0, 1, 2]"),
        ("levels", "2024-01-01"), ("field", "3"), ("prompt", "another one"), ("sharpness", "31.0"), ("hidden", "'8'"),
        ("seed", "9" * 5000),
        ("levels", "!!python/object/apply:os.system [id]"))},
    "empty": (lambda data, _: b"", 0), "only its end": (lambda data, _: END.encode(), 0),
    "a list": (lambda data, _: b"- 1\n- 2" + END.encode(), 0), "a word": (lambda data, _: b"hello" + END.encode(), 0),
    "binary": (lambda data, draw: draw.randbytes(500), 0), "deep": (lambda data, _: b"[" * 5000 + END.encode(), 0),
    "deep and closed": (lambda data, _: b"x: " + b"[" * 5000 + b"]" * 5000 + END.encode(), 0),
    "a bomb": (lambda data, _: BOMB.encode() + END.encode(), 0), "tabs": (lambda data, _: b"\t" + data, 0),
    "another name": (lambda data, _: data.replace(b"sharpness:", b"sharpnes:"), 0),
}


@pytest.mark.parametrize("file, name", [
    *(("checkpoint.safetensors", name) for name in CHECKPOINTS), *(("config.yaml", name) for name in CONFIGS)])
def test_damaged_files_are_one_sentence(finished, tmp_path, capsys, file, name):
    change, seed = (CHECKPOINTS if file == "checkpoint.safetensors" else CONFIGS)[name]
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    damaged = change((out / file).read_bytes(), random.Random(seed))
    assert damaged != (out / file).read_bytes()
    (out / file).write_bytes(damaged)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert cli.main(["generate", "a ball", "--out", str(out), "--resume"]) == USER_ERROR
    one_sentence(capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_there_are_enough_of_them():
    assert len(CHECKPOINTS) >= 30 and len(CONFIGS) >= 30


@contextlib.contextmanager
def _tmpfs(folder):
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def _largest_file(size):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_nothing(finished, tmp_path, capsys):
    with _tmpfs(tmp_path / "disk"):
        out = tmp_path / "disk" / "run"
        shutil.copytree(finished, out)
        checkpoint = (out / "checkpoint.safetensors").read_bytes()
        with contextlib.suppress(OSError), open(tmp_path / "disk" / "others", "wb") as file:
            file.write(bytes(2 << 20))
        capsys.readouterr()
        assert generate(out, "--resume", "--steps", "8") == USER_ERROR
        assert "No space left" in one_sentence(capsys)
        assert (out / "checkpoint.safetensors").read_bytes() == checkpoint and not list(out.glob(".*.*"))
        (tmp_path / "disk" / "others").unlink()
        assert generate(out, "--resume", "--steps", "8") == 0


def test_a_disk_that_fills_while_it_runs_loses_nothing(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    checkpoint = (out / "checkpoint.safetensors").read_bytes()
    with _largest_file(len(checkpoint) // 2):  # the configuration fits, the next checkpoint does not
        assert generate(out, "--resume", "--steps", "8") == USER_ERROR
    assert "cannot write" in one_sentence(capsys)
    assert (out / "checkpoint.safetensors").read_bytes() == checkpoint and not list(out.glob(".*.*"))
    assert generate(out, "--resume", "--steps", "8") == 0
    with _largest_file(len(checkpoint) // 2):
        assert generate(tmp_path / "new") == USER_ERROR
    assert not (tmp_path / "new").exists() or not (tmp_path / "new" / "checkpoint.safetensors").exists()


def test_a_folder_that_cannot_be_written(finished, tmp_path, capsys):
    with _tmpfs(tmp_path / "disk"):
        out = tmp_path / "disk" / "run"
        shutil.copytree(finished, out)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        capsys.readouterr()
        for folder, words in ((out, ["--resume", "--steps", "8"]), (tmp_path / "disk" / "new", [])):
            assert generate(folder, *words) == USER_ERROR
            assert "Read-only file system" in one_sentence(capsys)


def test_a_folder_whose_name_is_too_long(tmp_path, capsys):
    for words in ([], ["--resume"], ["--seeds", "0", "1"]):
        assert generate(tmp_path / ("x" * 300), *words) == USER_ERROR
        assert "File name too long" in one_sentence(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")])
def test_memory_that_ends_loses_nothing(finished, tmp_path, capsys, monkeypatch, error):
    from text3d_fast.pipelines.dreamfusion import DreamFusionStage

    def step(self):
        if self.step_done == 4:
            torch.rand(1, generator=self.generator)  # a step that had begun
            raise error
        return original(self)

    original = DreamFusionStage.step
    monkeypatch.setattr(DreamFusionStage, "step", step)
    out = tmp_path / "run"
    assert generate(out) == USER_ERROR
    shown = capsys.readouterr().err
    assert "error: not enough memory" in shown and "--resume" in shown and "Traceback" not in shown
    monkeypatch.setattr(DreamFusionStage, "step", original)
    assert generate(out, "--resume") == 0
    whole, ours = read_mesh(finished / "mesh.glb"), read_mesh(out / "mesh.glb")
    assert torch.equal(whole.vertices, ours.vertices) and torch.equal(whole.colors, ours.colors)


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(tmp_path, capsys, monkeypatch):
    from text3d_fast.pipelines.dreamfusion import DreamFusionStage

    def step(self):
        if self.step_done == 2:
            raise RuntimeError("mlp: the backend triton cannot serve it")
        return original(self)

    original = DreamFusionStage.step
    monkeypatch.setattr(DreamFusionStage, "step", step)
    assert generate(tmp_path / "run") == USER_ERROR
    assert "the backend triton" in one_sentence(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("megabytes", [400, 750])
def test_little_memory_from_the_start(tmp_path, megabytes):
    code = (f"import resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({megabytes} << 20,) * 2)\n"
            f"from text3d_fast.app import main; sys.exit(main())")
    words = ["generate", "a red mug", "--model", "analytic", "--steps", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == USER_ERROR and "Traceback" not in done.stderr
    assert "error: not enough memory" in done.stderr and not (tmp_path / "run" / "mesh.glb").exists()
