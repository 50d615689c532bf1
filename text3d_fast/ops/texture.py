"""Texture sampling with mipmaps and seamless cube maps."""

from collections.abc import Sequence

import torch

from text3d_fast import backends, native
from text3d_fast.ops.checks import (
    alert_not_deterministic,
    check_values,
    float_dtypes,
    require_finite,
    require_same_device,
    require_tensor,
)
from text3d_fast.ops.registration import LastOrder, define
from text3d_fast.ops.typed import typed
from text3d_fast.reference.texture import BOUNDARIES, FILTERS, downsample
from text3d_fast.reference.texture import texture as reference_texture

MAX_MIPS = 16
backends.declare("texture", triton=True)


@typed
def mip_stack(
    tex: torch.Tensor, max_mip_level: int | None = None, *, boundary_mode: str = "wrap"
) -> list[torch.Tensor]:
    """Levels 1, 2, ... of a texture [B, H, W, C] (cube: [B, 6, N, N, C]), each the 2 x 2 mean of the one before.

    Built once, it can be passed as `mip` to many `texture` calls; gradients flow through it to `tex`.
    Raises ValueError where a side greater than 1 is odd, unless max_mip_level stops before it.
    """
    cube = boundary_mode == "cube"
    shape = ("batch", 6, "size", "size", "channels") if tex.dim() == 5 else ("batch", "height", "width", "channels")
    require_tensor("tex", tex, shape)
    if cube and tex.dim() != 5:
        raise ValueError(f"tex: expected shape [batch, 6, size, size, channels], got {list(tex.shape)}")
    if 0 in tex.shape[-3:-1]:
        raise ValueError(f"tex: expected at least one texel, got shape {list(tex.shape)}")
    levels, current = [], tex
    limit = MAX_MIPS - 1 if max_mip_level is None else min(max_mip_level, MAX_MIPS - 1)
    while len(levels) < limit and max(current.shape[-3:-1]) > 1:
        height, width = current.shape[-3:-1]
        if (height > 1 and height % 2) or (width > 1 and width % 2):
            size = " x ".join(map(str, tex.shape[-3:-1]))
            raise ValueError(f"tex: expected even sides for mip level {len(levels) + 1}, got {height} x {width} (from "
                             f"{size}); max_mip_level={len(levels)} is the largest that works")
        current = downsample(current)
        levels.append(current)
    return levels


@typed
def texture(
    tex: torch.Tensor,
    uv: torch.Tensor,
    uv_da: torch.Tensor | None = None,
    mip_level_bias: torch.Tensor | None = None,
    mip: Sequence[torch.Tensor] | None = None,
    filter_mode: str = "auto",
    boundary_mode: str = "wrap",
    max_mip_level: int | None = None,
) -> torch.Tensor:
    """Sample a texture.

    tex: float32 [B or 1, H, W, C], or [B or 1, 6, N, N, C] with boundary_mode "cube" (faces +X -X +Y -Y +Z -Z in
    OpenGL's orientation). uv: [B, h, w, 2]; texel (i, j) is centred at ((i + 0.5) / W, (j + 0.5) / H). For a cube, uv
    are directions [B, h, w, 3] of any length. uv_da: image-space derivatives as `interpolate` gives them,
    [B, h, w, 4] (cube: 6). mip_level_bias: [B, h, w]. mip: levels 1, 2, ... of your own, or `mip_stack(tex)`.
    filter_mode: nearest, linear, linear-mipmap-nearest, linear-mipmap-linear, or auto: the last if uv_da or
    mip_level_bias is given, otherwise linear. boundary_mode: wrap, clamp, zero or cube (seamless; a missing corner
    texel is the mean of the other three).
    Level = log2 of the longer axis of the pixel's footprint in texels (Heckbert 1989) + bias, clamped to the stack.
    Where a coordinate is NaN or infinite, and for the direction (0, 0, 0), the result is 0 and passes no gradient; NaN
    in uv_da or mip_level_bias means the finest level.
    Returns [B, h, w, C]. Gradients: nearest to tex; linear and linear-mipmap-nearest to tex and uv;
    linear-mipmap-linear to tex (or each level of a custom stack), uv, uv_da and mip_level_bias. First order.
    Those to textures are summed in double precision (8 bytes of scratch for each of their numbers). On a CPU the
    gradients are bitwise deterministic; on CUDA those to textures add in any order, and
    torch.use_deterministic_algorithms(True) makes them raise, as torch's own. No host synchronization on a GPU.
    Raises ValueError or TypeError for wrong shapes, dtypes, devices and modes, and with TEXT3D_CHECK=1 in the
    environment for coordinates that are NaN or infinite and for NaN in uv_da and mip_level_bias.
    """
    if boundary_mode not in BOUNDARIES:
        raise ValueError(f"boundary_mode: expected one of {', '.join(BOUNDARIES)}, got {boundary_mode!r}")
    if filter_mode == "auto":
        filter_mode = "linear" if uv_da is None and mip_level_bias is None else "linear-mipmap-linear"
    if filter_mode not in FILTERS:
        raise ValueError(f"filter_mode: expected auto or one of {', '.join(FILTERS)}, got {filter_mode!r}")
    cube = boundary_mode == "cube"
    if max_mip_level is not None and max_mip_level < 0:
        raise ValueError(f"max_mip_level: expected at least 0, got {max_mip_level}")

    backend = backends.choose("texture", uv.device)
    mips = [tex]
    if "mipmap" in filter_mode:
        if uv_da is None and mip_level_bias is None:
            raise ValueError(f"uv_da: filter_mode {filter_mode} needs uv_da or mip_level_bias, got neither")
        _check_base(tex, cube, backend)
        mips += list(mip) if mip is not None else mip_stack(tex, max_mip_level, boundary_mode=boundary_mode)
        if len(mips) > MAX_MIPS:
            raise ValueError(f"mip: expected at most {MAX_MIPS - 1} levels, got {len(mips) - 1}")
        if max_mip_level is not None:
            mips = mips[: max_mip_level + 1]
    else:
        uv_da = mip_level_bias = None
    arguments = (mips, uv, uv_da, mip_level_bias, FILTERS.index(filter_mode), BOUNDARIES.index(boundary_mode), backend)
    if backend == "reference":
        _check(*arguments)
        _check_values(uv, uv_da, mip_level_bias)
        return reference_texture(mips, uv, uv_da, mip_level_bias, filter_mode, boundary_mode)
    return _texture(*arguments)


