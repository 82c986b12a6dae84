"""without_cuda: answers for as long as it lasts, and everything as it was afterwards."""

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from megatron_sbn.parallel.cuda_shim import without_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="does nothing where there is CUDA")
REPLACED = [
    (torch.cuda, name)
    for name in ("current_device", "synchronize", "set_device", "get_rng_state", "set_rng_state", "manual_seed")
] + [(megatron_random, "_get_cuda_rng_state"), (megatron_random, "_set_cuda_rng_state")]


def test_cuda_is_the_cpu_inside() -> None:
    with without_cuda():
        assert torch.cuda.current_device() == torch.device("cpu")
        torch.cuda.set_device(3)
        torch.cuda.synchronize()
        for tensor in (
            torch.zeros(3, device="cuda"),
            torch.empty(2, device=torch.device("cuda", 1)),
            torch.tensor([1.0], device="cuda:0"),
            torch.ones(2).to(device="cuda"),
            torch.ones(2).cuda(),
            torch.ones(2).cuda(non_blocking=True),
            torch.arange(3, device=None),
        ):
            assert tensor.device.type == "cpu"
        parameter = torch.nn.Parameter(torch.ones(2))
        assert parameter.data.cuda().data_ptr() == parameter.data_ptr()


def test_random_states_are_the_cpus() -> None:
    with without_cuda():
        torch.cuda.manual_seed(7)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        megatron_random._set_cuda_rng_state(state)
        assert torch.equal(torch.rand(3), first)
        assert torch.equal(megatron_random._get_cuda_rng_state(), torch.get_rng_state())


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was_afterwards(fails: bool) -> None:
    before = [getattr(owner, name) for owner, name in REPLACED]
    try:
        with without_cuda():
            during = [getattr(owner, name) for owner, name in REPLACED]
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert [getattr(owner, name) for owner, name in REPLACED] == before
    assert all(a is not b for a, b in zip(before, during, strict=True))
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()
