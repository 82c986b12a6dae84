"""The plan loads no torch, so it has its own rules for the forms of a weight: they are those of sbn_kernels."""

from types import SimpleNamespace

import pytest
import torch
from sbn_kernels import FORMS
from sbn_kernels.gpu import forward_forms

from megatron_sbn.plan.memory import is_two_four, packed_bytes


def bytes_a_weight(form: str, n: int, m: int) -> float:
    linear = SimpleNamespace(forward_form=form, sparsity=(n, m), activation_bits=8)
    return packed_bytes(SimpleNamespace(recipe=SimpleNamespace(linear=linear)))


@pytest.mark.parametrize("name", FORMS[1:])
def test_the_plan_counts_what_a_form_packs(name: str) -> None:
    n, m = (6, 8) if name.startswith("sliding") else (2, 4)
    codes = torch.ones(64, 768, dtype=torch.int8)
    codes.view(64, -1, m)[..., n:] = 0
    if name.endswith("cusparselt"):  # the library needs a GPU; values and places as in our own kernel's format
        name = name.replace("cusparselt", "mma_sp")
    packed = forward_forms.find_form(name).pack(codes, m)
    assert sum(t.nbytes for t in packed) == bytes_a_weight(name, n, m) * codes.numel()


def test_the_plan_tells_sparsities_apart_as_the_forms_do() -> None:
    for m in range(1, 33):
        for n in range(1, m + 1):
            assert is_two_four(n, m) == forward_forms.promises_two_four(n, m), (n, m)
            if not is_two_four(n, m) and n < m:
                largest = "sliding_cusparselt" if forward_forms.slides(n, m) else "planes"
                assert bytes_a_weight("auto", n, m) == bytes_a_weight(largest, n, m), (n, m)