def _check_base(tex, cube, backend):
    shape = ("batch", 6, "size", "size", "channels") if cube else ("batch", "height", "width", "channels")
    require_tensor("tex", tex, shape, *float_dtypes(backend))
    if cube and tex.shape[2] != tex.shape[3]:
        raise ValueError(f"tex: expected square cube faces, got {tex.shape[2]} x {tex.shape[3]}")
    if 0 in tex.shape[-3:-1]:
        raise ValueError(f"tex: expected at least one texel, got shape {list(tex.shape)}")


def _check(mips, uv, uv_da, bias, filter_mode, boundary_mode, backend):
    tex, *others = mips
    cube, dtypes = BOUNDARIES[boundary_mode] == "cube", float_dtypes(backend)
    axes = 3 if cube else 2
    _check_base(tex, cube, backend)
    require_tensor("uv", uv, ("batch", "height", "width", axes), *dtypes)
    batch, height, width, _ = uv.shape
    if tex.shape[0] not in (1, batch):
        raise ValueError(f"tex: expected a batch of 1 or {batch}, got {tex.shape[0]}")
    for i, level in enumerate(others):
        rest = (6, "size", "size") if cube else ("height", "width")
        require_tensor(f"mip[{i}]", level, ("batch", *rest, tex.shape[-1]), *dtypes)
        if level.shape[0] not in (1, batch):
            raise ValueError(f"mip[{i}]: expected a batch of 1 or {batch}, got {level.shape[0]}")
        if cube and level.shape[2] != level.shape[3]:
            raise ValueError(f"mip[{i}]: expected square cube faces, got {level.shape[2]} x {level.shape[3]}")
        if 0 in level.shape[-3:-1]:
            raise ValueError(f"mip[{i}]: expected at least one texel, got shape {list(level.shape)}")
    if uv_da is not None:
        require_tensor("uv_da", uv_da, (batch, height, width, 2 * axes), *dtypes)
    if bias is not None:
        require_tensor("mip_level_bias", bias, (batch, height, width), *dtypes)
    require_same_device(tex=tex, uv=uv, uv_da=uv_da, mip_level_bias=bias,
                        **{f"mip[{i}]": level for i, level in enumerate(others)})


def _check_values(uv, uv_da, bias):
    if not check_values():
        return
    require_finite("uv", uv)
    for name, value in (("uv_da", uv_da), ("mip_level_bias", bias)):
        if value is not None and bool(value.isnan().any()):
            raise ValueError(f"{name}: expected numbers, got NaN")


def _levels(mips):
    heights, widths = [m.shape[-3] for m in mips], [m.shape[-2] for m in mips]
    return heights, widths, [int(m.shape[0] > 1) for m in mips]


def _aligned(x):
    return None if x is None else native.aligned(x)


