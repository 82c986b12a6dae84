"""A processor of Hopper for Gluon kernels' own Python source: copies, barriers and wgmma that come when they may.

One thread of control stands for the block: what its threads do to each other is not emulated. Copies and wgmma
take effect either at once or at the last moment that the waits allow, so that a slot that is read before its copy was
waited for, or overwritten while a wgmma still reads it, changes the result.
"""

from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sbn_kernels.gpu.primitives import tiles


class DeadlockError(Exception):
    """A wait for something that never comes."""


@dataclass
class Pointer:
    """Where elements of a tensor in global memory are; `writes` counts stores to each of them."""

    memory: torch.Tensor
    offset: Any = 0
    writes: torch.Tensor | None = None

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + offset, self.writes)


@dataclass
class Descriptor:
    """A matrix that copies take blocks of."""

    matrix: torch.Tensor
    block: list[int]
    layout: str = "operand"

    def read(self, row: int, column: int) -> torch.Tensor:
        """A block, zeros beyond the matrix's ends."""
        out = torch.zeros(self.block, dtype=self.matrix.dtype)
        part = self.matrix[row : row + self.block[0], column : column + self.block[1]]
        out[: part.shape[0], : part.shape[1]] = part
        return out


@dataclass
class Shared:
    """A view of shared memory."""

    view: torch.Tensor

    def index(self, slot: int) -> "Shared":
        return Shared(self.view[slot])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.view.permute(order))


@dataclass
class Barrier:
    """An mbarrier of one arrival, with the bytes that its phase still expects."""

    phases: int = 0
    arrived: bool = False
    missing: int = 0
    late: list[tuple[Shared, torch.Tensor]] = field(default_factory=list)

    def advance(self) -> None:
        if self.arrived and self.missing == 0:
            self.phases, self.arrived = self.phases + 1, False


@dataclass
class Sums:
    """An accumulator in registers, and how many wgmma are still adding to it."""

    value: torch.Tensor


class Machine:
    """One block of threads; `eager_copies` and `eager_products` say when these take effect."""

    def __init__(self, program: int, programs: int, *, eager_copies: bool, eager_products: bool) -> None:
        self.program, self.programs = program, programs
        self.eager_copies, self.eager_products = eager_copies, eager_products
        self.in_flight: list[tuple[Sums, torch.Tensor, torch.Tensor]] = []

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: str) -> Any:
        if layout == "barriers":
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=barriers.__getitem__)
        return Shared(torch.full(shape, 99, dtype=dtype))

    def expect(self, barrier: Barrier, amount: int, *, pred: bool) -> None:
        if pred:
            assert not barrier.arrived, "a phase was begun before the one before it was over"
            barrier.arrived, barrier.missing = True, barrier.missing + amount

    def copy(self, source: Descriptor, at: list[int], barrier: Barrier, target: Shared, *, pred: bool) -> None:
        if pred:
            barrier.late.append((target, source.read(*at)))
            if self.eager_copies:
                self.land(barrier)

    def land(self, barrier: Barrier) -> None:
        for target, block in barrier.late:
            target.view.copy_(block)
            barrier.missing -= block.numel()
        barrier.late.clear()
        barrier.advance()

    def wait(self, barrier: Barrier, parity: int) -> None:
        if barrier.phases % 2 == parity:
            self.land(barrier)
        if barrier.phases % 2 == parity:
            raise DeadlockError

    def multiply(self, a: Shared, b: Shared, acc: Sums | torch.Tensor, *, is_async: bool) -> Sums:
        assert is_async
        sums = acc if isinstance(acc, Sums) else Sums(acc.clone())
        read = (a.view.clone(), b.view.clone()) if self.eager_products else (a.view, b.view)
        self.in_flight.append((sums, *read))
        return sums

    def wait_products(self, num_outstanding: int, deps: list[Sums]) -> Sums | torch.Tensor:
        while len(self.in_flight) > num_outstanding:
            sums, a, b = self.in_flight.pop(0)
            sums.value += (a.double() @ b.double()).to(torch.int32)
        return deps[0] if self.in_flight else deps[0].value

    def language(self) -> SimpleNamespace:
        """What stands for `gl` in a kernel."""
        return SimpleNamespace(
            int8=torch.int8,
            int32=torch.int32,
            int64=torch.int64,
            float32=torch.float32,
            cdiv=lambda a, b: -(-a // b),
            minimum=min,
            to_tensor=lambda value: value,
            static_range=range,
            program_id=lambda _: self.program,
            num_programs=lambda _: self.programs,
            allocate_shared_memory=self.allocate,
            SliceLayout=lambda *_: None,
            arange=lambda first, last, _: torch.arange(first, last),
            zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype),
            split=lambda t: t.unbind(-1),
            convert_layout=lambda t, _: t,
            load=_load,
            store=_store,
        )

    def install(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, functions: list[str]) -> None:
        """Put the machine in the place of a kernel module's instructions, and the source of its functions in theirs."""
        barriers = SimpleNamespace(
            MBarrierLayout=lambda: "barriers", init=lambda barrier, count: None, expect=self.expect, wait=self.wait
        )
        replaced = {"gl": self.language(), "mbarrier": barriers, "start_copy": self.copy}
        replaced |= {"warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.wait_products}
        replaced |= {"fence_async_shared": lambda: None, "grouped_tile": tiles.grouped_tile.fn}
        replaced |= {name: getattr(module, name).fn for name in functions}
        for name, value in replaced.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(tiles, "tl", SimpleNamespace(minimum=min))


def _load(pointer: Pointer, mask: torch.Tensor, other: float) -> torch.Tensor:
    values = pointer.memory[torch.where(mask, pointer.offset, 0)]
    return torch.where(mask, values, torch.tensor(other, dtype=values.dtype))


def _store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
    at = pointer.offset[mask]
    pointer.memory.view(-1)[at] = value[mask]
    if pointer.writes is not None:
        pointer.writes.view(-1).index_add_(0, at, torch.ones_like(at))
