"""Comparisons of tensors that say where two of them differ."""

from collections.abc import Sequence

from torch import Tensor

Tensors = Tensor | Sequence[Tensor | None] | None


def assert_same_bits(got: Tensors, expected: Tensors, label: object = "") -> None:
    """Types, shapes and all values are equal; NaN equals NaN. Of two sequences, each pair; None equals only None."""
    complaint = ""
    if got is None or expected is None:
        complaint = "" if got is expected else f"got {got}, expected {expected}"
    elif not isinstance(got, Tensor) or not isinstance(expected, Tensor):
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_same_bits(one, other, f"{label} item {i}:".lstrip())
    elif (got.dtype, got.shape) != (expected.dtype, expected.shape):
        complaint = f"got {got.dtype} {tuple(got.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    else:
        differ = (got != expected) & ~(got.isnan() & expected.isnan())
        if differ.any():
            index = tuple(differ.nonzero()[0].tolist())
            complaint = f"{int(differ.sum())} of {differ.numel()} elements differ, the first at {index}: "
            complaint += f"got {got[index].item()!r}, expected {expected[index].item()!r}"
    if complaint:
        raise AssertionError(f"{label} {complaint}".lstrip())


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude of what is expected."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
