"""What the machine can do, measured in the same run as everything else: what shares are shares of.

copy   bytes a second, read and written, of a copy larger than any cache
bf16, fp32   operations a second of PyTorch's largest convenient square GEMM (no TF32)
int_mm   the same of `torch._int_mm`
int8     twice bf16: what int8 matrix instructions are worth on every GPU that has them
"""

from collections.abc import Iterator
from functools import partial

import torch
from harness import Benchmark, Call, Case, Contender, Inputs, cache_bytes
from torch import Tensor

CEILINGS = ("copy", "bf16", "fp32", "int_mm", "int8")
"""Names that a case's `ceiling` may take."""

_SIDE = 8192
_CPU_SIDE = 768
_CHECKED = 8


def _copy(device: torch.device) -> Benchmark:
    size = max(4 * cache_bytes(device), 1 << 26)

    def prepare(inputs: Inputs) -> Call:
        target = torch.empty_like(inputs["a"])
        return lambda: target.copy_(inputs["a"])

    contender = Contender("torch", prepare, lambda inputs: (inputs["a"],), ours=True)
    case = Case("ceilings", "copy", 0, 0, size, "", "int8", 2 * size, 0, "copy")
    return Benchmark(case, lambda: {"a": torch.ones(size, dtype=torch.int8, device=device)}, (contender,))


def _operands(side: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device=device).manual_seed(0)
    if dtype == torch.int8:
        make = partial(torch.randint, -127, 128, (side, side), dtype=dtype, device=device, generator=generator)
        return {"a": make(), "b": make()}
    return {name: torch.randn(side, side, device=device, generator=generator).to(dtype) for name in ("a", "b")}


def _first_rows(inputs: Inputs) -> tuple[Tensor]:
    return (inputs["a"][:_CHECKED].double() @ inputs["b"].double().t(),)


def _product(name: str, dtype: torch.dtype, device: torch.device) -> Benchmark:
    side = _SIDE if device.type == "cuda" else _CPU_SIDE

    def prepare(inputs: Inputs) -> Call:
        a, b = inputs["a"], inputs["b"].t()
        return (lambda: torch._int_mm(a, b)) if dtype == torch.int8 else (lambda: a @ b)

    contender = Contender("torch", prepare, _first_rows, tolerance=0.01, ours=True)
    bytes_moved = side * side * (2 * dtype.itemsize + (4 if dtype == torch.int8 else dtype.itemsize))
    case = Case(
        "ceilings", name, side, side, side, "", str(dtype).removeprefix("torch."), bytes_moved, 2 * side**3, name
    )
    return Benchmark(case, lambda: _operands(side, dtype, device), (contender,), 1.0)


def benchmarks(device: torch.device) -> Iterator[Benchmark]:
    """The measurements that the ceilings come from; layer is the name of the ceiling."""
    yield _copy(device)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("int_mm", torch.int8)):
        yield _product(name, dtype, device)
