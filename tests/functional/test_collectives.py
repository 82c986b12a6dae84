"""Every hook of LocalCollectives, with the other ranks played by this process: shards have the bits of the whole."""

import pytest
import sbn_kernels as kernels
import torch
from same_bits import assert_same_bits, relative
from sbn_kernels import reference
from torch import Tensor

from megatron_sbn.functional import LinearSettings, PreparedWeight, apply_linear, prepare_weight
from megatron_sbn.functional.collectives import LocalCollectives

TOKENS, WIDTH, OUT = 8, 64, 24


class Recorded(LocalCollectives):
    """A rank among `ranks`: each hook gives the answer of the collective that it was made with."""

    def __init__(self, **answers: dict[torch.dtype, Tensor] | Tensor | slice | bool) -> None:
        self.answers = answers
        self.splits_input = bool(answers.get("splits_input", False))
        self.calls: list[tuple[str, torch.dtype, tuple[int, ...]]] = []

    def _note(self, name: str, t: Tensor) -> None:
        self.calls.append((name, t.dtype, tuple(t.shape)))

    def token_abs_max(self, a: Tensor) -> Tensor:
        self._note("token_abs_max", a)
        return torch.maximum(a, self.answers["abs_max"]) if "abs_max" in self.answers else a

    def gather_input(self, t: Tensor) -> Tensor:
        self._note("gather_input", t)
        return self.answers["gathered"][t.dtype] if "gathered" in self.answers else t

    def reduce_accumulator(self, acc: Tensor) -> Tensor:
        self._note("reduce_accumulator", acc)
        acc = acc + self.answers["other_acc"] if "other_acc" in self.answers else acc
        return acc[self.answers["keep"]] if "keep" in self.answers else acc

    def local_tokens(self, s_x: Tensor) -> Tensor:
        self._note("local_tokens", s_x)
        return s_x[self.answers["keep"]] if "keep" in self.answers else s_x

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        self._note("gather_grad_output", dy)
        return self.answers.get("grad_output", dy)

    def reduce_grad_input(self, dx: Tensor) -> Tensor:
        self._note("reduce_grad_input", dx)
        dx = dx + self.answers["other_dx"] if "other_dx" in self.answers else dx
        return dx[self.answers["dx_keep"]] if "dx_keep" in self.answers else dx


def call(
    x: Tensor, w: Tensor, gy: Tensor, prepared: PreparedWeight, settings: LinearSettings, layout: LocalCollectives
) -> tuple[Tensor, Tensor, Tensor]:
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    y = apply_linear(x, w, None, prepared, settings, layout)
    y.backward(gy)
    return y.detach(), x.grad, w.grad


def sliced(prepared: PreparedWeight, rows: slice, columns: slice) -> PreparedWeight:
    at = lambda t: None if t is None else t[rows, columns].contiguous()  # noqa: E731
    weight = prepared.ternary
    ternary = None if weight is None else kernels.TernaryWeight(at(weight.codes), weight.gamma_per_row[rows])
    return PreparedWeight(ternary, at(prepared.mask))


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(TOKENS, 2, WIDTH, generator=rng).to(dtype)
    return x, torch.randn(OUT, WIDTH, generator=rng), torch.randn(TOKENS, 2, OUT, generator=rng).to(dtype)


HALVES = (slice(0, 4), slice(4, 8))
EVERYTHING = slice(None)
MODES = pytest.mark.parametrize(
    ("dtype", "variant"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"backward": "int8"}),
        (torch.float32, {"masked_gradient": "masked", "sr_ste_decay": 0.1}),
    ],
    ids=str,
)


@MODES
def test_row_parallel_under_sequence_parallelism(dtype: torch.dtype, variant: dict[str, object]) -> None:
    x, w, gy = problem(dtype)
    settings = LinearSettings(**variant)
    prepared = prepare_weight(w, None, settings)
    y, dx, dw = call(x, w, gy, prepared, settings, LocalCollectives())
    columns = (slice(0, 40), slice(40, 64))
    a = [kernels.activation_abs_max(x[..., c]) for c in columns]
    x_q, _ = kernels.quantize_activations(x)
    accs = [reference.int_matmul(x_q[..., c], prepared.codes[:, c]) for c in columns]
    for rank, (mine, keep) in enumerate(zip(columns, HALVES, strict=True)):
        layout = Recorded(splits_input=True, abs_max=a[1 - rank], other_acc=accs[1 - rank], keep=keep, grad_output=gy)
        shard = sliced(prepared, EVERYTHING, mine)
        results = call(x[..., mine].contiguous(), w[:, mine], gy[keep], shard, settings, layout)
        assert_same_bits(results[0], y[keep])
        torch.testing.assert_close(
            results[1].float(), dx[..., mine].float(), rtol=1e-6, atol=1e-6 * float(dx.abs().max())
        )
        assert relative(results[2], dw[:, mine]) < 2e-6
        assert ("token_abs_max", torch.float32, (TOKENS, 2)) in layout.calls
        assert ("reduce_accumulator", torch.float32, (TOKENS, 2, OUT)) in layout.calls
        assert ("gather_grad_output", dtype, (4, 2, OUT)) in layout.calls


