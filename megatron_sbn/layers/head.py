"""The language-model head, with the loss where labels are given."""

from torch import Tensor

from megatron_sbn.layers.collectives import ColumnParallelCollectives
from megatron_sbn.layers.linear import IGNORED_IN_FORWARD, ColumnParallelLinear, check_ignored
from megatron_sbn.layers.loss import linear_cross_entropy


class HeadLinear(ColumnParallelLinear):
    """The language-model head: column-parallel, always dense; a tied head is given the embedding's weight."""

    def forward(  # type: ignore[override]
        self, x: Tensor, weight: Tensor | None = None, *, labels: Tensor | None = None, **ignored: object
    ) -> tuple[Tensor, Tensor | None]:
        """(logits, None) of x [tokens, batch, hidden]; with labels [tokens, batch], (loss of every token, None)."""
        check_ignored(ignored, IGNORED_IN_FORWARD)
        if labels is None:
            return super().forward(x, weight)
        used = self.weight if weight is None else weight
        assert isinstance(self.layout, ColumnParallelCollectives)
        losses = linear_cross_entropy(x, used, labels, group=self.layout.group, layout=self.layout)
        return losses.view(labels.shape), None
