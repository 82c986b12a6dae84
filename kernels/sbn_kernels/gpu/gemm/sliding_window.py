"""6:8 on 2:4 hardware: (2N-2):2N codes as overlapping windows of four, at 1.5 times the length for 6:8.

Each group of m = 2N consecutive codes becomes N - 1 windows of 4 with stride 2: window j sees positions 2j .. 2j+3.
Every non-zero is kept in exactly one window, and none holds more than 2: windows take, from left to right, the first 2
non-zeros they see that none has taken. After a window that is not full nothing is left so far; windows that are all
full hold 2 (N - 1) = m - 2 non-zeros. So codes with at most m - 2 non-zeros a group always fit. Activations are
repeated along, once for every window that sees them:

    expand_activations(x_q) @ expand_codes(codes)^T = x_q @ codes^T        exactly

The length grows by 4 (N - 1) / (2N): 1 for 2:4, 4/3 for 4:6, 1.5 for 6:8, 1.75 for 14:16. A sparse instruction is worth
two dense ones, so the bound of the gain is 2 / 1.5 = 4/3 at 6:8. Source: SlideSparse (arXiv 2603.05232).
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.inspection import Build
from sbn_kernels.reference import MAX_GROUP

_BLOCK = 1024


def _check_group(t: Tensor, m: int) -> None:
    """Raise ValueError unless `t` is int8 [..., in] in whole groups of an even m of 4 to 32."""
    if m % 2 or not 4 <= m <= MAX_GROUP:
        raise ValueError(f"sliding windows take groups of an even m from 4 to {MAX_GROUP}, got {m}")
    if t.dtype != torch.int8 or t.dim() == 0 or t.shape[-1] % m:
        raise ValueError(f"sliding windows of {m} take int8 [..., k * {m}], got {t.dtype} {tuple(t.shape)}")


def expanded_features(in_features: int, m: int) -> int:
    """Length of `in_features` columns in windows: in * (2 m - 4) / m."""
    return in_features // m * (2 * m - 4)


def expand_codes(codes: Tensor, m: int) -> Tensor:
    """Return the windows of ternary codes int8 [out, in]: int8 [out, in * (2 m - 4) / m], 2:4.

    Args:
        codes: at most m - 2 non-zeros in each m consecutive ones along in.
        m: codes a group, even, 4 to 32.

    Raises:
        ValueError: other m, not int8, `in` not a multiple of m, or a group with more than m - 2 non-zeros.
    """
    _check_group(codes, m)
    groups = codes.unflatten(-1, (-1, m))  # [out, in / m, m]
    left = groups != 0
    windows = []
    for start in range(0, m - 2, 2):
        seen = left[..., start : start + 4]
        taken = seen & (seen.cumsum(-1) <= 2)
        left[..., start : start + 4] = seen & ~taken
        windows.append(groups[..., start : start + 4] * taken)
    if bool(left.any()):
        raise ValueError(f"codes have more than {m - 2} non-zeros in a group of {m}: sliding windows cannot hold them")
    return torch.stack(windows, dim=-2).flatten(-3)


def expand_activations(x_q: Tensor, m: int) -> Tensor:
    """Return what the windows see of x_q int8 [..., in]: int8 [..., in * (2 m - 4) / m], in PyTorch.

    Raises:
        ValueError: m that is not even or not 4 to 32, not int8, or `in` not a multiple of m.
    """
    _check_group(x_q, m)
    return x_q.unflatten(-1, (-1, m)).unfold(-1, 4, 2).flatten(-3)


@triton.jit
def expand_kernel(X, Y, pairs, expanded, M: tl.constexpr, BLOCK: tl.constexpr):
    """Y int16 [tokens, expanded] of X int16 [tokens, pairs]: windows start at even positions, so pairs stay whole."""
    token = tl.program_id(0).to(tl.int64)
    target = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = target < expanded
    group = target // (M - 2)
    place = target % (M - 2)
    source = group * (M // 2) + place // 2 + place % 2
    tl.store(Y + token * expanded + target, tl.load(X + token * pairs + source, mask=inside, other=0), mask=inside)


def expand_activations_fast(x_q: Tensor, m: int) -> Tensor:
    """`expand_activations` of contiguous x_q int8 [tokens, in] by a Triton kernel: one read, one write.

    Raises:
        ValueError: as `expand_activations`, or not a contiguous matrix.
    """
    _check_group(x_q, m)
    if x_q.dim() != 2 or not x_q.is_contiguous():
        raise ValueError(f"the kernel expands a contiguous [tokens, in] matrix, got shape {tuple(x_q.shape)}")
    tokens, in_features = x_q.shape
    y = torch.empty(tokens, expanded_features(in_features, m), dtype=torch.int8, device=x_q.device)
    if y.numel():
        expanded = y.shape[1] // 2
        grid = (tokens, triton.cdiv(expanded, _BLOCK))
        expand_kernel[grid](
            x_q.view(torch.int16), y.view(torch.int16), in_features // 2, expanded, M=m, BLOCK=_BLOCK, num_warps=4
        )
    return y


BUILDS = (
    Build(
        "sliding_window[6:8]",
        expand_kernel,
        {"X": "*i16", "Y": "*i16", "pairs": "i32", "expanded": "i32"},
        {"M": 8, "BLOCK": _BLOCK},
    ),
)
"""What `sbn_kernels.inspection` compiles."""
