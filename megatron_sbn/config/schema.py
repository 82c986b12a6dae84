"""Recipe: everything a run depends on, in one frozen, strict, validated object. Imports no torch.

Three stated steps: YAML (with `extends:`, read relative to the file) -> `section.key=value` overrides -> `Recipe`.
A key that does not exist, a value of the wrong type or a combination that cannot be trained (`validation.py`) is a
`RecipeError` of one line that names the field, the value and the way out, before anything is allocated.

Field names of `model` are Megatron-Core's own; those of `optimizer` follow Megatron's where it has one.
"""

from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

from megatron_sbn.config.linear import Linear, plain_linear
from megatron_sbn.config.values import (
    ChunksPerRank,
    Folder,
    Name,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    as_tuple,
    parse_shards,
    short_dtype,
)


class Model(Section):
    """The transformer, in Megatron-Core's names. Pre-norm RMSNorm, SwiGLU, RoPE, grouped-query attention."""

    num_layers: Positive
    """Transformer layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    ffn_hidden_size: Positive
    """Width of the gated MLP, after the gate."""
    num_attention_heads: Positive
    """Query heads."""
    num_query_groups: Positive | None = None
    """Key/value heads; null: as many as query heads."""
    kv_channels: Positive | None = None
    """Channels of a head; null: hidden_size / num_attention_heads."""
    seq_length: Positive
    """Tokens of a sample."""
    vocab_size: Positive
    """Tokens of the tokenizer."""
    make_vocab_size_divisible_by: Positive = 128
    """The embedding has vocab_size rows, rounded up to a multiple of this."""
    share_embeddings_and_output_weights: bool = False
    """One matrix for embedding and head."""
    add_bias_linear: bool = False
    """Biases in all attention and MLP projections."""
    add_qkv_bias: bool = False
    """Biases in the QKV projection alone (Qwen2)."""
    rotary_base: Positive = 10000
    """Base of the rotary frequencies."""
    rotary_percent: PositiveFloat = 1.0
    """Share of a head's channels that rotate."""
    rotary_interleaved: bool = False
    """Neighbouring channels rotate together, not the halves of a head."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of the first weights."""
    bf16: bool = True
    """Activations and floating GEMMs in bf16; parameters are optimizer.parameter_dtype."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations recomputed in backward: whole layers, core attention, or none."""
    num_moe_experts: Positive | None = None
    """Experts of a layer; null: one dense MLP."""
    moe_router_topk: Positive = 2
    """Experts of a token."""
    moe_ffn_hidden_size: Positive | None = None
    """Width of one expert; null: ffn_hidden_size."""
    moe_aux_loss_coeff: NonNegativeFloat = 0.0
    """Weight of the load-balancing loss (Switch Transformer), in every micro-batch; 0: none."""

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def mlp_width(self) -> int:
        """Hidden features of one gated MLP: the dense one, or one expert."""
        return (self.num_moe_experts and self.moe_ffn_hidden_size) or self.ffn_hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the same at every tensor-parallel degree, so that the weights are too."""
        unit = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // unit) * unit


class Parallel(Section):
    """How the model is sharded. Data-parallel size is what is left of the world."""

    tensor: Positive = 1
    """Tensor-parallel ranks."""
    pipeline: Positive = 1
    """Pipeline-parallel ranks."""
    virtual_pipeline: ChunksPerRank = None
    """Model chunks of a pipeline rank (interleaved 1F1B)."""
    num_layers_in_first_pipeline_stage: Positive | None = None
    """Layers of the first stage; null: as many as the others."""
    num_layers_in_last_pipeline_stage: Positive | None = None
    """Layers of the last stage; null: as many as the others."""
    expert: Positive = 1
    """Expert-parallel ranks."""
    sequence: bool = True
    """Sequence parallelism within the tensor-parallel group; no effect at tensor 1."""
    zero_stage: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO: what is sharded over data parallelism."""


