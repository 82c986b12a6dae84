"""The forms in which the forward GEMM on CUDA can read a ternary weight, and which form can serve which layer.

    dense                int8 codes on int8 tensor cores: any N:M (ternary_gemm)
    planes               codes at 2 bits, unpacked in registers: any N:M (planes_gemm)
    wgmma                int8 codes on Hopper, GEMMs kept in flight (wgmma_gemm); never run on hardware: by name only
    cusparselt           2:4 on sparse tensor cores through NVIDIA's library (cusparselt)
    mma_sp               2:4 on sparse tensor cores by our own kernel (sparse_gemm); never run on hardware: by name only
    sliding_cusparselt   (M-2):M as 2:4 windows (sliding_window), through the library
    sliding_mma_sp       the same through our own kernel; by name only

All return the same bits. "auto" measures dense, planes and, where they can serve, the library's, on the shape at hand,
once per machine (tuning). A form that is named and cannot serve a layer is an error that says why.

A new form is one object in `_FORMS` and its name in `registry.FORMS`.
"""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from sbn_kernels import tuning
from sbn_kernels.formats.planes import codes_to_planes
from sbn_kernels.formats.two_four import TwoFourWeight, pack_two_four_fast
from sbn_kernels.gpu.gemm import cusparselt, sliding_window, sparse_gemm, ternary_gemm, wgmma_gemm
from sbn_kernels.gpu.gemm.cusparselt import CompressedWeight
from sbn_kernels.gpu.gemm.planes_gemm import int_matmul_planes, ternary_linear_planes
from sbn_kernels.registry import FORMS
from sbn_kernels.ternary_weight import TernaryWeight


def promises_two_four(n: int, m: int) -> bool:
    """Whether every N:M weight has at most 2 non-zeros in each aligned 4."""
    return (m % 4 == 0 and n <= 2) or (m, n) == (2, 1)


def slides(n: int, m: int) -> bool:
    """Whether every N:M weight fits sliding 2:4 windows."""
    return m % 2 == 0 and m >= 6 and n <= m - 2


