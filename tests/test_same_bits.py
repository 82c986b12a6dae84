"""The comparison that most tests of the kernels rest on refuses what differs, and says where."""

import pytest
import torch
from same_bits import assert_same_bits, relative

NAN = float("nan")
A = torch.tensor([[1.0, NAN], [0.0, 4.0]])


def test_equal_tensors_pass() -> None:
    assert_same_bits(A, A.clone())
    assert_same_bits([A, None, torch.empty(0)], (A.clone(), None, torch.empty(0)))
    assert relative(torch.tensor([3.0, -8.0]), torch.tensor([2.0, -8.0])) == 0.125


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (
            torch.tensor([[1.0, 2.0], [0.0, 5.0]]),
            r"2 of 4 elements differ, the first at \(0, 1\): got 2.0, expected nan",
        ),
        (A.double(), "got torch.float64"),
        (A[:1], r"got torch.float32 \(1, 2\), expected torch.float32 \(2, 2\)"),
        (None, "got None, expected"),
    ],
    ids=["values", "type", "shape", "nothing"],
)
def test_what_differs_is_said(got: torch.Tensor | None, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_same_bits(got, A)
    with pytest.raises(AssertionError, match=f"item 1: {message}"):
        assert_same_bits([A, got], [A, A])
