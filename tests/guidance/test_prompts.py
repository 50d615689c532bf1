"""View-dependent prompts."""

import math

import pytest
import torch

from text3d_fast.guidance.prompts import VIEWS, ViewPrompts


def test_views_around_the_object():
    views = ViewPrompts()
    azimuths = (0, 44, 46, 134, 136, 180, 224, 226, 314, 316, -90, 450)
    names = [views.view(0.1, math.radians(a)) for a in azimuths]
    expected = "front front left left back back back right right front right left"
    assert names == expected.split()
    assert views.view(math.radians(61), 0.0) == "overhead" and views.view(math.radians(59), 0.0) == "front"
    assert ViewPrompts(front=30, back=30).view(0.0, math.radians(40)) == "left"


def test_words():
    angles = torch.tensor([0.2, 0.2, 0.2, 0.2, 1.4]), torch.tensor([0.0, 1.6, 3.1, 4.7, 0.0])
    assert ViewPrompts()("a mug", *angles) == [
        "a mug, front view", "a mug, side view", "a mug, back view", "a mug, side view", "a mug, overhead view"]
    assert ViewPrompts("left_right")("a mug", *angles)[1::2] == ["a mug, left side view", "a mug, right side view"]
    assert ViewPrompts("none")("a mug", *angles) == ["a mug"] * 5
    assert ViewPrompts()("", *angles) == [""] * 5
    own = ViewPrompts(dict.fromkeys(VIEWS, "seen"), template="{view}: {text}")
    assert own(["a", "b"], [0.0, 0.0], [0.0, 1.0]) == ["seen: a", "seen: b"]
    assert len(ViewPrompts().all("a mug")) == 5 and len(ViewPrompts("left_right").all("a mug")) == 6


def test_errors():
    with pytest.raises(ValueError, match="wording: expected one of"):
        ViewPrompts("up_down")
    with pytest.raises(ValueError, match="no phrase for back"):
        ViewPrompts({"front": "x", "left": "x", "right": "x", "overhead": "x"})
    with pytest.raises(ValueError, match="front, back"):
        ViewPrompts(front=120, back=90)
    with pytest.raises(ValueError, match="expected one length"):
        ViewPrompts()(["a"], [0.0, 0.0], [0.0, 0.0])


def test_views_are_pushed_off_those_that_a_model_would_rather_draw():
    views = ViewPrompts("side")
    negatives = views.negatives("a mug", 0.7)
    assert negatives["a mug, back view"] == {"a mug, side view": 0.7, "a mug, front view": 0.7}
    assert negatives["a mug, side view"] == {"a mug, front view": 0.7}
    assert negatives["a mug, front view"] == {"a mug, side view": 0.7}
    apart = ViewPrompts("left_right").negatives("a mug", 1.0)
    assert apart["a mug, left side view"] == {"a mug, front view": 1.0, "a mug, right side view": 1.0}
    assert views.negatives("a mug", 0.0) == {} and ViewPrompts("none").negatives("a mug", 1.0) == {"a mug": {}}
    assert set(negatives) <= set(views.all("a mug"))
