"""The forms a ternary weight can take for the forward product on CUDA, and which of them can serve which layer.

    dense                int8 codes on int8 tensor cores: any N:M (ternary_gemm)
    planes               codes at 2 bits, unpacked in registers: any N:M (planes_gemm)
    wgmma                int8 codes on Hopper, products kept in flight (wgmma_gemm); never run on hardware: by name only
    cusparselt           2:4 on sparse tensor cores through NVIDIA's library (cusparselt)
    mma_sp               2:4 on sparse tensor cores by our own kernel (sparse_gemm); never run on hardware: by name only
    sliding_cusparselt   (m-2):m as 2:4 windows (sliding_window), through the library
    sliding_mma_sp       the same through our own kernel; by name only

All return the same bits. "auto" measures dense, planes and, where they can serve, the library's, on the shape at hand,
once per machine (tuning). A form that is named and cannot serve a layer is an error that says why.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sbn_kernels import tuning
from sbn_kernels.formats.planes import codes_to_planes
from sbn_kernels.formats.two_four import TwoFourWeight, pack_two_four_fast
from sbn_kernels.gpu.gemm import cusparselt, sliding_window, sparse_gemm, ternary_gemm, wgmma_gemm
from sbn_kernels.gpu.gemm.cusparselt import CompressedWeight
from sbn_kernels.gpu.gemm.planes_gemm import int_matmul_planes, ternary_linear_planes
from sbn_kernels.registry import FORMS


def _is_two_four(n: int, m: int) -> bool:
    """Whether every N:M weight has at most 2 non-zeros in each aligned 4."""
    return (m % 4 == 0 and n <= 2) or (m, n) == (2, 1)


def _slides(n: int, m: int) -> bool:
    return m % 2 == 0 and m >= 6 and n <= m - 2


def why_not(form: str, n: int, m: int, out_features: int, in_features: int) -> str | None:
    """Return why a form cannot serve an N:M layer [out_features, in_features]; None if it can."""
    if form in ("dense", "planes"):
        return None
    if form == "wgmma":
        return wgmma_gemm.why_not(in_features)
    columns = in_features
    if form.startswith("sliding_"):
        if not _slides(n, m):
            return f"sliding windows take N <= M - 2 with M even and at least 6, not {n}:{m}"
        columns = sliding_window.expanded_features(in_features, m)
    elif not _is_two_four(n, m):
        return f"sparse tensor cores take at most 2 non-zeros in each 4, which {n}:{m} does not promise"
    if form.endswith("cusparselt"):
        if not torch.backends.cusparselt.is_available():
            return f"PyTorch {torch.__version__} has no cuSPARSELt here"
        if out_features % cusparselt.MULTIPLE or columns % cusparselt.MULTIPLE:
            return f"cuSPARSELt takes multiples of {cusparselt.MULTIPLE}, not {out_features} x {columns}"
    elif columns % 16:
        return f"the sparse kernel takes in_features in multiples of 16, not {columns}"
    return None


def check_form(form: str, n: int, m: int, out_features: int, in_features: int) -> None:
    """Raise ValueError if `form` cannot serve an N:M layer [out_features, in_features]."""
    if form not in FORMS[1:]:
        raise ValueError(f"form {form!r} is not one of: {', '.join(FORMS)}")
    reason = why_not(form, n, m, out_features, in_features)
    if reason is not None:
        raise ValueError(f"form {form!r} cannot serve a layer of {out_features} x {in_features}: {reason}")


def pack_form(form: str, codes: Tensor, n: int, m: int) -> tuple[Tensor, ...]:
    """Return the tensors that `form` wants beside the codes int8 [out, in]: made once per optimizer step.

    Raises:
        ValueError: the form cannot serve the layer.
    """
    check_form(form, n, m, *codes.shape)
    if form in ("dense", "wgmma"):
        return ()
    if form == "planes":
        return (codes_to_planes(codes),)
    matrix = sliding_window.expand_codes(codes, m) if form.startswith("sliding_") else codes
    if form.endswith("cusparselt"):
        return (cusparselt.compress(matrix).data,)
    packed = pack_two_four_fast(matrix.contiguous(), check=False)
    return packed.values, packed.metadata


def linear(
    form: str,
    group: int,
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    packed: Sequence[Tensor],
    gamma_per_row: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return Y [..., out] by a form: `reference.ternary_linear`.

    Args:
        form: one of `FORMS` but "auto"; group: M, for sliding windows.
        x_q: int8 [..., in]. s_x: fp32 [...]. codes: int8 [out, in]. packed: of `pack_form`.
        gamma_per_row: fp32 [out]. bias: [out] or None. out_dtype: of the result.
    """
    if form == "dense":
        return ternary_gemm.ternary_linear(x_q, s_x, codes, gamma_per_row, bias, out_dtype)
    if form == "wgmma":
        return wgmma_gemm.ternary_linear_wgmma(x_q, s_x, codes, gamma_per_row, bias, out_dtype)
    if form == "planes":
        return ternary_linear_planes(x_q, s_x, packed[0], gamma_per_row, bias, out_dtype)
    tokens = x_q.reshape(-1, x_q.shape[-1]).contiguous()
    if form.startswith("sliding_"):
        tokens = sliding_window.expand_activations_fast(tokens, group)
    arguments = (gamma_per_row.contiguous(), bias, out_dtype)
    scales = s_x.reshape(-1).contiguous()
    if form.endswith("cusparselt"):
        y = cusparselt.cusparselt_linear(
            tokens, scales, CompressedWeight(packed[0], codes.shape[0], tokens.shape[1]), *arguments
        )
    else:
        weight = TwoFourWeight(packed[0], packed[1], codes.shape[0], tokens.shape[1])
        y = sparse_gemm.sparse_linear(tokens, scales, weight, *arguments)
    return y.view(*x_q.shape[:-1], codes.shape[0])


