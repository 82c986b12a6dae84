"""Bad steps: a loss or a gradient norm that is not finite, or far above those of the last steps.

    loss spike       loss > median of the window + training.spike_loss           (nats)
    norm spike       norm > median of the window * training.spike_grad_norm

The window is the last `training.spike_window` accepted steps; there are no spikes before it is full. It is part of a
checkpoint, and loss and norm are the same on every rank: so are the judgements, in a resumed run too.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence

from megatron_sbn.config import Training
from megatron_sbn.errors import NumericalError


class BadStepError(NumericalError):
    """A step that was refused, on every rank: nothing is updated, and the gradients are dropped. `why` in short."""

    def __init__(self, step: int, why: str) -> None:
        self.why = why
        super().__init__(
            f"step {step}: {why}; the checkpoints are as they were: resume from the last one, with a lower "
            "optimizer.lr or other data, or let training.on_bad_step skip such steps"
        )


class SpikeDetector:
    """Says what is wrong with a loss or a gradient norm; nothing, where nothing is."""

    def __init__(self, settings: Training) -> None:
        self._settings = settings
        self.losses: deque[float] = deque(maxlen=settings.spike_window)
        self.norms: deque[float] = deque(maxlen=settings.spike_window)

    def loss(self, value: float) -> str:
        """What is wrong with a loss."""
        if not math.isfinite(value):
            return f"loss is {value}"
        allowed = self._settings.spike_loss
        if allowed is None or len(self.losses) < self._settings.spike_window:
            return ""
        usual = statistics.median(self.losses)
        if value <= usual + allowed:
            return ""
        return f"loss is {value:.4f}, {value - usual:.4f} over the {usual:.4f} of the last {len(self.losses)} steps"

    def norm(self, value: float) -> str:
        """What is wrong with a gradient norm."""
        if not math.isfinite(value):
            return f"gradient norm is {value}"
        allowed = self._settings.spike_grad_norm
        if allowed is None or len(self.norms) < self._settings.spike_window:
            return ""
        usual = statistics.median(self.norms)
        if value <= usual * allowed:
            return ""
        return f"gradient norm is {value:.4g}, where the last {len(self.norms)} steps had {usual:.4g}"

    def accept(self, loss: float, norm: float) -> None:
        """Takes the figures of a step that was made."""
        self.losses.append(loss)
        self.norms.append(norm)

    def recall(self, losses: Sequence[float], norms: Sequence[float]) -> None:
        """Takes back the window of a checkpoint."""
        self.losses = deque(losses, maxlen=self._settings.spike_window)
        self.norms = deque(norms, maxlen=self._settings.spike_window)
