"""A ternary weight as one value, from whoever quantizes it to the kernel that multiplies by it.

PyTorch's custom operators take tensors and numbers only. `ops` takes the value apart where it calls one
(`operator_fields`), and each operator puts it together again (`from_operator`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

OPERATOR_SCHEMA = (
    "Tensor codes, Tensor gamma_per_row, Tensor? codes_t, SymInt[]? bounds, str form, Tensor[] packed, SymInt group"
)
"""The fields of a `TernaryWeight`, in their order, in the schema of a custom operator."""


@dataclass(frozen=True)
class TernaryWeight:
    """Codes and scales of one weight, W ~ gamma * C, and what a backend reads beside them.

    Attributes:
        codes: int8 [out, in] in {-1, 0, 1}.
        gamma_per_row: fp32 [out].
        codes_t: int8 [in, out], the codes transposed; saves a transposition in each backward pass on CUDA.
        bounds: the first row of each run of rows with one gamma, and out at the end; on CUDA the input gradient then
            keeps the scales out of its inner loop. None: any row may have a gamma of its own.
        form: what the forward GEMM reads, one of `FORMS` but "auto". "dense" reads the codes and is the only form of
            CPU tensors; the others read `packed`.
        packed: what `pack_form` made of the codes for `form`.
        group: M of the N:M sparsity; read by the sliding windows only.
    """

    codes: Tensor
    gamma_per_row: Tensor
    codes_t: Tensor | None = None
    bounds: tuple[int, ...] | None = None
    form: str = "dense"
    packed: tuple[Tensor, ...] = ()
    group: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.codes.shape
        return rows, columns

    def operator_fields(self) -> tuple[Any, ...]:
        """The fields as a custom operator takes them: `OPERATOR_SCHEMA`."""
        bounds = None if self.bounds is None else list(self.bounds)
        return self.codes, self.gamma_per_row, self.codes_t, bounds, self.form, list(self.packed), self.group

    @classmethod
    def from_operator(cls, fields: Sequence[Any]) -> "TernaryWeight":
        """The value of which `fields` are the `operator_fields`."""
        codes, gamma_per_row, codes_t, bounds, form, packed, group = fields
        bounds = None if bounds is None else tuple(bounds)
        return cls(codes, gamma_per_row, codes_t, bounds, form, tuple(packed), group)
