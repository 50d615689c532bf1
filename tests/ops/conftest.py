"""Fixtures of the Triton twins: in the interpreter, or on a GPU."""

import os

import pytest
import torch

from text3d_fast import use_backend


@pytest.fixture
def runs_triton():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("needs TRITON_INTERPRET=1 or a GPU")


@pytest.fixture
def triton_backend(runs_triton):
    with use_backend("triton"):
        yield
