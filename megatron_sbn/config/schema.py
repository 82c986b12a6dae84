"""Recipe: everything a run depends on, in one frozen, strict, validated object. Imports no torch.

Three stated steps: YAML (with `extends:`, read relative to the file) -> `section.key=value` overrides -> `Recipe`.
A key that does not exist, a value of the wrong type or a combination that cannot be trained (`validation.py`) is a
`RecipeError` of one line that names the field, the value and the way out, before anything is allocated.

Field names of `model` are Megatron-Core's own; those of `optimizer` follow Megatron's where it has one.
"""

import os
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

LARGEST = 2**53  # every whole number up to it is one in JSON, in a float and in 64 bits
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _parse_sparsity(value: Any) -> Any:  # noqa: ANN401 - anything that YAML can hold
    """'6:8' or [6, 8] -> (6, 8)."""
    if isinstance(value, str) and re.fullmatch(r"\d+:\d+", value):
        return tuple(int(part) for part in value.split(":"))
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(part) is int for part in value):
        return tuple(value)
    raise ValueError("write N:M, such as 6:8")


def _parse_bits(value: Any) -> Any:  # noqa: ANN401 - anything that YAML can hold
    return None if value == "none" else value


def _as_tuple(value: Any) -> Any:  # noqa: ANN401 - anything that YAML can hold
    return tuple(value) if isinstance(value, list) else value


def _parse_shards(value: Any) -> Any:  # noqa: ANN401 - anything that YAML can hold
    items = [value] if isinstance(value, (str, dict)) else value
    if isinstance(items, (list, tuple)):
        return tuple({"path": item} if isinstance(item, str) else item for item in items)
    return value


def _none_if_one(value: int | None) -> int | None:
    return None if value == 1 else value


def _check_folder(value: str) -> str:
    if "\0" in value or any(len(os.fsencode(part)) > 255 for part in value.split("/")):
        raise ValueError("no folder can be called so; a name in it has at most 255 bytes, and no NUL")
    return value


Sparsity = Annotated[tuple[int, int], BeforeValidator(_parse_sparsity)]
ActivationBits = Annotated[Literal[8, 4] | None, BeforeValidator(_parse_bits)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]  # of files, too
Folder = Annotated[str, AfterValidator(_check_folder)]
# One chunk a rank is no interleaving, for which Megatron-Core has a schedule, names and checks of its own.
ChunksPerRank = Annotated[Positive | None, AfterValidator(_none_if_one)]
WeightFormat = Literal["ternary", "dense"]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", validate_default=True)


class Model(Section):
    """The transformer, in Megatron-Core's names. Pre-norm RMSNorm, SwiGLU, RoPE, grouped-query attention."""

    num_layers: Positive
    hidden_size: Positive
    ffn_hidden_size: Positive
    num_attention_heads: Positive
    num_query_groups: Positive | None = None  # None: as many as heads
    kv_channels: Positive | None = None  # None: hidden_size / num_attention_heads
    seq_length: Positive
    vocab_size: Positive
    make_vocab_size_divisible_by: Positive = 128
    share_embeddings_and_output_weights: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    rotary_base: Positive = 10000
    rotary_percent: PositiveFloat = 1.0
    rotary_interleaved: bool = False
    layernorm_epsilon: PositiveFloat = 1e-5
    init_method_std: PositiveFloat = 0.02
    bf16: bool = True  # activations and floating GEMMs; parameters are optimizer.parameter_dtype
    recompute_granularity: Literal["full", "selective"] | None = None
    num_moe_experts: Positive | None = None  # None: one dense MLP a layer; else every layer is a mixture
    moe_router_topk: Positive = 2  # experts of a token
    moe_ffn_hidden_size: Positive | None = None  # of one expert; None: ffn_hidden_size
    moe_aux_loss_coeff: NonNegativeFloat = 0.0  # load balancing (Switch Transformer), in every micro-batch; 0: none

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


class Phase(Section):
    """From `step` on, the settings given here replace those of `linear` (None: unchanged)."""

    step: NonNegative
    weight_format: WeightFormat | None = None
    sparsity: Sparsity | None = None
    activation_bits: ActivationBits | Literal["unchanged"] = "unchanged"

    @property
    def changes(self) -> dict[str, Any]:
        """Settings of `linear` that are replaced, with their values."""
        given: dict[str, Any] = {"weight_format": self.weight_format, "sparsity": self.sparsity}
        changed = {key: value for key, value in given.items() if value is not None}
        # Here None is a value: no rounding.
        return changed if self.activation_bits == "unchanged" else changed | {"activation_bits": self.activation_bits}


ForwardForm = Literal[
    "auto", "dense", "planes", "wgmma", "cusparselt", "mma_sp", "sliding_cusparselt", "sliding_mma_sp"
]


class Linear(Section):
    """What the attention and MLP projections compute (docs/method.md)."""

    weight_format: WeightFormat = "ternary"
    sparsity: Sparsity = (6, 8)
    activation_bits: ActivationBits = 8
    order: Literal["quant_then_mask", "mask_then_quant"] = "quant_then_mask"
    mask_source: Literal["latent", "quantized"] = "latent"
    masked_gradient: Literal["dense", "masked"] = "dense"
    sr_ste_decay: NonNegativeFloat = 0.0
    backward: Literal["exact", "int8_dgrad", "int8"] = "exact"
    backend: Literal["auto", "cpu", "triton", "reference"] = "auto"  # auto: cpu on CPU, triton on CUDA
    # How the forward product reads the codes on CUDA (docs/kernels.md); auto: the fastest that was measured.
    forward_form: ForwardForm = "auto"
    mask_interval: Positive = 1  # steps between mask updates
    mask_freeze_step: NonNegative | None = None  # masks stay as they are from this step on
    phases: Annotated[tuple[Phase, ...], BeforeValidator(_as_tuple)] = ()

    def at(self, step: int) -> "Linear":
        """The settings in force at an optimizer step: these, changed by every phase that has begun."""
        return self.in_order()[sum(phase.step <= step for phase in self.phases)]

    def in_order(self) -> tuple["Linear", ...]:
        """The settings before any phase, then those from each phase on. None of them has phases."""
        settings = [self.model_copy(update={"phases": ()})]
        for phase in self.phases:
            settings.append(settings[-1].model_copy(update=phase.changes))
        return tuple(settings)


