"""Ways to spoil the arguments of a valid call, and ways to say the same in another manner."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.fuzz.generators import Call, Draw


def _tensors(call: Call, *, floating: bool = False) -> list[str]:
    return [name for name, value in call.arguments.items()
            if isinstance(value, torch.Tensor) and (value.is_floating_point() or not floating)]


def plain(call: Call, draw: Draw) -> str:
    return ""


def views(call: Call, draw: Draw) -> str:
    """The same values with other strides or an odd storage offset."""
    for name in _tensors(call):
        value = call.arguments[name]
        if draw.random.random() < 0.5:
            room = value.new_zeros(value.numel() + 3)
            shifted = room[draw.random.randint(1, 3) :][: value.numel()].view(value.shape)
            call.arguments[name] = shifted.copy_(value)
        elif value.dim() > 1:
            call.arguments[name] = value.transpose(0, -1).contiguous().transpose(0, -1)
        else:
            call.arguments[name] = torch.stack([value, value], -1)[..., 0]
    return "views"


def numpy_numbers(call: Call, draw: Draw) -> str:
    for name, value in call.arguments.items():
        if isinstance(value, float):
            call.arguments[name] = np.float64(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            call.arguments[name] = np.int64(value)
    return "numpy numbers"


def wrong_type(call: Call, draw: Draw) -> str:
    name = draw.random.choice([*call.arguments])
    value = draw.choice(None, "text", np.zeros(3), 1.5, [1.0], (), object(), True, -1, {"a": 1}, torch.zeros(2))
    call.arguments[name] = value
    return f"{name} = {type(value).__name__}"


def wrong_shape(call: Call, draw: Draw) -> str:
    name = draw.random.choice(_tensors(call))
    value = call.arguments[name]
    kind = draw.random.randint(0, 3)
    if kind == 0:
        value = value[None]
    elif kind == 1 and value.dim():
        value = value[..., 0] if value.shape[-1] else value.reshape(-1)
    elif kind == 2 and value.dim():
        value = torch.cat([value, value[:1]])
    elif value.dim():
        value = value[..., :-1]
    call.arguments[name] = value
    return f"{name} of shape {list(value.shape)}"


def wrong_dtype(call: Call, draw: Draw) -> str:
    name = draw.random.choice(_tensors(call))
    dtype = draw.choice(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8,
                        torch.complex64)
    call.arguments[name] = call.arguments[name].to(dtype)
    return f"{name} of {dtype}"


def wrong_device(call: Call, draw: Draw) -> str:
    name = draw.random.choice(_tensors(call))
    call.arguments[name] = call.arguments[name].to("meta")
    return f"{name} on meta"


def all_meta(call: Call, draw: Draw) -> str:
    for name in _tensors(call):
        call.arguments[name] = call.arguments[name].to("meta")
    return "all on meta"


def wild_values(call: Call, draw: Draw) -> str:
    names = [name for name in _tensors(call) if call.arguments[name].numel()]
    if not names:
        return ""
    name = draw.random.choice(names)
    value = call.arguments[name].clone()
    if value.dtype == torch.bool:
        return ""
    wild = draw.choice(float("nan"), float("inf"), -float("inf"), 1e30, -1e38, 1e-42)
    if not value.is_floating_point():
        wild = draw.choice(-1, 2**31 - 1, -(2**31), 1000)
    value.view(-1)[draw.random.randrange(value.numel())] = wild
    call.arguments[name] = value
    return f"{name} with {wild}"


def wild_number(call: Call, draw: Draw) -> str:
    names = [n for n, v in call.arguments.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if not names:
        return ""
    name = draw.random.choice(names)
    whole = isinstance(call.arguments[name], int)
    value = draw.choice(-1, 0, 2**31, 2**40) if whole else draw.choice(float("nan"), float("inf"), -1.0, 2.0, 1e30)
    call.arguments[name] = value
    return f"{name} = {value}"


MUTATIONS: dict[Callable[[Call, Draw], str], int] = {  # with how often
    plain: 6, views: 3, numpy_numbers: 1, wrong_type: 3, wrong_shape: 3, wrong_dtype: 2, wrong_device: 1, all_meta: 1,
    wild_values: 3, wild_number: 1}
SAME_VALUES = (plain, views, numpy_numbers)


def describe(arguments: dict[str, Any]) -> str:
    """For a reproducer's reader: what each argument was."""
    def said(value):
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype)[6:]}{list(value.shape)}" + (" meta" if value.device.type == "meta" else "")
        return repr(value)[:60]

    return ", ".join(f"{name}={said(value)}" for name, value in arguments.items())
