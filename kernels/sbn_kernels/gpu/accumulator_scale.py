"""The scales of a linear layer after its integers were summed over ranks, on CUDA (reference.scale_accumulator).

    Y = ((float(acc) * s_x[token]) * gamma[row]) + bias        fp32, rounded once, every operation by itself

For row-parallel layers, and for libraries whose GEMMs end in integers; ours scale in the GEMM's own kernel.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.gpu.primitives.launch import check_device
from sbn_kernels.gpu.primitives.tiles import round_to
from sbn_kernels.inspection import Build

_BLOCK = 1024


@triton.jit
def scale_kernel(acc, s_x, gamma, bias, y, out_features, BLOCK: tl.constexpr):
    """One block of columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < out_features
    at = token * out_features + columns
    scaled = tl.load(acc + at, mask=inside, other=0).to(tl.float32) * tl.load(s_x + token)
    scaled = scaled * tl.load(gamma + columns, mask=inside, other=0.0)
    if bias is not None:
        scaled = scaled + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, round_to(scaled, y.dtype.element_ty), mask=inside)


def scale_accumulator(
    acc: Tensor,
    s_x: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return Y [..., out]: the bits of `reference.scale_accumulator`.

    Args:
        acc: integers [..., out] as int32 or fp32.
        s_x: fp32 [...]. gamma_per_row: fp32 [out]. bias: [out] of any float type, or None.
        out_dtype: fp32, bf16 or fp16.

    Raises:
        ValueError: other types or shapes, no CUDA tensors.
    """
    check_device(acc, s_x, gamma_per_row, bias)
    out_features = acc.shape[-1]
    if acc.dtype not in (torch.int32, torch.float32) or s_x.shape != acc.shape[:-1]:
        raise ValueError(
            f"acc must be int32 or fp32 with one s_x per token, got {acc.dtype} {tuple(acc.shape)} and s_x {s_x.shape}"
        )
    if s_x.dtype != torch.float32 or gamma_per_row.dtype != torch.float32:
        raise ValueError(f"scales must be fp32, got {s_x.dtype} and {gamma_per_row.dtype}")
    if gamma_per_row.shape != (out_features,) or (bias is not None and bias.shape != (out_features,)):
        raise ValueError(f"gamma_per_row and bias must be [{out_features}], got {tuple(gamma_per_row.shape)}")
    y = torch.empty(acc.shape, dtype=out_dtype, device=acc.device)
    if y.numel():
        grid = (y.numel() // out_features, triton.cdiv(out_features, _BLOCK))
        scales = (s_x.contiguous(), gamma_per_row.contiguous(), None if bias is None else bias.contiguous())
        scale_kernel[grid](acc.contiguous(), *scales, y, out_features, BLOCK=_BLOCK, enable_fp_fusion=False)
    return y


def _build(acc: str) -> Build:
    signature = {"acc": acc, "s_x": "*fp32", "gamma": "*fp32", "bias": "*bf16", "y": "*bf16", "out_features": "i32"}
    name = f"accumulator_scale[{acc[1:]}]"
    return Build(name, scale_kernel, signature, {"BLOCK": _BLOCK}, fusion=False, aligned=("out_features",))


BUILDS: tuple[Build, ...] = (_build("*i32"), _build("*fp32"))