def int_matmul(form: str, group: int, x_q: Tensor, codes: Tensor, packed: Sequence[Tensor]) -> Tensor:
    """Return the integers x_q @ codes^T as fp32 [..., out] by a form: `reference.int_matmul`."""
    if form == "dense":
        return ternary_gemm.int_matmul(x_q, codes)
    if form == "wgmma":
        return wgmma_gemm.int_matmul_wgmma(x_q, codes)
    if form == "planes":
        return int_matmul_planes(x_q, packed[0])
    # Scales of one leave the integers as they are.
    s_x = torch.ones(x_q.shape[:-1], dtype=torch.float32, device=x_q.device)
    ones = torch.ones(codes.shape[0], dtype=torch.float32, device=x_q.device)
    return linear(form, group, x_q, s_x, codes, packed, ones, None, torch.float32)


@lru_cache(maxsize=256)
def choose_form(
    n: int, m: int, out_features: int, in_features: int, tokens: int, out_dtype: torch.dtype, device: torch.device
) -> str:
    """Return the form that is fastest for a layer and number of tokens, measured once per machine (tuning).

    Remembered in the process as well: it is asked for every layer after every optimizer step.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (out_features, in_features)
    codes = torch.randint(-1, 2, shape, dtype=torch.int8, device=device, generator=generator)
    if n < m:  # any mask will do: the time does not depend on which weights are zero
        codes.view(out_features, -1, m)[..., n:] = 0
    x_q = torch.randint(-128, 128, (tokens, in_features), dtype=torch.int8, device=device, generator=generator)
    s_x, gamma = torch.ones(tokens, device=device), torch.ones(out_features, device=device)

    def candidate(form: str) -> object:
        packed = pack_form(form, codes, n, m)
        return lambda: linear(form, m, x_q, s_x, codes, packed, gamma, None, out_dtype)

    measured = ("dense", "planes", "cusparselt", "sliding_cusparselt")
    forms = [form for form in measured if why_not(form, n, m, *shape) is None]
    key: dict[str, int | str] = {"tokens": tuning.bucket_tokens(tokens), "out": out_features, "in": in_features}
    key |= {"sparsity": f"{n}:{m}", "dtype": str(out_dtype)}
    return tuning.choose("forward_form", key, {form: candidate(form) for form in forms}, device=device)  # type: ignore[misc]
