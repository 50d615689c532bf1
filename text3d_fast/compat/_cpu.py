"""Scripts with a hard-coded "cuda", on the CPU: the runner's `--device cpu`, and nothing else, uses this."""

import contextlib
import re
import time
from collections.abc import Iterator
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

_CUDA = re.compile(r"cuda(:\d+)?")
_device = torch.device


def _is_cuda(x) -> bool:
    return (isinstance(x, str) and _CUDA.fullmatch(x) is not None) or (isinstance(x, _device) and x.type == "cuda")


def _mapped(x):
    return _device("cpu") if _is_cuda(x) else x


class _StandIn(type):
    """Stands for a class of torch that cannot be subclassed: makes the real thing, on the CPU, and isinstance holds."""

    real: type

    def __call__(cls, *args, **kwargs):
        if args and isinstance(args[0], int):
            args = ("cpu",)
        return cls.real(*map(_mapped, args), **{name: _mapped(value) for name, value in kwargs.items()})

    def __instancecheck__(cls, instance):
        return isinstance(instance, cls.real)


class _CpuDevice(metaclass=_StandIn):
    real = torch.device


class _CpuGenerator(metaclass=_StandIn):
    real = torch.Generator


class _CudaIsCpu(TorchFunctionMode):
    """Every torch function that is told a CUDA device, by position or by name, gets the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and type(args[1]) is int:
            args = (args[0], _device("cpu"), *args[2:])
        if type(kwargs.get("device")) is int:
            kwargs["device"] = _device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*map(_mapped, args), **{name: _mapped(value) for name, value in kwargs.items()})


class _Event:
    """torch.cuda.Event by the clock."""

    def __init__(self, *args, **kwargs):
        self.seconds = 0.0

    def record(self, stream=None):
        self.seconds = time.perf_counter()

    def elapsed_time(self, end) -> float:
        return 1e3 * (end.seconds - self.seconds)

    def query(self) -> bool:
        return True

    def synchronize(self):
        pass

    wait = synchronize


class _Stream(contextlib.nullcontext):
    """torch.cuda.Stream where everything happens in order."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def synchronize(self):
        pass

    def wait_stream(self, stream):
        pass

    wait_event = wait_stream


def _nothing(*args, **kwargs) -> None:
    pass


def _zero(*args, **kwargs) -> int:
    return 0


def _cuda_patches() -> dict[str, object]:
    calls = {name: _nothing for name in ("synchronize", "set_device", "empty_cache", "ipc_collect", "init",
                                         "reset_peak_memory_stats", "reset_max_memory_allocated", "set_stream")}
    calls |= {name: _zero for name in ("current_device", "memory_allocated", "max_memory_allocated",
                                       "memory_reserved", "max_memory_reserved")}
    calls |= {"Event": _Event, "Stream": _Stream, "stream": _Stream, "device": _Stream,
              "current_stream": _Stream, "default_stream": _Stream}
    types = ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Short", "Char", "Byte", "Bool")
    return calls | {f"{name}Tensor": getattr(torch, f"{name}Tensor") for name in types}


@contextlib.contextmanager
def cuda_is_cpu() -> Iterator[None]:
    """Within, "cuda" means the CPU: devices by name, number or torch.device, .cuda(), factories, torch.load, Generator,
    pinned memory, and torch.cuda's calls that wait, count or time.

    Left as they are, since the truth is what a script then decides by: torch.cuda.is_available(), Tensor.is_cuda.
    Other threads than the one that entered keep "cuda" as it is in torch functions.
    """
    load, set_type, set_device = torch.load, torch.set_default_tensor_type, torch.set_default_device

    def load_on_cpu(f, map_location=None, *args, **kwargs):
        return load(f, "cpu" if map_location is None or _is_cuda(map_location) else map_location, *args, **kwargs)

    def set_cpu_type(t):
        set_type(t.replace("torch.cuda.", "torch.") if isinstance(t, str) else t)

    # Dynamo, which every optimizer imports, names the functions of torch by identity: it must see the real ones.
    from torch._dynamo import trace_rules

    trace_rules.get_torch_obj_rule_map()
    with contextlib.ExitStack() as stack:
        for name, value in _cuda_patches().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in (("device", _CpuDevice), ("Generator", _CpuGenerator), ("load", load_on_cpu),
                            ("set_default_tensor_type", set_cpu_type),
                            ("set_default_device", lambda device: set_device(_mapped(device)))):
            stack.enter_context(mock.patch.object(torch, name, value))
        stack.enter_context(_CudaIsCpu())
        yield
