"""Packed weights and few tokens: the same bits as the reference, for every format, token block and split."""

import itertools

import pytest
import torch
from cases import kernel_cases
from operands import DEVICE, TWO_FOUR_GROUPS, operands, two_four_codes
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.formats import trits
from sbn_kernels.gpu.decode import decode

FORMATS = tuple(decode.BYTES_PER_WEIGHT)
SHAPES = [(1, 1), (3, 17), (1, 11008), (9, 896), (2, 4864), (70, 64)]
TWO_FOUR = ("six_bit", "triples")


def check(
    form: str, tokens: int, out: int, width: int, dtype: torch.dtype = torch.float32, splits: int | None = None
) -> None:
    x_q, s_x, codes, gamma, bias = operands(tokens, out, width, two_four=form in TWO_FOUR)
    weight = decode.pack_weight(codes, form)
    added = None if tokens == 3 else bias.to(dtype)
    y = decode.decode_linear(x_q, s_x, weight, gamma, added, dtype, splits=splits)
    assert_same_bits(y, reference.ternary_linear(x_q, s_x, codes, gamma, added, dtype))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", kernel_cases([0, 1, 3, 8, 9, 17], [0, 1, 3, 9]))
def test_token_counts(form: str, tokens: int) -> None:
    check(form, tokens, 10, 100)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("out", "width"), kernel_cases(SHAPES, SHAPES[:3], several=True))
def test_awkward_shapes(form: str, out: int, width: int) -> None:
    check(form, 1, out, width, torch.bfloat16)
    if width < 4000:
        check(form, 16, out, width, torch.float16)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("splits", kernel_cases([2, 3], [3]))
def test_splits_change_nothing(form: str, splits: int) -> None:
    check(form, 2, 11, 500, splits=splits)
    check(form, 16, 11, 500, splits=splits)


@pytest.mark.parametrize("form", FORMATS)
def test_extremes_do_not_overflow(form: str) -> None:
    """131072 columns of -128 times codes of one sign: 64 times the largest accumulator there is."""
    width = reference.MAX_REDUCTION
    codes = -torch.ones(1, width, dtype=torch.int8, device=DEVICE)
    if form in ("six_bit", "triples"):
        codes.view(1, -1, 4)[..., 1:3] = 0
    x_q = torch.full((1, width), -128, dtype=torch.int8, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    y = decode.decode_linear(x_q, one, decode.pack_weight(codes, form), one)
    assert y.item() == int(codes.ne(0).sum()) * 128


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [4, 16])
def test_every_value_of_a_unit(form: str, tokens: int) -> None:
    """Rows hold every byte of trits, every pattern of a group; 1, 3, 9, 27, 81 add up to a different sum for each."""
    if form in ("two_bit", "trits"):
        codes = torch.tensor(list(itertools.product((-1, 0, 1), repeat=5)), dtype=torch.int8, device=DEVICE)
        codes = torch.cat([codes, codes.roll(1, 0), codes.roll(7, 0), codes.roll(100, 0)], dim=1)
        codes = codes[:: 1 if tokens == 16 else 6]
    else:
        codes = torch.tensor(TWO_FOUR_GROUPS, dtype=torch.int8, device=DEVICE)
        codes = torch.cat([codes.roll(k, 0) for k in (0, 1, 5, 9, 17)], dim=1)
    probe = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int8, device=DEVICE)
    x_q = torch.zeros(tokens, codes.shape[1], dtype=torch.int8, device=DEVICE)
    for token in range(4):
        x_q[token, 5 * token : 5 * token + 5] = probe
    ones, gamma = torch.ones(tokens, device=DEVICE), torch.ones(codes.shape[0], device=DEVICE)
    y = decode.decode_linear(x_q, ones, decode.pack_weight(codes, form), gamma)
    assert_same_bits(y, x_q.float() @ codes.t().float())


def test_division_by_33_is_exact() -> None:
    """Words over the whole range, and every last one below and first one at a multiple of 33 squared."""
    step = torch.arange(0, 33**3, 33**2)
    words = torch.cat([torch.arange(0, 33**3, 97), step, step + 33**2 - 1])
    halves = torch.stack([words & 255, words >> 8], dim=-1).to(torch.uint8)
    codes = trits.unpack_triples(halves, 12).to(DEVICE)
    x_q = torch.tensor([[1, 3, 9, 27, 81, 1, 3, 9, 27, 81, 1, 3]], dtype=torch.int8, device=DEVICE)
    x_q = torch.cat([x_q.roll(k, 1) for k in range(9)])
    gamma = torch.ones(codes.shape[0], device=DEVICE)
    y = decode.decode_linear(x_q, torch.ones(9, device=DEVICE), decode.pack_weight(codes, "triples"), gamma)
    assert_same_bits(y, x_q.float() @ codes.t().float())


def test_bytes_a_weight() -> None:
    for form, limit in decode.BYTES_PER_WEIGHT.items():
        codes = two_four_codes(2, 960)
        exact = {"two_bit": 1 / 4, "trits": 1 / 5, "six_bit": 3 / 16 * 1024 / 960, "triples": 1 / 6}[form]
        assert decode.pack_weight(codes, form).bytes_per_weight == pytest.approx(exact)
        wide = decode.pack_weight(two_four_codes(1, 11008), form).bytes_per_weight
        assert limit <= wide <= 1.01 * limit


def test_a_bad_token_spoils_itself_only() -> None:
    x_q, s_x, codes, gamma, _ = operands(3, 5, 64)
    s_x[1] = torch.nan
    y = decode.decode_linear(x_q, s_x, decode.pack_weight(codes, "two_bit"), gamma)
    assert y.isnan().all(dim=1).tolist() == [False, True, False]


def test_what_does_not_fit_is_refused() -> None:
    x_q, s_x, codes, gamma, bias = operands(2, 4, 64, two_four=True)
    weight = decode.pack_weight(codes, "six_bit")
    with pytest.raises(ValueError, match="format 'eight_bit' is not one of"):
        decode.pack_weight(codes, "eight_bit")
    with pytest.raises(ValueError, match="more than 2 non-zeros"):
        decode.pack_weight(torch.ones_like(codes), "triples")
    with pytest.raises(ValueError, match=r"codes must be \[out, in\]"):
        decode.pack_weight(codes[0], "two_bit")
    bad = (
        ((x_q.float(), s_x, weight, gamma), "x_q must be int8"),
        ((x_q[:, :32], s_x, weight, gamma), "x_q must be int8"),
        ((x_q.repeat(17, 1), s_x.repeat(17), weight, gamma), "34 tokens"),
        ((x_q, s_x[:1], weight, gamma), "s_x must be fp32"),
        ((x_q, s_x, weight, gamma[:1]), "gamma_per_row must be fp32"),
        ((x_q, s_x, weight, gamma, bias[:1]), "bias must be"),
    )
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            decode.decode_linear(*arguments)
