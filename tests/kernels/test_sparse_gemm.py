"""The sparse GEMM: its formulas and its order of operations around an emulated instruction; on a GPU, itself."""

import itertools

import pytest
import torch
from cases import kernel_cases
from mma_sp import mma_sp
from operands import operands
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.formats import two_four
from sbn_kernels.gpu.gemm import sparse_gemm

SHAPES = [(1, 1, 16), (17, 40, 64), (25, 33, 80), (3, 16, 896), (50, 70, 144)]


def emulated(
    x_q: torch.Tensor, s_x: torch.Tensor, weight: two_four.TwoFourWeight, gamma: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """What `sparse_gemm_kernel` does, block by block, with its own formulas; only the instruction is emulated."""
    block_m, block_n = 2, 3  # tiles of 16 features and of 8 tokens in a block
    tiles, steps = weight.values.shape[:2]
    tokens, row_words = x_q.shape[0], x_q.shape[1] // 4
    W, E, X = weight.values.flatten(), weight.metadata.flatten(), x_q.view(torch.int32).flatten()
    im, jn, il, iv = torch.arange(block_m), torch.arange(block_n), torch.arange(32), torch.arange(4)
    im, jn, il = im[:, None, None, None], jn[None, :, None, None], il[None, None, :, None]
    y = torch.full((tokens, weight.out_features), torch.nan)
    for first_tile, first_token in itertools.product(range(0, tiles, block_m), range(0, tokens, 8 * block_n)):
        tile = (first_tile + im).clamp(max=tiles - 1)
        token = (first_token + sparse_gemm.token_of.fn(jn, il)).clamp(max=tokens - 1)
        acc = torch.zeros(block_m, block_n, 32, 4, dtype=torch.int32)
        for step in range(steps):
            a = W[sparse_gemm.weight_offset.fn(tile, step, steps, il, iv)]
            e = E[sparse_gemm.metadata_offset.fn(tile, step, steps, il)].squeeze(-1)
            b = X[token * row_words + sparse_gemm.word_of.fn(step, il).clamp(max=row_words - 4) + iv]
            acc = mma_sp(a, b, acc, e)
        result = sparse_gemm.rows_of_result.fn(acc, block_m, block_n)
        rows = slice(first_token, min(first_token + 8 * block_n, tokens))
        columns = slice(first_tile * 16, min((first_tile + block_m) * 16, weight.out_features))
        inside = result[: rows.stop - rows.start, : columns.stop - columns.start].float()
        inside = sparse_gemm.scaled.fn(inside, s_x[rows, None], gamma[None, columns])
        y[rows, columns] = inside if bias is None else inside + bias[columns]
    return y


@pytest.mark.parametrize(("tokens", "out", "width"), kernel_cases(SHAPES, SHAPES[:3], several=True))
def test_formulas_and_order_give_the_layer(tokens: int, out: int, width: int) -> None:
    x_q, s_x, codes, gamma, bias = operands(tokens, out, width, two_four=True, device="cpu")
    weight = two_four.pack_two_four(codes)
    for added in (None, bias):
        expected = reference.ternary_linear(x_q, s_x, codes, gamma, added)
        assert_same_bits(emulated(x_q, s_x, weight, gamma, added), expected)


def test_operands_of_the_instruction_are_numbered() -> None:
    """17 inputs and 4 outputs, the metadata once: pack=4 hands over four copies of it, one per accumulator."""
    text = sparse_gemm.MMA_SP.value
    d, a, b, c = ([int(word.strip(" $")) for word in part.split("}")[0].split(",")] for part in text.split("{")[1:])
    assert d + a + b + c == list(range(16))
    assert text.endswith("$16, 0x0;")


def test_what_does_not_fit_is_refused() -> None:
    x_q, s_x, codes, gamma, bias = operands(2, 16, 64, two_four=True, device="cpu")
    weight = two_four.pack_two_four(codes)
    narrow = two_four.pack_two_four(codes[:, :20])
    bad = (
        ((x_q.float(), s_x, weight, gamma), "x_q must be contiguous int8"),
        ((x_q[:, :32], s_x, weight, gamma), "x_q must be contiguous int8"),
        ((x_q[:, :20].contiguous(), s_x, narrow, gamma), "multiple of 16"),
        ((x_q, s_x[:1], weight, gamma), "s_x must be fp32"),
        ((x_q, s_x, weight, gamma[:1]), "gamma_per_row must be fp32"),
        ((x_q, s_x, weight, gamma, bias[:1]), "bias must be"),
        ((x_q, s_x, weight, gamma, bias, torch.int32), "out_dtype must be"),
        ((x_q, s_x, weight, gamma), "CUDA devices only"),
    )
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            sparse_gemm.sparse_linear(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "out", "width"), [(1, 1, 16), (300, 300, 896), (17, 896, 4864), (129, 2048, 11008)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(tokens: int, out: int, width: int, dtype: torch.dtype) -> None:
    x_q, s_x, codes, gamma, bias = operands(tokens, out, width, two_four=True)
    weight = two_four.pack_two_four_fast(codes)
    for added in (None, bias):
        y = sparse_gemm.sparse_linear(x_q, s_x, weight, gamma, added, dtype)
        assert_same_bits(y, reference.ternary_linear(x_q, s_x, codes, gamma, added, dtype))
