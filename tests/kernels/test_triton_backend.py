"""The registry's triton backend, interpreted without a GPU: the whole layer against the reference, in every form."""

import pytest
import sbn_kernels as kernels
import torch
from same_bits import assert_same_bits
from sbn_kernels import TernaryWeight, reference
from sbn_kernels.gpu import forward_forms
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
RUNS_HERE = ("dense", "planes") + (("mma_sp", "sliding_mma_sp") if DEVICE == "cuda" else ()) + ("wgmma",) * HOPPER


def layer(n: int = 6, m: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """(x, dy, codes, gamma per row of three runs, x_q, s_x) of 48 x 64 and 5 tokens."""
    generator = torch.Generator().manual_seed(n)
    w = torch.randn(48, 64, generator=generator).to(DEVICE)
    x, dy = (torch.randn(1, 5, k, generator=generator).to(DEVICE).to(dtype) for k in (64, 48))
    codes, gamma = kernels.ternary_codes(w, n, m, [16, 16, 16], backend="reference")
    x_q, s_x = kernels.quantize_activations(x, backend="reference")
    return x, dy, codes, kernels.gamma_rows(gamma, [16, 16, 16]), x_q, s_x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["exact", "int8_dgrad", "int8"])
def test_every_operation_agrees_with_the_reference(mode: str, dtype: torch.dtype) -> None:
    x, dy, codes, gamma, x_q, s_x = layer(dtype=dtype)
    ours, theirs = kernels.quantize_activations(x, backend="triton"), (x_q, s_x)
    assert_same_bits(ours, theirs)
    weight = TernaryWeight(codes, gamma)
    y = [kernels.ternary_linear(x_q, s_x, weight, None, dtype, backend=b) for b in ("triton", "reference")]
    assert_same_bits(*y)
    acc = [kernels.int_matmul(x_q, weight, backend=b) for b in ("triton", "reference")]
    assert_same_bits(*acc)
    scaled = [kernels.scale_accumulator(acc[0], s_x, gamma, backend=b) for b in ("triton", "reference")]
    assert_same_bits(*scaled)
    exact_dx = (dy.double() * gamma.double()) @ codes.double()
    exact_dw = (dy.double() * s_x.double().unsqueeze(-1)).flatten(0, 1).t() @ x_q.double().flatten(0, 1)
    tolerance = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
    for bounds in (None, (0, 16, 32, 48)):
        for codes_t in (None, codes.t().contiguous()):
            dx = kernels.input_gradient(dy, TernaryWeight(codes, gamma, codes_t, bounds), mode, backend="triton")
            assert dx.dtype == dtype
            if mode == "exact":
                torch.testing.assert_close(
                    dx.double(), exact_dx, rtol=tolerance, atol=tolerance * float(exact_dx.abs().max())
                )
            else:
                assert_same_bits(dx, kernels.input_gradient(dy, weight, mode, backend="reference"))
    dw = kernels.weight_gradient(dy, x_q, s_x, mode, backend="triton")
    assert dw.dtype == torch.float32
    if mode == "int8":
        assert_same_bits(dw, kernels.weight_gradient(dy, x_q, s_x, mode, backend="reference"))
    else:
        torch.testing.assert_close(dw.double(), exact_dw, rtol=tolerance, atol=tolerance * float(exact_dw.abs().max()))


@pytest.mark.parametrize("form", RUNS_HERE)
def test_every_form_gives_the_same_bits(form: str) -> None:
    n, m = (2, 4) if form == "mma_sp" else (6, 8)
    _, _, codes, gamma, x_q, s_x = layer(n, m)
    weight = TernaryWeight(codes, gamma, form=form, packed=forward_forms.pack_form(form, codes, n, m), group=m)
    y = kernels.ternary_linear(x_q, s_x, weight, backend="triton")
    assert_same_bits(y, reference.ternary_linear(x_q, s_x, codes, gamma))
    assert_same_bits(kernels.int_matmul(x_q, weight, backend="triton"), reference.int_matmul(x_q, codes))


def test_quantized_weights_bring_what_their_forms_read() -> None:
    made = [
        torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(DEVICE) for shape in ((48, 64), (16, 320))
    ]
    gammas = [torch.full((len(w),), 0.5, device=DEVICE) for w in made]
    for forms in (["planes", "dense"], ["sliding_mma_sp", "planes"]):
        many = kernels.quantize_weights(made, gammas, 6, 8, forms=forms, backend="triton")
        for form, (ours, _) in zip(forms, many, strict=True):
            assert (ours.form, ours.group) == (form, 8)
            expected = forward_forms.pack_form(form, ours.codes, 6, 8)
            assert len(ours.packed) == len(expected)
            assert_same_bits(ours.packed, expected)


@pytest.mark.parametrize(
    ("form", "nm", "shape", "reason"),
    [
        ("mma_sp", (6, 8), (32, 64), "at most 2 non-zeros in each 4, which 6:8 does not promise"),
        ("mma_sp", (2, 4), (32, 40), "multiples of 16, not 40"),
        ("sliding_mma_sp", (7, 8), (32, 64), "sliding windows take N <= M - 2"),
        ("sliding_mma_sp", (2, 4), (32, 64), "M even and at least 6, not 2:4"),
        ("cusparselt", (6, 8), (32, 64), "which 6:8 does not promise"),
    ],
)
def test_a_form_that_cannot_serve_is_an_error_with_the_reason(
    form: str, nm: tuple[int, int], shape: tuple[int, int], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"form '{form}' cannot serve a layer of {shape[0]} x {shape[1]}: .*{reason}"):
        forward_forms.pack_form(form, torch.zeros(shape, dtype=torch.int8, device=DEVICE), *nm)


@pytest.mark.skipif(torch.backends.cusparselt.is_available(), reason="this PyTorch has cuSPARSELt")
def test_a_library_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no cuSPARSELt here"):
        forward_forms.check_form("cusparselt", 2, 4, 32, 64)


def test_unknown_forms_and_forms_of_other_backends_are_refused() -> None:
    _, _, codes, gamma, x_q, s_x = layer()
    with pytest.raises(ValueError, match="form 'auto' is not one of"):
        forward_forms.pack_form("auto", codes, 6, 8)
    with pytest.raises(ValueError, match="'planes' belongs to backend 'triton'; backend 'reference' has 'dense' alone"):
        kernels.ternary_linear(x_q, s_x, TernaryWeight(codes, gamma, form="planes"), backend="reference")


def test_the_fastest_form_is_measured_among_those_that_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def choose(operation: str, key: dict[str, object], candidates: dict[str, object], **_: object) -> str:
        if operation != "forward_form":
            return next(iter(candidates))
        asked.update({"key": key, "forms": list(candidates)})
        for run in candidates.values():
            assert run().shape == (7, 48)  # type: ignore[operator]
        return "planes"

    monkeypatch.setattr(forward_forms.tuning, "choose", choose)
    chosen = forward_forms.choose_form(2, 4, 48, 64, 7, torch.bfloat16, torch.device(DEVICE))
    assert chosen == "planes"
    library = ["cusparselt"] if torch.backends.cusparselt.is_available() else []
    assert asked["forms"] == ["dense", "planes"] + (library if DEVICE == "cuda" else [])
    assert asked["key"] == {"tokens": 8, "out": 48, "in": 64, "sparsity": "2:4", "dtype": "torch.bfloat16"}
