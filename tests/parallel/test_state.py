"""ParallelState without a launcher, and over the grid of ranks."""

import pytest
import torch

from megatron_sbn.errors import RecipeError
from megatron_sbn.launch import environment
from megatron_sbn.parallel import state


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_is_a_world(no_launcher: pytest.MonkeyPatch) -> None:
    assert (environment.rank(), environment.world_size(), environment.local_rank()) == (0, 1, 0)


def test_torchruns_variables_come_first(no_launcher: pytest.MonkeyPatch) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    for name, value in step.items():
        no_launcher.setenv(name, value)
    assert (environment.rank(), environment.world_size(), environment.local_rank()) == (5, 8, 1)
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3")):
        no_launcher.setenv(name, value)
    assert (environment.rank(), environment.world_size(), environment.local_rank()) == (2, 4, 3)


def test_a_batch_shell_of_slurm_is_no_job_step(no_launcher: pytest.MonkeyPatch) -> None:
    """sbatch sets SLURM_NTASKS and SLURM_PROCID in the batch script too, where there is one process."""
    no_launcher.setenv("SLURM_NTASKS", "8")
    no_launcher.setenv("SLURM_PROCID", "0")
    assert environment.world_size() == 1


def test_a_variable_that_is_no_number_is_named(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("RANK", "first")
    with pytest.raises(RecipeError, match="environment variable RANK = 'first' is not a number; unset it"):
        environment.rank()


@pytest.mark.parametrize(
    ("gpus", "local_rank", "wanted", "expected"),
    [
        (0, 0, "auto", "cpu"),
        (0, 5, "cpu", "cpu"),
        (0, 0, "cuda", "device = cuda: PyTorch finds no GPU here"),
        (2, 1, "auto", "cuda:1"),
        (2, 2, "auto", "local rank 2 has no GPU: this machine shows 2; start at most 2 ranks on it"),
    ],
)
def test_a_rank_without_the_device_that_it_wants_is_one_line(
    gpus: int, local_rank: int, wanted: str, expected: str, no_launcher: pytest.MonkeyPatch
) -> None:
    no_launcher.setenv("LOCAL_RANK", str(local_rank))
    no_launcher.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    no_launcher.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    no_launcher.setattr(torch.cuda, "device_count", lambda: gpus)
    no_launcher.setattr(torch.cuda, "set_device", lambda device: None)
    if ":" in expected.replace("cuda:1", ""):
        with pytest.raises(RecipeError, match=expected):
            state._local_device(wanted)
    else:
        assert str(state._local_device(wanted)) == expected