@MODES
def test_column_parallel_under_sequence_parallelism(dtype: torch.dtype, variant: dict[str, object]) -> None:
    x, w, gy = problem(dtype)
    settings = LinearSettings(**variant)
    prepared = prepare_weight(w, [16, 8], settings)
    y, dx, dw = call(x, w, gy, prepared, settings, LocalCollectives())
    rows = (slice(0, 16), slice(16, 24))
    x_q, s_x = kernels.quantize_activations(x)
    shards = [sliced(prepared, r, EVERYTHING) for r in rows]
    partial = [call(x, w[r], gy[..., r], p, settings, LocalCollectives())[1] for r, p in zip(rows, shards, strict=True)]
    gathered = {torch.int8: x_q, torch.float32: s_x}
    for rank, (mine, keep) in enumerate(zip(rows, HALVES, strict=True)):
        layout = Recorded(gathered=gathered, other_dx=partial[1 - rank], dx_keep=keep)
        results = call(x[keep], w[mine], gy[..., mine], shards[rank], settings, layout)
        assert_same_bits(results[0], y[..., mine])
        # dX is added up over ranks in x's dtype, and int8 rounds each rank's rows with their own scale.
        loose = 2**-7 if dtype == torch.bfloat16 or variant.get("backward") else 1e-6
        assert (results[1] - dx[keep]).abs().max() <= 4 * loose * dx.abs().max()
        assert relative(results[2], dw[mine]) < 2e-6
        # Only this rank's tokens are kept, and they are gathered as int8, in forward and again in backward.
        gathers = [call for call in layout.calls if call[0] == "gather_input"]
        once = [("gather_input", torch.int8, (4, 2, WIDTH)), ("gather_input", torch.float32, (4, 2))]
        assert gathers == once * 2


@pytest.mark.parametrize("variant", [{"weight_format": "dense"}, {"activation_bits": None}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_layers_add_partial_sums_in_fp32(dtype: torch.dtype, variant: dict[str, object]) -> None:
    x, w, gy = problem(dtype)
    settings = LinearSettings(**variant)
    prepared = prepare_weight(w, None, settings)
    y, dx, dw = call(x, w, gy, prepared, settings, LocalCollectives())
    ternary = prepared.codes is not None
    effective = prepared.codes * prepared.gamma_per_row.unsqueeze(1) if ternary else w * prepared.mask
    columns = (slice(0, 40), slice(40, 64))
    for rank, (mine, keep) in enumerate(zip(columns, HALVES, strict=True)):
        other = columns[1 - rank]
        other_acc = x[..., other].float() @ effective[:, other].to(dtype).float().t()
        layout = Recorded(splits_input=True, other_acc=other_acc, keep=keep, grad_output=gy)
        shard = sliced(prepared, EVERYTHING, mine)
        results = call(x[..., mine], w[:, mine], gy[keep], shard, settings, layout)
        assert ("reduce_accumulator", torch.float32, (TOKENS, 2, OUT)) in layout.calls
        # One rounding of the whole sum: at most one unit in the last place from the unsplit GEMM.
        torch.testing.assert_close(
            results[0].float(), y[keep].float(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
        torch.testing.assert_close(results[1].float(), dx[..., mine].float(), rtol=2**-7, atol=1e-5)
        torch.testing.assert_close(results[2], dw[:, mine], rtol=1e-5, atol=1e-5)


def test_four_bits_are_refused_for_split_inputs() -> None:
    x, w, _ = problem(torch.float32)
    settings = LinearSettings(activation_bits=4)
    with pytest.raises(ValueError, match="row-parallel layer takes 8"):
        apply_linear(x, w, None, prepare_weight(w, None, settings), settings, Recorded(splits_input=True))