def _forward(mips, uv, uv_da, bias, filter_mode, boundary_mode, backend):
    mips = [native.aligned(m) for m in mips]
    out = _fake_forward(mips, uv, uv_da, bias, filter_mode, boundary_mode, backend)
    _check_values(uv, uv_da, bias)
    backends.call(backend, "texture_forward", mips, *_levels(mips), native.aligned(uv), _aligned(uv_da), _aligned(bias),
                  out, uv.shape[0], uv.shape[1] * uv.shape[2], out.shape[3], len(mips), filter_mode, boundary_mode)
    return out


def _fake_forward(mips, uv, uv_da, bias, filter_mode, boundary_mode, backend):
    return uv.new_empty(*uv.shape[:3], mips[0].shape[-1])


def _backward(grad, mips, uv, uv_da, bias, filter_mode, boundary_mode, wanted, backend):
    mips, uv = [native.aligned(m) for m in mips], native.aligned(uv)
    grad_mips, *others = _fake_backward(grad, mips, uv, uv_da, bias, filter_mode, boundary_mode, wanted, backend)
    if backends.runs_gpu_source(backend, uv.device) and any(wanted[3:]):
        alert_not_deterministic("texture's gradient to its texels")
    sums = [torch.zeros(m.shape, dtype=torch.float64, device=m.device) if w else None
            for m, w in zip(mips, wanted[3:])]
    fields = [g if g.numel() else None for g in others]
    backends.call(backend, "texture_backward", native.aligned(grad), mips, *_levels(mips), uv, _aligned(uv_da),
                  _aligned(bias), sums, *fields, uv.shape[0], uv.shape[1] * uv.shape[2], grad.shape[3], len(mips),
                  filter_mode, boundary_mode)
    for g, total in zip(grad_mips, sums):
        if total is not None:
            g.copy_(total)
    return grad_mips, *others


def _fake_backward(grad, mips, uv, uv_da, bias, filter_mode, boundary_mode, wanted, backend):
    grad_mips = [torch.empty_like(m) if w else m.new_empty(0) for m, w in zip(mips, wanted[3:])]
    shapes = [x.shape if w and x is not None else (0,) for x, w in zip((uv, uv_da, bias), wanted)]
    return grad_mips, *(uv.new_empty(shape) for shape in shapes)


class _Derivative:
    @staticmethod
    def flatten(mips, uv, uv_da, bias, filter_mode, boundary_mode, backend):
        return uv, uv_da, bias, filter_mode, boundary_mode, backend, *mips

    @staticmethod
    def unflatten(flat):
        uv, uv_da, bias, filter_mode, boundary_mode, backend, *mips = flat
        return mips, uv, uv_da, bias, filter_mode, boundary_mode, backend

    @staticmethod
    def setup_context(ctx, inputs, output):
        uv, uv_da, bias, *ctx.modes, ctx.backend = inputs[:6]
        ctx.save_for_backward(uv, uv_da, bias, *inputs[6:])

    @staticmethod
    def backward(ctx, grad):
        uv, uv_da, bias, *mips = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[6:]]
        grad_mips, *others = _texture_backward(grad, mips, uv, uv_da, bias, *ctx.modes, wanted, ctx.backend)
        chosen = [g if w else None for g, w in zip((*others, *grad_mips), wanted)]
        return *chosen[:3], None, None, None, *chosen[3:]


class _LastOrder(LastOrder):
    @staticmethod
    def flatten(grad, mips, *rest):
        return grad, *rest, *mips

    @staticmethod
    def unflatten(flat):
        grad, uv, uv_da, bias, filter_mode, boundary_mode, wanted, backend, *mips = flat
        return grad, mips, uv, uv_da, bias, filter_mode, boundary_mode, wanted, backend

    @staticmethod
    def flatten_output(grad_mips, *others):
        return *others, *grad_mips

    @staticmethod
    def unflatten_output(flat):
        grad_uv, grad_uv_da, grad_bias, *grad_mips = flat
        return grad_mips, grad_uv, grad_uv_da, grad_bias


_texture = define(
    "texture(Tensor[] mips, Tensor uv, Tensor? uv_da, Tensor? bias, int filter_mode, int boundary_mode, str backend) "
    "-> Tensor",
    _forward,
    _fake_forward,
    _Derivative,
    _check,
)
_texture_backward = define(
    "texture_backward(Tensor grad, Tensor[] mips, Tensor uv, Tensor? uv_da, Tensor? bias, int filter_mode, "
    "int boundary_mode, bool[] wanted, str backend) -> (Tensor[], Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _LastOrder("texture_backward"),
)