class Shard(Section):
    """One `.bin/.idx` pair by its prefix, and its share of a blend."""

    path: str
    """Prefix of the .bin/.idx pair."""
    weight: PositiveFloat = 1.0
    """Its share of the blend, relative to the others."""


Shards = Annotated[tuple[Shard, ...], BeforeValidator(parse_shards), Field(min_length=1)]


class Data(Section):
    """Token shards, written by `sbn prepare` or by Megatron's own tools."""

    train: Shards
    """One prefix, or a blend of several."""
    validation: Shards | None = None
    """The same, of held-out text."""
    tokenizer: str | None = None
    """The sentencepiece model or tokenizer.json that made the tokens; checked against the shards' manifests."""


class Stage(Section):
    """One stage of a staged schedule: from `step` on, lr goes from `lr` to `end_lr` at the next stage's step."""

    step: NonNegative
    """Its first optimizer step."""
    lr: NonNegativeFloat
    """Learning rate at its start."""
    end_lr: NonNegativeFloat
    """Learning rate at the start of the next stage."""
    weight_decay: NonNegativeFloat
    """Of matrices."""


class Optimizer(Section):
    """AdamW with decay and no-decay groups, fp32 masters under ZeRO."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 1e-5
    """Learning rate after the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """How it goes from lr to min_lr."""
    lr_warmup_steps: NonNegative = 0
    """Steps of linear warm-up."""
    lr_warmup_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """The same as a share of the steps to min_lr, rounded; null: lr_warmup_steps."""
    lr_decay_steps: Positive | None = None
    """The step at which min_lr is reached; null: training.steps."""
    stages: Annotated[tuple[Stage, ...], BeforeValidator(as_tuple)] = ()
    """A schedule of stages, in place of the above."""
    weight_decay: NonNegativeFloat = 0.1
    """Of matrices; norms and biases have none."""
    weight_decay_style: Literal["auto", "constant", "cosine_to_zero"] = "auto"
    """auto: cosine_to_zero over the first half of training for ternary weights, else constant."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest gradient norm; 0: no clipping."""
    parameter_dtype: Annotated[Literal["fp32"], BeforeValidator(short_dtype)] = "fp32"
    """Of parameters and masters; float32 is the same."""
    cpu_offload: bool = False
    """Masters, moments and the update in host memory."""

    def decay_steps(self, steps: int) -> int:
        """The step at which min_lr is reached, in a run of `steps`."""
        return self.lr_decay_steps or steps

    def warmup_steps(self, steps: int) -> int:
        """Steps of warm-up of a run of `steps`."""
        share = self.lr_warmup_fraction
        return self.lr_warmup_steps if share is None else round(share * self.decay_steps(steps))


class Profile(Section):
    """Steps to profile with torch.profiler (RUN/profile)."""

    start: NonNegative
    """Steps that are done before."""
    steps: Positive = 3
    """Steps to profile."""
    ranks: Annotated[tuple[NonNegative, ...], BeforeValidator(as_tuple)] = (0,)
    """Ranks that are profiled."""


class Training(Section):
    """Length, batch, and how often things are looked at. Intervals are in optimizer steps; 0 means never."""

    steps: Positive
    """Optimizer steps."""
    seed: NonNegative = 1234
    """Of the first weights and of the order of samples."""
    global_batch_size: Positive
    """Samples of an optimizer step."""
    micro_batch_size: Positive
    """Samples of one forward and backward pass of a rank."""
    log_interval: Positive = 1
    """Steps between lines of the log."""
    validation_interval: NonNegative = 0
    """Steps between validations."""
    validation_samples: Positive = 512
    """Samples of a validation, spread evenly over data.validation."""
    telemetry_interval: NonNegative = 100
    """Steps between measurements of masks and codes."""
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    """What becomes of a step whose loss or gradient norm is not finite or a spike."""
    spike_loss: PositiveFloat | None = None
    """A spike: this many nats above the median of the last spike_window steps."""
    spike_grad_norm: PositiveFloat | None = None
    """A spike: this many times the median of the last spike_window steps."""
    spike_window: Positive = 32
    """Steps of that median."""
    bad_step_budget: NonNegative = 10
    """Bad steps of a run; one more stops it."""
    time_limit: NonNegative = 0
    """Seconds from the start until it stops as if it were asked to (status 75); 0: none."""
    hang_warning: NonNegative = 300
    """Seconds without progress until the log says which ranks hold up the others; 0: never."""
    hang_timeout: NonNegative = 1800
    """Seconds without progress until the process ends, for the launcher to start anew; 0: never."""
    rank_check_interval: NonNegative = 100
    """Steps between comparisons of the ranks' speed."""
    profile: Profile | None = None
    """Writes a trace of some steps, and a snapshot of GPU memory; null: none."""
    rollback_steps: Positive = 1
    """rollback: to the newest checkpoint of at least so many steps before."""