class Form:
    """One form of the forward GEMM. Defaults are those of a form that serves every layer and reads the codes alone.

    Attributes:
        measured: whether "auto" considers the form.
    """

    measured = False

    def why_not(self, n: int, m: int, out_features: int, in_features: int) -> str | None:
        """Return why the form cannot serve an N:M layer [out_features, in_features]; None if it can."""
        return None

    def pack(self, codes: Tensor, m: int) -> tuple[Tensor, ...]:
        """Return what the GEMM reads beside the codes int8 [out, in] of N:M sparsity."""
        return ()

    def linear(
        self, x_q: Tensor, s_x: Tensor, weight: TernaryWeight, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """Return Y [..., out] of x_q int8 [..., in] and s_x fp32 [...]: `reference.ternary_linear`."""
        raise NotImplementedError

    def int_matmul(self, x_q: Tensor, weight: TernaryWeight) -> Tensor:
        """Return the integers x_q @ codes^T as fp32 [..., out]: `reference.int_matmul`."""
        raise NotImplementedError


class _Dense(Form):
    measured = True

    def linear(
        self, x_q: Tensor, s_x: Tensor, weight: TernaryWeight, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        return ternary_gemm.ternary_linear(x_q, s_x, weight.codes, weight.gamma_per_row, bias, out_dtype)

    def int_matmul(self, x_q: Tensor, weight: TernaryWeight) -> Tensor:
        return ternary_gemm.int_matmul(x_q, weight.codes)


class _Planes(Form):
    measured = True

    def pack(self, codes: Tensor, m: int) -> tuple[Tensor, ...]:
        return (codes_to_planes(codes),)

    def linear(
        self, x_q: Tensor, s_x: Tensor, weight: TernaryWeight, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        return ternary_linear_planes(x_q, s_x, weight.packed[0], weight.gamma_per_row, bias, out_dtype)

    def int_matmul(self, x_q: Tensor, weight: TernaryWeight) -> Tensor:
        return int_matmul_planes(x_q, weight.packed[0])


class _Wgmma(Form):
    def why_not(self, n: int, m: int, out_features: int, in_features: int) -> str | None:
        return wgmma_gemm.why_not(in_features)

    def linear(
        self, x_q: Tensor, s_x: Tensor, weight: TernaryWeight, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        return wgmma_gemm.ternary_linear_wgmma(x_q, s_x, weight.codes, weight.gamma_per_row, bias, out_dtype)

    def int_matmul(self, x_q: Tensor, weight: TernaryWeight) -> Tensor:
        return wgmma_gemm.int_matmul_wgmma(x_q, weight.codes)


class _TwoFour(Form):
    """2:4 codes on sparse tensor cores; `sliding`: the 2:4 codes are overlapping windows of (M-2):M codes."""

    def __init__(self, *, sliding: bool = False) -> None:
        self.sliding = sliding

    def why_not(self, n: int, m: int, out_features: int, in_features: int) -> str | None:
        if not self.sliding and not promises_two_four(n, m):
            return f"sparse tensor cores take at most 2 non-zeros in each 4, which {n}:{m} does not promise"
        if self.sliding and not slides(n, m):
            return f"sliding windows take N <= M - 2 with M even and at least 6, not {n}:{m}"
        columns = sliding_window.expanded_features(in_features, m) if self.sliding else in_features
        return self._why_not_shape(out_features, columns)

    def pack(self, codes: Tensor, m: int) -> tuple[Tensor, ...]:
        return self._compress(sliding_window.expand_codes(codes, m) if self.sliding else codes)

    def linear(
        self, x_q: Tensor, s_x: Tensor, weight: TernaryWeight, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        flat = x_q.reshape(-1, x_q.shape[-1]).contiguous()  # [tokens, in]
        if self.sliding:
            flat = sliding_window.expand_activations_fast(flat, weight.group)  # [tokens, in * (2M - 4) / M]
        y = self._gemm(flat, s_x.reshape(-1).contiguous(), weight, bias, out_dtype)
        return y.view(*x_q.shape[:-1], y.shape[1])

    def int_matmul(self, x_q: Tensor, weight: TernaryWeight) -> Tensor:
        # Scales of one leave the integers as they are.
        s_x = torch.ones(x_q.shape[:-1], dtype=torch.float32, device=x_q.device)
        ones = torch.ones_like(weight.gamma_per_row, dtype=torch.float32)
        unscaled = TernaryWeight(weight.codes, ones, packed=weight.packed, group=weight.group)
        return self.linear(x_q, s_x, unscaled, None, torch.float32)

    def _why_not_shape(self, out_features: int, columns: int) -> str | None:
        raise NotImplementedError

    def _compress(self, codes: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _gemm(
        self, x_q: Tensor, s_x: Tensor, weight: TernaryWeight, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """Y [tokens, out] of x_q [tokens, columns] and s_x [tokens], both contiguous."""
        raise NotImplementedError


class _Cusparselt(_TwoFour):
    measured = True

    def _why_not_shape(self, out_features: int, columns: int) -> str | None:
        if not torch.backends.cusparselt.is_available():
            return f"PyTorch {torch.__version__} has no cuSPARSELt here"
        if out_features % cusparselt.MULTIPLE or columns % cusparselt.MULTIPLE:
            return f"cuSPARSELt takes multiples of {cusparselt.MULTIPLE}, not {out_features} x {columns}"
        return None

    def _compress(self, codes: Tensor) -> tuple[Tensor, ...]:
        return (cusparselt.compress(codes).data,)

    def _gemm(
        self, x_q: Tensor, s_x: Tensor, weight: TernaryWeight, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        compressed = CompressedWeight(weight.packed[0], len(weight.codes), x_q.shape[1])
        gamma = weight.gamma_per_row.contiguous()
        return cusparselt.cusparselt_linear(x_q, s_x, compressed, gamma, bias, out_dtype)


class _MmaSp(_TwoFour):
    def _why_not_shape(self, out_features: int, columns: int) -> str | None:
        return f"the sparse kernel takes in_features in multiples of 16, not {columns}" if columns % 16 else None

    def _compress(self, codes: Tensor) -> tuple[Tensor, ...]:
        packed = pack_two_four_fast(codes.contiguous(), check=False)
        return packed.values, packed.metadata

    def _gemm(
        self, x_q: Tensor, s_x: Tensor, weight: TernaryWeight, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        values, metadata = weight.packed
        packed = TwoFourWeight(values, metadata, len(weight.codes), x_q.shape[1])
        return sparse_gemm.sparse_linear(x_q, s_x, packed, weight.gamma_per_row.contiguous(), bias, out_dtype)


_FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "dense": _Dense(),
        "planes": _Planes(),
        "wgmma": _Wgmma(),
        "cusparselt": _Cusparselt(),
        "mma_sp": _MmaSp(),
        "sliding_cusparselt": _Cusparselt(sliding=True),
        "sliding_mma_sp": _MmaSp(sliding=True),
    }
)


def find_form(name: str) -> Form:
    """Return the form of a name. Raises ValueError for one that is not in `FORMS`, and for "auto"."""
    if name not in _FORMS:
        raise ValueError(f"form {name!r} is not one of: {', '.join(FORMS)}")
    return _FORMS[name]


def check_form(name: str, n: int, m: int, out_features: int, in_features: int) -> Form:
    """Return the form of a name. Raises ValueError if it cannot serve an N:M layer [out_features, in_features]."""
    form = find_form(name)
    reason = form.why_not(n, m, out_features, in_features)
    if reason is not None:
        raise ValueError(f"form {name!r} cannot serve a layer of {out_features} x {in_features}: {reason}")
    return form


def pack_form(name: str, codes: Tensor, n: int, m: int) -> tuple[Tensor, ...]:
    """Return the tensors that a form reads beside the codes int8 [out, in]: made once per optimizer step.

    Raises:
        ValueError: the form cannot serve the layer.
    """
    return check_form(name, n, m, *codes.shape).pack(codes, m)


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

    def candidate(name: str, form: Form) -> object:
        weight = TernaryWeight(codes, gamma, form=name, packed=form.pack(codes, m), group=m)
        return lambda: form.linear(x_q, s_x, weight, None, out_dtype)

    forms = {name: form for name, form in _FORMS.items() if form.measured and form.why_not(n, m, *shape) is None}
    key: dict[str, int | str] = {"tokens": tuning.bucket_tokens(tokens), "out": out_features, "in": in_features}
    key |= {"sparsity": f"{n}:{m}", "dtype": str(out_dtype)}
    candidates = {name: candidate(name, form) for name, form in forms.items()}
    return tuning.choose("forward_form", key, candidates, device=device)  # type: ignore[arg-type]
