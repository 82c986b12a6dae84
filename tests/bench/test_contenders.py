"""Every benchmark at a tiny shape: all contenders that run here give the right result, and ours is among them."""

import importlib

import harness
import pytest
import torch
from run import KERNELS
from shapes import Model, Selection

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = Model("tiny", hidden=64, ffn=96, heads=2, kv_heads=1, head_size=32)
NEEDS_CUDA = {"wgmma", "mma_sp", "cusparselt", "sliding_mma_sp", "sliding_cusparselt"}


@pytest.mark.parametrize("name", KERNELS)
def test_contenders_give_the_right_result(name: str) -> None:
    module = importlib.import_module(name)
    device = torch.device(module.DEVICE) if module.DEVICE == "cpu" else DEVICE
    cases = 0
    for benchmark in module.benchmarks(Selection(device, (TINY,), (24,), vocabulary=80)):
        cases += 1
        assert benchmark.case.kernel == name
        assert benchmark.case.bytes_moved > 0
        inputs, references, ours = benchmark.make_inputs(), {}, 0
        for contender in benchmark.contenders:
            try:
                _, _, complaint = harness.check(contender, inputs, references)
            except harness.UnavailableError:
                assert not contender.ours or contender.name in NEEDS_CUDA
                continue
            assert complaint is None, f"{benchmark.case.shape}, {contender.name}: {complaint}"
            ours += contender.ours
        assert ours
    assert cases


def test_decoding_of_one_token() -> None:
    module = importlib.import_module("decode")
    benchmarks = list(module.benchmarks(Selection(DEVICE, (TINY,), (1, 64))))  # 64 are too many, and left out
    assert len(benchmarks) == len(TINY.linears) * len(module.FORMATS)
    for benchmark in benchmarks[:: len(module.FORMATS) + 1]:
        inputs = benchmark.make_inputs()
        for contender in benchmark.contenders:
            assert harness.check(contender, inputs, {})[2] is None, f"{benchmark.case.shape}, {contender.name}"


def test_a_wrong_result_of_a_real_kernel_is_noticed() -> None:
    module = importlib.import_module("cpu_weights")
    benchmark = next(module.benchmarks(Selection(torch.device("cpu"), (TINY,))))
    inputs = benchmark.make_inputs()
    other = {**inputs, "gamma": inputs["gamma"] * 1.5}
    contender = benchmark.contenders[0]
    assert harness.difference(contender.prepare(other)(), contender.expected(inputs), 0.0) is not None
