"""What the ranks of a pipeline stage hold: parameters and linear layers, as numbers of elements.

All ranks of one stage hold the same numbers. Rows or columns of attention and MLP projections, and the rows of
embedding and head, are sharded over the tensor-parallel group; norms, biases of row-parallel layers and routers are
not; an expert is whole on its rank.
"""

from dataclasses import dataclass

from megatron_sbn.config import Recipe


@dataclass(frozen=True)
class Linear:
    """One Sparse-BitNet layer of a rank.

    Attributes:
        rows, columns: out and in of this rank's weight.
        column: whether it is column-parallel (reads whole tokens); else it is row-parallel.
        parts: logical matrices with a scale each.
        sharded: whether other tensor-parallel ranks hold more of it.
        bias: elements of its bias on this rank.
        count: how many of its kind a layer has on this rank: one for each expert.
    """

    name: str
    rows: int
    columns: int
    column: bool
    parts: int
    sharded: bool
    bias: int
    count: int = 1

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Layout:
    """How `world` ranks are arranged, and what each replica does in a step."""

    recipe: Recipe
    world: int

    @property
    def tensor(self) -> int:
        """Tensor-parallel ranks."""
        return self.recipe.parallel.tensor

    @property
    def pipeline(self) -> int:
        """Pipeline stages."""
        return self.recipe.parallel.pipeline

    @property
    def chunks(self) -> int:
        """Model chunks of a pipeline rank."""
        return self.recipe.parallel.virtual_pipeline or 1

    @property
    def data(self) -> int:
        """Data-parallel replicas."""
        return self.world // (self.tensor * self.pipeline)

    @property
    def expert(self) -> int:
        """Ranks over which the experts of a layer are spread."""
        return self.recipe.parallel.expert

    @property
    def expert_data(self) -> int:
        """Replicas of an expert."""
        return self.tensor * self.data // self.expert

    @property
    def sequence(self) -> bool:
        """Whether tokens between the linear layers are sharded over the tensor-parallel group."""
        return self.recipe.parallel.sequence and self.tensor > 1

    @property
    def micro_batches(self) -> int:
        """Of a replica in a step."""
        training = self.recipe.training
        return training.global_batch_size // (training.micro_batch_size * self.data)

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.recipe.training.micro_batch_size * self.recipe.model.seq_length

    @property
    def own_tokens(self) -> int:
        """Of a micro-batch, between linear layers, on one rank."""
        return self.tokens // self.tensor if self.sequence else self.tokens

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.recipe.model.bf16 else 4

    def layers(self, stage: int) -> int:
        """Transformer layers of a pipeline stage, over all its chunks."""
        parallel, total = self.recipe.parallel, self.recipe.model.num_layers
        first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
        if stage == 0 and first is not None:
            return first
        if stage == self.pipeline - 1 and last is not None:
            return last
        given = [count for count in (first, last) if count is not None]
        return (total - sum(given)) // (self.pipeline - len(given))

    @property
    def local_experts(self) -> int:
        """Experts of a layer on one rank; 0 without a mixture."""
        return (self.recipe.model.num_moe_experts or 0) // self.expert

    def linears(self) -> list[Linear]:
        """The Sparse-BitNet layers of one transformer layer on one rank: QKV, projection, and the two of an MLP."""
        model, shards = self.recipe.model, self.tensor
        attention, keys = model.num_attention_heads * model.head_dim, 2 * model.query_groups * model.head_dim
        hidden, width, bias = model.hidden_size, model.mlp_width, model.add_bias_linear
        qkv = (attention + keys) // shards
        attention_layers = [
            Linear("linear_qkv", qkv, hidden, True, 3, shards > 1, qkv * (bias or model.add_qkv_bias)),
            Linear("linear_proj", hidden, attention // shards, False, 1, shards > 1, hidden * bias),
        ]
        count, shards = (self.local_experts, 1) if self.local_experts else (1, shards)
        rows = 2 * width // shards
        return [
            *attention_layers,
            Linear("linear_fc1", rows, hidden, True, 2, shards > 1, rows * bias, count),
            Linear("linear_fc2", hidden, width // shards, False, 1, shards > 1, hidden * bias, count),
        ]

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return self.recipe.model.share_embeddings_and_output_weights

    def vocabulary_weights(self) -> int:
        """Elements of embedding or head on one rank."""
        return self.recipe.model.padded_vocab_size // self.tensor * self.recipe.model.hidden_size

    def is_first(self, stage: int) -> bool:
        """Whether the stage looks tokens up."""
        return stage == 0

    def is_last(self, stage: int) -> bool:
        """Whether the stage makes the loss."""
        return stage == self.pipeline - 1

    def matrices(self, stage: int) -> dict[str, int]:
        """Elements of this stage's matrices on one rank, by kind, without experts."""
        linear = sum(one.weights for one in self.linears()[: 2 if self.local_experts else 4])
        head = self.is_last(stage) and not (self.is_tied and self.is_first(stage))
        model = self.recipe.model
        return {
            "embedding": self.vocabulary_weights() * self.is_first(stage),
            "head": self.vocabulary_weights() * head,
            "linears": linear * self.layers(stage),
            "routers": (model.num_moe_experts or 0) * model.hidden_size * self.layers(stage),
        }

    def vectors(self, stage: int) -> int:
        """Elements of norms and biases on one rank, without those of experts."""
        model, layers = self.recipe.model, self.layers(stage)
        biases = sum(one.bias for one in self.linears()[: 2 if self.local_experts else 4])
        router = (model.num_moe_experts or 0) * model.add_bias_linear
        return layers * (2 * model.hidden_size + biases + router) + model.hidden_size * self.is_last(stage)

    def experts(self, stage: int) -> tuple[int, int]:
        """Elements of the experts' (weights, biases) on one rank."""
        if not self.local_experts:
            return 0, 0
        own = self.linears()[2:]
        layers = self.layers(stage)
        return sum(x.weights * x.count for x in own) * layers, sum(x.bias * x.count for x in own) * layers

    def weights_of_linears(self, stage: int) -> int:
        """Elements of all Sparse-BitNet weights on one rank, experts too."""
        return self.matrices(stage)["linears"] + self.experts(stage)[0]


def model_parameters(recipe: Recipe) -> dict[str, int]:
    """Parameters of the whole model by kind; a tied head is the embedding."""
    whole = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=WHOLE)})
    one = Layout(whole, 1)
    kinds = one.matrices(0)
    weights, biases = one.experts(0)
    return {
        "embedding": kinds["embedding"],
        "head": kinds["head"],
        "attention and MLP projections": kinds["linears"],
        "experts": weights,
        "routers": kinds["routers"],
        "norms and biases": one.vectors(0) + biases,
    }


WHOLE = {
    "tensor": 1,
    "pipeline": 1,
    "virtual_pipeline": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "expert": 1,
}
