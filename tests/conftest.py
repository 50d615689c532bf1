"""Shared fixtures: devices, NaN-poisoned allocations."""

import os

import pytest
import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def generator(device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Every torch.empty / new_empty / empty_like comes filled with NaN (or the largest int): unwritten output shows."""

    def poison(tensor):
        if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max if tensor.dtype != torch.bool else True)

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _original=original, **k: poison(_original(*a, **k)))
