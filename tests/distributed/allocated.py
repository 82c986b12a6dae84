"""What a rank really holds: storages of its tensors, each once, and of what autograd keeps between its passes."""

import gc
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor


def nbytes(tensors: Iterable[Tensor], seen: set[int] | None = None) -> int:
    """Bytes of the storages behind the tensors; those in `seen` are not counted, and all counted are added to it."""
    seen = set() if seen is None else seen
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def everything_else(seen: set[int]) -> int:
    """Bytes of all other tensors of this process that Python knows."""
    gc.collect()
    tensors = [known for known in gc.get_objects() if type(known) in (Tensor, torch.nn.Parameter)]
    return nbytes([tensor for tensor in tensors if tensor.device.type == "cpu"], seen)


class Saved:
    """Counts storages that autograd keeps, for as long as the context lasts; `ignored` are addresses of weights.

    Attributes:
        peak: the most bytes at once.
    """

    def __init__(self, ignored: set[int]) -> None:
        self.ignored = ignored
        self.peak = 0
        self._now = 0
        self._users: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(self, t.detach()), lambda kept: kept.t)

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()

    def change(self, tensor: Tensor, users: int) -> None:
        """One node more, or less, keeps the tensor."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if not storage.nbytes() or address in self.ignored:
            return
        before = self._users[address]
        self._users[address] += users
        if not before or not self._users[address]:
            self._now += storage.nbytes() * users
            self.peak = max(self.peak, self._now)


class _Kept:
    """One tensor kept by one node of the graph."""

    def __init__(self, saved: Saved, t: Tensor) -> None:
        self.saved, self.t = saved, t
        saved.change(t, 1)

    def __del__(self) -> None:
        self.saved.change(self.t, -1)