class Checkpoint(Section):
    """When to save, how many to keep, and whether an existing run folder is continued."""

    interval: NonNegative = 0
    """Steps between checkpoints; 0: none between."""
    save_last: bool = True
    """Saves the last step too, whatever the interval. A run that is stopped is always saved."""
    keep: Positive = 2
    """Newest checkpoints to keep; with 2 a damaged one has another before it."""
    keep_every: NonNegative = 0
    """Keeps for good those whose step is a multiple of this; 0: none."""
    asynchronous: bool = True
    """Training waits for the copy to host memory only."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What becomes of the run when a checkpoint cannot be written."""
    resume: Literal["auto", "never", "required"] = "auto"
    """auto: continue what run_dir holds. never, required: refuse if there is something, or nothing."""
    signal_deadline: NonNegative = 600
    """Seconds from the first signal that asks to stop to a forced exit; 0: none."""


class Tracking(Section):
    """MLflow. metrics.jsonl in the run folder is written whatever is set here."""

    enabled: bool = True
    """Whether MLflow records the run."""
    uri: str | None = None
    """MLflow's tracking URI; null: MLFLOW_TRACKING_URI of the environment, else one database in the folder of runs."""
    experiment: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """The experiment in MLflow; null: MLFLOW_EXPERIMENT_NAME of the environment, else megatron_sbn."""
    study: Name | None = None
    """The parent run in MLflow that groups the runs of a study; sweeps set their own name."""
    system_metrics_interval: NonNegativeFloat = 10.0
    """Seconds between samples of rank 0's machine; 0: none."""


class Recipe(Section):
    """One experiment."""

    name: Name
    """Of the run, in its folder and in MLflow."""
    run_dir: Folder | None = None
    """The run folder; null: a new one, runs/NAME-TIME."""
    start_from: Folder | None = None
    """RUN[@STEP]: a new run begins from a checkpoint of another; null: from new weights."""
    start_with: Literal["everything", "weights"] = "everything"
    """What it takes: everything goes on at that step; weights begin at step 0, with new moments and schedules."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: on GPUs where there are any; cpu: on the CPU anyway; cuda: refused where there is no GPU."""
    model: Model
    linear: Linear = Linear()
    parallel: Parallel = Parallel()
    data: Data
    optimizer: Optimizer = Optimizer()
    training: Training
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    def plain(self) -> dict[str, Any]:
        """Sections as dictionaries, in the words that people write."""
        resolved = self.model_dump(mode="json")
        resolved["linear"] = plain_linear(resolved["linear"])
        return resolved

    def to_yaml(self) -> str:
        """The resolved recipe, readable by `load_recipe` again."""
        return yaml.safe_dump(self.plain(), sort_keys=False)

    def flat(self) -> dict[str, str]:
        """Every dotted key and its value as text."""
        flat: dict[str, str] = {}
        for section, value in self.plain().items():
            items = value.items() if isinstance(value, dict) else [("", value)]
            flat |= {f"{section}.{key}".rstrip("."): str(item) for key, item in items}
        return flat
