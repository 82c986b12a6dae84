"""2:4 linear layers through cuSPARSELt, NVIDIA's library, as PyTorch brings it along: wgmma and tcgen05 of its kind.

    acc [tokens, out] = X_q @ C^T                                by the library, int8 in, int32 out
    Y = ((float(acc) * s_x[token]) * gamma[row]) + bias          by the kernel below, rounded once

The sparse matrix stands left in the library, so it computes C [out, in] @ X_q^T [in, tokens], in, out and tokens in
multiples of 32: X_q^T is X_q read column by column, without a copy, and `transpose_result` has the result written as
[tokens, out]. Its own scale is one number per row of C and would come before s_x; the contract's order is the other
one, hence integers out and a second kernel. Codes are compressed once per optimizer step. 6:8 comes here by
`sliding_window`.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from sbn_kernels.inspection import Build
from sbn_kernels.reference import MAX_REDUCTION
from sbn_kernels.tiles import round_to
from sbn_kernels.two_four import is_two_four

MULTIPLE = 32
"""Of which out and in have to be multiples; tokens are padded to one."""

_BLOCK = 1024


@dataclass(frozen=True)
class CompressedWeight:
    """Compressed 2:4 codes, of `compress`.

    Attributes:
        data: int8, in a layout of the library's own.
        out_features, in_features: of the codes.
    """

    data: Tensor
    out_features: int
    in_features: int


def require_cusparselt() -> None:
    """Raise ValueError if this PyTorch was built without cuSPARSELt."""
    if not torch.backends.cusparselt.is_available():
        raise ValueError(
            f"PyTorch {torch.__version__} has no cuSPARSELt here: install a CUDA build with it, or use the int8 product"
        )


def compress(codes: Tensor) -> CompressedWeight:
    """Compress 2:4 codes int8 [out, in]: once per optimizer step.

    Raises:
        ValueError: no cuSPARSELt, not int8 [out, in], out or in not a multiple of 32, or more than 2 non-zeros in a
            group of 4 (the check waits for the GPU).
    """
    require_cusparselt()
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"cuSPARSELt takes int8 codes [out, in], got {codes.dtype} {tuple(codes.shape)}")
    out_features, in_features = codes.shape
    if out_features % MULTIPLE or in_features % MULTIPLE or not 0 < in_features <= MAX_REDUCTION:
        raise ValueError(
            f"cuSPARSELt takes out and in in multiples of {MULTIPLE}, got {out_features} x {in_features}: "
            "use the int8 product"
        )
    if not is_two_four(codes):
        raise ValueError("codes have more than 2 non-zeros in a group of 4: expand them (sliding_window) or use int8")
    return CompressedWeight(torch._cslt_compress(codes.contiguous()), out_features, in_features)


@triton.jit
def scale_kernel(acc, s_x, gamma, bias, Y, out_features, BLOCK: tl.constexpr):
    """Y [tokens, out] of acc int32 [tokens or more, out]; one program a token and block of columns."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < out_features
    place = token.to(tl.int64) * out_features + column
    y = tl.load(acc + place, mask=inside, other=0).to(tl.float32) * tl.load(s_x + token)
    y = y * tl.load(gamma + column, mask=inside, other=0.0)
    if bias is not None:
        y = y + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + place, round_to(y, Y.dtype.element_ty), mask=inside)


def scale_integers(
    acc: Tensor,
    s_x: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ((acc * s_x) * gamma) + bias for the first tokens of acc, by one kernel, in the bits of the reference.

    Args:
        acc: int32 [tokens or more, out], contiguous.
        s_x: fp32 [tokens].
        gamma_per_row: fp32 [out].
        bias: [out] of any float dtype, or None.
        out_dtype: fp32, bf16 or fp16.

    Raises:
        ValueError: other shapes or dtypes.
    """
    tokens = s_x.shape[0] if s_x.dim() == 1 else -1
    if acc.dtype != torch.int32 or acc.dim() != 2 or not acc.is_contiguous() or not 0 <= tokens <= acc.shape[0]:
        raise ValueError(f"acc must be contiguous int32 [>= {tokens}, out], got {acc.dtype} {tuple(acc.shape)}")
    if s_x.dtype != torch.float32 or gamma_per_row.dtype != torch.float32:
        raise ValueError(f"scales must be fp32, got {s_x.dtype} and {gamma_per_row.dtype}")
    out_features = acc.shape[1]
    if gamma_per_row.shape != (out_features,) or (bias is not None and bias.shape != (out_features,)):
        raise ValueError(f"gamma_per_row and bias must be [{out_features}], got {tuple(gamma_per_row.shape)}")
    y = torch.empty(tokens, out_features, dtype=out_dtype, device=acc.device)
    if y.numel():
        scale_kernel[(tokens, triton.cdiv(out_features, _BLOCK))](
            acc, s_x, gamma_per_row, bias, y, out_features, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False
        )
    return y


def cusparselt_linear(
    x_q: Tensor,
    s_x: Tensor,
    weight: CompressedWeight,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return Y [tokens, out], the same bits as `reference.ternary_linear`.

    Args:
        x_q: int8 [tokens, in], contiguous; copied if tokens are not a multiple of 32.
        s_x: fp32 [tokens].
        weight: of `compress`.
        gamma_per_row: fp32 [out].
        bias: [out] of any float dtype, or None.
        out_dtype: fp32, bf16 or fp16.

    Raises:
        ValueError: no cuSPARSELt, or shapes or dtypes that are not these.
    """
    require_cusparselt()
    if x_q.dtype != torch.int8 or x_q.dim() != 2 or x_q.shape[1] != weight.in_features or not x_q.is_contiguous():
        raise ValueError(
            f"x_q must be contiguous int8 [tokens, {weight.in_features}], got {x_q.dtype} {tuple(x_q.shape)}"
        )
    tokens = x_q.shape[0]
    if s_x.shape != (tokens,):
        raise ValueError(f"s_x must be fp32 [{tokens}], got {tuple(s_x.shape)}")
    if tokens == 0:
        return torch.empty(0, weight.out_features, dtype=out_dtype, device=x_q.device)
    padded = pad(x_q, (0, 0, 0, -tokens % MULTIPLE)) if tokens % MULTIPLE else x_q
    acc = torch._cslt_sparse_mm(weight.data, padded.t(), out_dtype=torch.int32, transpose_result=True)
    return scale_integers(acc, s_x, gamma_per_row, bias, out_dtype)


BUILDS = (
    Build(
        "cusparselt[scale]",
        scale_kernel,
        {"acc": "*i32", "s_x": "*fp32", "gamma": "*fp32", "bias": "*bf16", "Y": "*bf16", "out_features": "i32"},
        {"BLOCK": _BLOCK},
        fusion=False,
        aligned=("out_features",),
    ),
)
"""What `sbn_kernels.inspection` compiles."""
