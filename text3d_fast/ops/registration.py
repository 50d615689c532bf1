"""Registering ops with torch: schema, checks, implementation, fake kernel, autograd, and what torch may not do to them.

`torch.library.Library` and an autograd.Function under the Autograd key cost half of `register_autograd` a call with
gradient, and a third of `custom_op` (26, 53 and 71 us, measured on two cores with torch 2.13).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

_library = torch.library.Library("text3d", "DEF")


class Derivative(Protocol):
    """How an op is differentiated in reverse: the two methods of a torch.autograd.Function, both static.

    Where backward calls another registered op, that op's own derivative is the second order.
    """

    def setup_context(ctx, inputs: tuple, output) -> None: ...

    def backward(ctx, *grads): ...


class LastOrder:
    """The derivative of an op that has none of its own, where silence would mean zero: the backward of another op."""

    def __init__(self, op: str) -> None:
        self.op = op

    def setup_context(self, ctx, inputs: tuple, output) -> None:
        pass

    def backward(self, ctx, *grads):
        raise RuntimeError(f"{self.op}: derivatives of a higher order are only in use_backend('reference')")


def define(
    schema: str,
    implementation: Callable,
    fake: Callable,
    derivative: Derivative | None = None,
    check: Callable | None = None,
) -> Callable:
    """Define `torch.ops.text3d.<name>` and return it.

    schema: as for torch.library, e.g. "scale(Tensor x, float by) -> Tensor"; no defaults, no keyword-only arguments.
    implementation: takes and returns real tensors, on any device.
    fake: the same with fake tensors: shapes and dtypes only.
    derivative: without one the op is not differentiable: its outputs do not require grad. Autograd does not follow
        lists of tensors: with lists the derivative has `flatten` and `unflatten` too, arguments to and from a tuple
        without lists, and where outputs have lists `flatten_output` and `unflatten_output`.
    check: called with the op's arguments before the implementation and before the fake kernel, so that wrong shapes,
        dtypes and devices are found in eager, compiled and exported code alike.
    Forward-mode derivatives and vmap are refused in words. torch.func.grad and vjp work.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    kernel = _after(check, implementation)
    _library.impl(name, kernel, "CPU")
    _library.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"text3d::{name}", _after(check, fake), lib=_library)
    op = getattr(torch.ops.text3d, name).default
    _library.impl(name, _autograd_kernel(name, op, derivative), "Autograd")
    _library.impl(name, _vmap_kernel(name), "FuncTorchBatched")
    return op


def _after(check: Callable | None, function: Callable) -> Callable:
    if check is None:
        return function

    def checked(*args):
        check(*args)
        return function(*args)

    return checked


def _autograd_kernel(name: str, op: Callable, derivative: Derivative | None) -> Callable:
    any_requires_grad, below_autograd = torch._C._any_requires_grad, torch._C._AutoDispatchBelowAutograd

    def constant(*args):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        with below_autograd():
            return op(*args)

    if derivative is None:
        return constant
    setup_context = derivative.setup_context
    flatten, unflatten, flatten_output, unflatten_output = (
        getattr(derivative, method, None) for method in ("flatten", "unflatten", "flatten_output", "unflatten_output"))

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            # Grad mode is off here, which a transform around this one (grad of grad) must not take for its own.
            inputs = args if unflatten is None else unflatten(args)
            with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()), below_autograd():
                output = op(*inputs)
            setup_context(ctx, args, output)
            return output if flatten_output is None else flatten_output(*output)

        backward = staticmethod(derivative.backward)

    Function.__name__ = Function.__qualname__ = name
    # Function.apply hands transforms of torch.func on, but this kernel is called by them, once for each level.
    apply = super(torch.autograd.Function, Function).apply

    def differentiable(*args):
        if not (torch.is_grad_enabled() and any_requires_grad(*args)):
            return constant(*args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if flatten is not None:
            args = flatten(*args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                output = apply(*args)
        else:
            output = apply(*args)
        return output if unflatten_output is None else unflatten_output(output)

    return differentiable


def _refuse_tangents(name: str, args: tuple) -> None:
    for argument in args:
        for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(f"{name}: no forward-mode derivatives; use reverse mode, or "
                                   "use_backend('reference') for torch's own")


def _vmap_kernel(name: str) -> Callable:
    def refuse(*args):
        raise RuntimeError(f"{name}: torch.func.vmap is not supported, nor what is built on it (jacrev without "
                           "chunk_size=1, jacfwd, hessian, is_grads_batched); give the op its batch as it documents")

    return refuse
