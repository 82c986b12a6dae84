"""What can go wrong for a user, and the exit status that a shell script sees for it.

| status | meaning |
|---|---|
| 0 | done |
| 1 | anything else |
| 2 | bad recipe or input |
| 3 | numerical failure (NaN or Inf) |
| 4 | no valid checkpoint |
| 75 | stopped when asked to (SIGTERM, SIGUSR1, Ctrl-C, hang-up, STOP file), what was done is saved: start it again |
| 128 + n | ended by signal n, or by a second one or the deadline after the first: nothing was saved at that moment |

Every message is one line that names the field or file, the value, and the way out. What people and files say may be
part of it, so it is shown without secrets and control characters, and not at any length (redaction.py).
"""

from megatron_sbn.redaction import one_line

STOPPED = 75  # EX_TEMPFAIL of sysexits.h


class SbnError(Exception):
    """A failure that the user can act on; `cli.main` prints its message and exits with `status`."""

    status: int = 1
    on_every_rank: bool = False  # whether all ranks see it, so that one may speak for all

    def __str__(self) -> str:
        """The message, fit to be shown."""
        return one_line(super().__str__())


class RecipeError(SbnError):
    """A recipe that cannot be trained: unknown key, wrong type, impossible combination."""

    status = 2
    on_every_rank = True


class InputError(SbnError):
    """An input file that cannot be used: text, token shard, tokenizer model."""

    status = 2


class NumericalError(SbnError):
    """NaN or Inf in the loss, the gradients or the weights."""

    status = 3
    on_every_rank = True


class CheckpointError(SbnError):
    """No valid checkpoint where one is needed."""

    status = 4


class StopRequestedError(SbnError):
    """Asked to stop before the first step: nothing was begun, so there is nothing to save. `reason`: the signal."""

    status = STOPPED

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: stopped before the first step, with nothing to save")
        self.reason = reason


class RankLostError(SbnError):
    """Another rank is gone, or does not answer."""


class DeliveryError(SbnError):
    """MLflow cannot be reached, or refuses; the run folder has everything and can be delivered later."""
