"""Everything that Megatron-Core and DeepSpeed need to run without CUDA, and nothing else. Unused where there is a GPU.

Megatron-Core asks for `torch.cuda.current_device()`, keeps CUDA random-number states, makes a few tensors with
`device="cuda"` and moves a tied embedding with `.cuda()`. `without_cuda()` answers those calls with the CPU's device,
generator and tensors for as long as the context lasts, and puts everything back afterwards.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _TensorsOnCpu(TorchFunctionMode):
    """Factory calls with device="cuda" give a CPU tensor, and `t.cuda()` gives t."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's own protocol
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - torch's own protocol
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs and kwargs["device"] is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs = kwargs | {"device": CPU}
        return func(*args, **kwargs)


def _get_rng_state(*_args: object, **_kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_args: object, **_kwargs: object) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def _synchronize(*_args: object, **_kwargs: object) -> None:
    return None


def _set_device(*_args: object, **_kwargs: object) -> None:
    return None


def _current_device() -> torch.device:
    return CPU


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """Answers CUDA calls with the CPU for as long as it lasts; does nothing on a machine with CUDA."""
    if torch.cuda.is_available():
        yield
        return
    # One function for each: torch.compile keeps a table of torch's functions and refuses two names for one object.
    replacements: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (torch.cuda, "current_device", _current_device),
        (torch.cuda, "synchronize", _synchronize),
        (torch.cuda, "set_device", _set_device),
        (torch.cuda, "get_rng_state", _get_rng_state),
        (torch.cuda, "set_rng_state", _set_rng_state),
        (torch.cuda, "manual_seed", _manual_seed),
        (megatron_random, "_get_cuda_rng_state", _get_rng_state),
        (megatron_random, "_set_cuda_rng_state", _set_rng_state),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in replacements:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(_TensorsOnCpu())
        yield
