"""One call: made, compared with the reference, and judged."""

import re
import warnings

import torch

from tests.fuzz.generators import GENERATORS, Call, Draw
from tests.fuzz.mutations import MUTATIONS, SAME_VALUES, all_meta, describe, wild_number, wild_values
from text3d_fast import use_backend

VERDICTS = ("right", "answered", "clear error", "defect")


def judge(seed: str, only: str | None = None) -> tuple[str, str, str, str]:
    """(op, verdict, kind of call, what happened). Right: as the reference; answered: without a crash, to wild values.

    A clear error is a ValueError or TypeError that names an argument, to a call that was not valid.
    """
    draw = Draw(seed)
    name = only or draw.random.choice([*GENERATORS])
    call = GENERATORS[name](draw)
    mutate = draw.random.choices([*MUTATIONS], [*MUTATIONS.values()])[0]
    what = mutate(call, draw)
    text = f"{mutate.__name__} {what}; {describe(call.arguments)}"
    valid = mutate in SAME_VALUES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            got = _outputs(call, valid)
        except (ValueError, TypeError) as error:
            if valid:
                return name, "defect", mutate.__name__, f"a valid call raised {error!r}; {text}"
            if not _names_an_argument(str(error), name, call):
                return name, "defect", mutate.__name__, f"unclear {error!r}; {text}"
            return name, "clear error", mutate.__name__, str(error)
        except Exception as error:
            if mutate is all_meta and "meta" in str(error):
                return name, "clear error", mutate.__name__, str(error)
            return name, "defect", mutate.__name__, f"{type(error).__name__} {str(error)[:200]}; {text}"
        if mutate is all_meta:
            return name, "answered", mutate.__name__, text
        try:
            with use_backend("reference"):
                expected = _outputs(call, valid)
        except Exception as error:
            of_values = mutate in (wild_values, wild_number) or "expected indices" in str(error)  # kernels see some
            verdict = "answered" if of_values else "defect"
            return name, verdict, mutate.__name__, f"the reference raised {str(error)[:200]}; {text}"
    difference = _difference(got, expected, call.near_ties, values=mutate not in (wild_values, wild_number))
    if difference:
        return name, "defect", mutate.__name__, f"{difference}; {text}"
    return name, "answered" if mutate in (wild_values, wild_number) else "right", mutate.__name__, text


def _flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _flat(item)]
    return _flat([*vars(value).values()]) if hasattr(value, "__dict__") else []


def _outputs(call: Call, with_gradients: bool) -> list[torch.Tensor]:
    arguments = dict(call.arguments)
    leaves = []
    for name in call.differentiable if with_gradients else ():
        if isinstance(arguments[name], torch.Tensor) and arguments[name].is_floating_point():
            arguments[name] = arguments[name].detach().requires_grad_()
            leaves.append(arguments[name])
    outputs = _flat(call.run(arguments))
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    smooth = [y for y in outputs if y.requires_grad]
    if leaves and smooth:
        total = sum((y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum() for y in smooth)
        gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
    return [y.detach() for y in outputs] + [*gradients]


def _difference(got: list, expected: list, near_ties: bool, values: bool) -> str:
    """What differs; empty if nothing does."""
    if len(got) != len(expected):
        return f"{len(got)} outputs, the reference has {len(expected)}"
    for i, (a, b) in enumerate(zip(got, expected)):
        if a.shape != b.shape:
            if near_ties and a.dim() == b.dim() and abs(a.numel() - b.numel()) <= 2 + b.numel() // 50:
                continue
            return f"output {i} has shape {list(a.shape)}, the reference's {list(b.shape)}"
        if a.dtype != b.dtype:
            return f"output {i} is {a.dtype}, the reference's {b.dtype}"
        if a.device != b.device:
            return f"output {i} is on {a.device}, the reference's on {b.device}"
        if not values or not a.numel() or a.device.type == "meta":
            continue
        a, b = a.double(), b.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return f"output {i} is not finite where the reference is, or the other way round"
        scale = max(1.0, float(b[b.isfinite()].abs().max())) if b.isfinite().any() else 1.0
        off = (a - b).nan_to_num().abs() > 2e-3 * scale  # float32 sums in another order
        if off.float().mean() > (0.1 if near_ties else 0):
            return f"output {i} is off by {float((a - b).nan_to_num().abs().max()):.3g} of {scale:.3g}"
    return ""


def _names_an_argument(message: str, op: str, call: Call) -> bool:
    words = {op, *call.arguments, *(name.partition(".")[0] for name in call.arguments)}
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message) for word in words)
