"""2:4 linear layers through cuSPARSELt, NVIDIA's library, as PyTorch brings it along: wgmma and tcgen05 of its kind.

    acc [tokens, out] = X_q @ C^T                                by the library, int8 in, int32 out
    Y = ((float(acc) * s_x[token]) * gamma[row]) + bias          by `accumulator_scale`, rounded once

The sparse matrix stands left in the library, so it computes C [out, in] @ X_q^T [in, tokens], in, out and tokens in
multiples of 32: X_q^T is X_q read column by column, without a copy, and `transpose_result` has the result written as
[tokens, out]. Its own scale is one number per row of C and would come before s_x; the contract's order is the other
one, hence integers out and a second kernel. Codes are compressed once per optimizer step. 6:8 comes here by
`sliding_window`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sbn_kernels.formats.two_four import is_two_four
from sbn_kernels.gpu.accumulator_scale import scale_accumulator
from sbn_kernels.reference import MAX_REDUCTION

MULTIPLE = 32
"""Of which out and in have to be multiples; tokens are padded to one."""


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
            f"PyTorch {torch.__version__} has no cuSPARSELt here: install a CUDA build with it, or use the int8 GEMM"
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
            "use the int8 GEMM"
        )
    if not is_two_four(codes):
        raise ValueError("codes have more than 2 non-zeros in a group of 4: expand them (sliding_window) or use int8")
    return CompressedWeight(torch._cslt_compress(codes.contiguous()), out_features, in_features)


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
    return scale_accumulator(acc[:tokens], s_x, gamma_per_row, bias, out_dtype)