class Parallel(Section):
    """How the model is cut. Data-parallel size is what is left of the world."""

    tensor: Positive = 1
    pipeline: Positive = 1
    virtual_pipeline: ChunksPerRank = None  # model chunks per pipeline rank (interleaved 1F1B)
    num_layers_in_first_pipeline_stage: Positive | None = None  # None: all stages that are not set have equally many
    num_layers_in_last_pipeline_stage: Positive | None = None
    expert: Positive = 1
    sequence: bool = True  # sequence parallelism inside the tensor-parallel group; no effect at tensor=1
    zero_stage: Literal[1, 2, 3] = 1


class Shard(Section):
    """One `.bin/.idx` pair by its prefix, and its share of a blend."""

    path: str
    weight: PositiveFloat = 1.0


Shards = Annotated[tuple[Shard, ...], BeforeValidator(_parse_shards), Field(min_length=1)]


class Data(Section):
    """Token shards, written by `sbn prepare` or by Megatron's own tools."""

    train: Shards
    validation: Shards | None = None
    tokenizer: str | None = None


class Stage(Section):
    """One stage of a staged schedule: from `step` on, lr goes from `lr` to `end_lr` at the next stage's step."""

    step: NonNegative
    lr: NonNegativeFloat
    end_lr: NonNegativeFloat
    weight_decay: NonNegativeFloat


class Optimizer(Section):
    """AdamW with decay and no-decay groups, fp32 masters under ZeRO."""

    lr: PositiveFloat = 3e-4
    min_lr: NonNegativeFloat = 1e-5
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_steps: NonNegative = 0
    lr_decay_steps: Positive | None = None  # None: training.steps
    stages: Annotated[tuple[Stage, ...], BeforeValidator(_as_tuple)] = ()
    weight_decay: NonNegativeFloat = 0.1
    weight_decay_style: Literal["auto", "constant", "cosine_to_zero"] = "auto"
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adam_eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0  # 0: no clipping
    parameter_dtype: Literal["fp32"] = "fp32"
    cpu_offload: bool = False  # masters, moments and update in host memory


class Training(Section):
    """Length, batch, and how often things are looked at. Intervals are in optimizer steps; 0 means never."""

    steps: Positive
    seed: NonNegative = 1234
    global_batch_size: Positive
    micro_batch_size: Positive
    log_interval: Positive = 1
    validation_interval: NonNegative = 0
    validation_samples: Positive = 64
    telemetry_interval: NonNegative = 100
    # A bad step: loss or gradient norm not finite, or a spike over the median of the last `spike_window` steps.
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    spike_loss: PositiveFloat | None = None  # this many nats above
    spike_grad_norm: PositiveFloat | None = None  # this many times as large
    spike_window: Positive = 32
    bad_step_budget: NonNegative = 10  # so many in a run; then it stops
    time_limit: NonNegative = 0  # seconds from the start until it stops as if it were asked to (status 75); 0: none
    hang_warning: NonNegative = 300  # seconds without progress until it is told who holds up the others; 0: never
    hang_timeout: NonNegative = 1800  # and until the process ends, for the launcher to start anew; 0: never
    rank_check_interval: NonNegative = 100  # steps between comparisons of the ranks' speed
    rollback_steps: Positive = 1  # rollback: to the newest checkpoint of at least so many steps before


class Checkpoint(Section):
    """When to save, how many to keep, and whether an existing run folder is continued."""

    interval: NonNegative = 0
    keep: Positive = 2  # the newest
    keep_every: NonNegative = 0  # and, for good, those whose step is a multiple of this; 0: none
    asynchronous: bool = True  # training waits for the copy to host memory only
    on_failure: Literal["stop", "continue"] = "stop"  # when a checkpoint cannot be written
    resume: Literal["auto", "never", "required"] = "auto"
    signal_deadline: NonNegative = 600  # seconds from SIGTERM or SIGUSR1 to a forced exit; 0: none


class Tracking(Section):
    """MLflow. metrics.jsonl in the run folder is written whatever is set here."""

    enabled: bool = True
    uri: str | None = None  # None: sqlite:/// beside the run folders
    experiment: str = "megatron_sbn"
    study: Name | None = None  # parent run in MLflow that groups the runs of a study; sweeps set their own name
    system_metrics_interval: NonNegativeFloat = 10.0  # seconds between samples of rank 0's machine; 0: none


class Recipe(Section):
    """One experiment."""

    name: Name
    run_dir: Folder | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPUs where there are any
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
        resolved["linear"] = _plain_linear(resolved["linear"])
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


def _plain_linear(linear: dict[str, Any]) -> dict[str, Any]:
    """N:M as '6:8' and no-bits as 'none', the way people write them."""

    def plain(key: str, value: Any) -> Any:  # noqa: ANN401 - anything that YAML can hold
        if key == "sparsity" and value is not None:
            return f"{value[0]}:{value[1]}"
        return "none" if key == "activation_bits" and value is None else value

    phases = [{key: plain(key, value) for key, value in phase.items()} for phase in linear["phases"]]
    return {key: plain(key, value) for key, value in linear.items()} | {"phases": phases}
