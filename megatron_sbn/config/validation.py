"""Which recipes can be trained: every combination that cannot is refused here, before anything is allocated.

Each message is one line: the field, its value, and the fix. Imports no torch.
"""

import itertools
import math

from megatron_sbn.config.schema import Recipe
from megatron_sbn.errors import RecipeError

# Largest input width whose int32 accumulators are exact in fp32 (docs/method.md, "Forward").
MAX_EXACT_INPUT = 131072


def validate_recipe(recipe: Recipe) -> None:
    """Raises RecipeError unless the recipe can be trained on some number of ranks."""
    _check_model(recipe)
    _check_parallel(recipe)
    check_experts(recipe)
    _check_linear(recipe)
    _check_schedule(recipe)
    _check_without_effect(recipe)
    _check_rollback(recipe)
    if recipe.training.global_batch_size % recipe.training.micro_batch_size:
        raise RecipeError(
            f"training.global_batch_size = {recipe.training.global_batch_size} is not a multiple of "
            f"training.micro_batch_size = {recipe.training.micro_batch_size}; make it one"
        )
    if recipe.training.validation_interval and recipe.data.validation is None:
        raise RecipeError(
            f"training.validation_interval = {recipe.training.validation_interval} needs data.validation; "
            "name a held-out shard or set the interval to 0"
        )


def min_world_size(recipe: Recipe) -> int:
    """The fewest ranks that fill the layout: a replica, and as many of them as its experts are spread over."""
    parallel = recipe.parallel
    return parallel.pipeline * math.lcm(parallel.tensor, parallel.expert)


def validate_world_size(recipe: Recipe, world_size: int) -> None:
    """Raises RecipeError unless `world_size` ranks fill the layout exactly."""
    parallel, training = recipe.parallel, recipe.training
    model_size = parallel.tensor * parallel.pipeline
    if world_size % model_size:
        raise RecipeError(
            f"parallel.tensor = {parallel.tensor} x parallel.pipeline = {parallel.pipeline} needs a multiple of "
            f"{model_size} ranks, and {world_size} were started; start {model_size} (--nproc-per-node) or change it"
        )
    check_expert_world(recipe, world_size)
    absent = [rank for rank in (training.profile.ranks if training.profile else ()) if rank >= world_size]
    if absent:
        raise RecipeError(f"training.profile.ranks: there is no rank {absent[0]} of {world_size}; name others")
    data_size = world_size // model_size
    unit = training.micro_batch_size * data_size
    if training.global_batch_size % unit:
        raise RecipeError(
            f"training.global_batch_size = {training.global_batch_size} is not divisible by "
            f"training.micro_batch_size = {training.micro_batch_size} x {data_size} data-parallel ranks; "
            f"use a multiple of {unit}"
        )
    micro_batches = training.global_batch_size // unit
    if parallel.virtual_pipeline and micro_batches % parallel.pipeline:
        raise RecipeError(
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline} needs a multiple of {parallel.pipeline} "
            f"micro-batches per step, and there are {micro_batches}; change training.global_batch_size"
        )


def _check_model(recipe: Recipe) -> None:
    model = recipe.model
    if model.kv_channels is None:
        _divisible(model.hidden_size, "model.hidden_size", model.num_attention_heads, "model.num_attention_heads")
    _divisible(model.num_attention_heads, "model.num_attention_heads", model.query_groups, "model.num_query_groups")
    if model.head_dim % 2:
        raise RecipeError(f"model.kv_channels = {model.head_dim}: rotary embeddings need an even width; use one")
    if model.rotary_percent > 1:
        raise RecipeError(f"model.rotary_percent = {model.rotary_percent}: at most 1.0")


def _check_parallel(recipe: Recipe) -> None:
    model, parallel = recipe.model, recipe.parallel
    tensor, pipeline = parallel.tensor, parallel.pipeline
    _divisible(model.num_attention_heads, "model.num_attention_heads", tensor, "parallel.tensor")
    _divisible(model.query_groups, "model.num_query_groups", tensor, "parallel.tensor")
    if model.num_moe_experts is None:
        _divisible(model.ffn_hidden_size, "model.ffn_hidden_size", tensor, "parallel.tensor")
    _divisible(model.padded_vocab_size, "model.vocab_size (padded)", tensor, "parallel.tensor")
    if parallel.sequence and tensor > 1:
        _divisible(model.seq_length, "model.seq_length", tensor, "parallel.tensor", "or set parallel.sequence=false")
    _check_pipeline(recipe)
    if parallel.zero_stage == 3 and pipeline > 1:
        raise RecipeError(
            f"parallel.zero_stage = 3 with parallel.pipeline = {pipeline}: stages would wait for each other's gathers "
            "for ever; use parallel.zero_stage = 1 or 2, or parallel.pipeline = 1"
        )


def _check_pipeline(recipe: Recipe) -> None:
    """Equal stages, unless the first or the last is given a number of layers of its own."""
    layers, parallel = recipe.model.num_layers, recipe.parallel
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if chunks > parallel.pipeline and parallel.pipeline == 1:
        raise RecipeError(
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline} needs parallel.pipeline > 1; leave it out"
        )
    ends = {
        "parallel.num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "parallel.num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
    }
    given = {field: count for field, count in ends.items() if count is not None}
    if not given:
        name = "parallel.pipeline" if chunks == parallel.pipeline else "parallel.pipeline x parallel.virtual_pipeline"
        uneven = "or an uneven split with parallel.num_layers_in_first_pipeline_stage" if parallel.pipeline > 1 else ""
        _divisible(layers, "model.num_layers", chunks, name, uneven)
        return
    settings = ", ".join(f"{field} = {count}" for field, count in given.items())
    if parallel.pipeline == 1 or chunks > parallel.pipeline:
        raise RecipeError(f"{settings}: needs parallel.pipeline > 1 without parallel.virtual_pipeline; leave it out")
    left, stages = layers - sum(given.values()), parallel.pipeline - len(given)
    if left < stages or (left % stages if stages else left):
        raise RecipeError(
            f"{settings}: leaves {left} of model.num_layers = {layers} for {stages} other stages; "
            "leave each of them the same number, at least 1"
        )


def _check_linear(recipe: Recipe) -> None:
    linear = recipe.linear
    if linear.mask_source == "quantized" and linear.order == "mask_then_quant":
        raise RecipeError(
            "linear.mask_source = 'quantized' needs linear.order = 'quant_then_mask': a mask made from the codes "
            "cannot come before them"
        )
    for index, (before, phase) in enumerate(itertools.pairwise(linear.phases), 1):
        if phase.step <= before.step:
            raise RecipeError(
                f"linear.phases.{index}.step = {phase.step}: phases start at increasing steps; put them in order"
            )
    for index, phase in enumerate(linear.phases):
        if phase.step >= recipe.training.steps:
            raise RecipeError(
                f"linear.phases.{index}.step = {phase.step}: never begins, training.steps = {recipe.training.steps}; "
                "let it begin earlier, train longer, or leave it out"
            )
    settings = linear.in_order()
    ternary = [own.activation_bits for own in settings if own.weight_format == "ternary"]
    _check_used(recipe, bool(ternary), any(bits is not None for bits in ternary))
    places = ["linear", *(f"linear.phases.{index}" for index in range(len(linear.phases)))]
    for where, own in zip(places, settings, strict=True):
        n, m = own.sparsity
        if not 1 <= n <= m <= 32:
            raise RecipeError(f"{where}.sparsity = {n}:{m}: needs 1 <= N <= M <= 32, such as 6:8")
        if n < m:
            _check_groups(recipe, n, m, where)
        if own.weight_format == "ternary" and own.activation_bits is not None:
            _check_exact(recipe)


def _check_used(recipe: Recipe, ternary: bool, quantized: bool) -> None:
    """Settings of ternary weights, or of rounded activations, say nothing where no phase has them: refused."""
    linear = recipe.linear
    for field, value, default in (
        ("order", linear.order, "quant_then_mask"),
        ("mask_source", linear.mask_source, "latent"),
        ("backward", linear.backward, "exact"),
    ):
        if not ternary and value != default:
            raise RecipeError(f"linear.{field} = {value!r} has no effect on dense weights; leave it at {default!r}")
    if linear.backward != "exact" and not quantized:
        raise RecipeError(
            f"linear.backward = {linear.backward!r} needs quantized activations (linear.activation_bits); "
            "leave it at 'exact', or set linear.activation_bits to 8"
        )


def _check_groups(recipe: Recipe, n: int, m: int, where: str) -> None:
    """No group of M may straddle a shard; column-parallel weights and experts are not sharded along in."""
    model, tensor = recipe.model, recipe.parallel.tensor
    inputs = (
        ("model.hidden_size", model.hidden_size, 1),
        ("the attention width (heads x kv_channels)", model.num_attention_heads * model.head_dim, tensor),
        _mlp_width(recipe),
    )
    for name, width, shards in inputs:
        if (width // shards) % m:
            by = f" over {shards} tensor-parallel ranks" if shards > 1 else ""
            raise RecipeError(
                f"{where}.sparsity = {n}:{m}: {name} = {width}{by} leaves {width // shards} weights a row, which "
                f"groups of {m} do not fill; use a multiple of {m * shards}, another M, or fewer tensor-parallel ranks"
            )


def _mlp_width(recipe: Recipe) -> tuple[str, int, int]:
    """(field, hidden features of an MLP, ranks that they are sharded over)."""
    model = recipe.model
    own = model.num_moe_experts is not None and model.moe_ffn_hidden_size is not None
    shards = recipe.parallel.tensor if model.num_moe_experts is None else 1
    return "model.moe_ffn_hidden_size" if own else "model.ffn_hidden_size", model.mlp_width, shards


def _check_exact(recipe: Recipe) -> None:
    model = recipe.model
    widest = max(model.hidden_size, model.mlp_width, model.num_attention_heads * model.head_dim)
    if widest > MAX_EXACT_INPUT:
        raise RecipeError(f"a linear input of {widest} exceeds {MAX_EXACT_INPUT}, where integer sums stop being exact")


def _check_without_effect(recipe: Recipe) -> None:
    """Settings that would do nothing in this run."""
    if recipe.start_from is None and recipe.start_with != "everything":
        raise RecipeError(f"start_with = {recipe.start_with}: there is no start_from; name a run, or leave it out")
    profile, steps = recipe.training.profile, recipe.training.steps
    if profile is not None and profile.start >= steps:
        raise RecipeError(f"training.profile.start = {profile.start}: the run has {steps} steps; start earlier")
    if profile is not None and not profile.ranks:
        raise RecipeError("training.profile.ranks = []: profiles nothing; name ranks, or leave training.profile out")


def _check_schedule(recipe: Recipe) -> None:
    optimizer = recipe.optimizer
    if not optimizer.stages and optimizer.min_lr > optimizer.lr:
        raise RecipeError(f"optimizer.min_lr = {optimizer.min_lr} is above optimizer.lr = {optimizer.lr}; lower it")
    decay_steps = optimizer.decay_steps(recipe.training.steps)
    if optimizer.lr_warmup_fraction is not None and optimizer.lr_warmup_steps:
        raise RecipeError(
            f"optimizer.lr_warmup_fraction = {optimizer.lr_warmup_fraction} and optimizer.lr_warmup_steps = "
            f"{optimizer.lr_warmup_steps}: give one of them; optimizer.lr_warmup_fraction=null takes the steps"
        )
    if not optimizer.stages and optimizer.lr_warmup_steps > decay_steps:
        raise RecipeError(
            f"optimizer.lr_warmup_steps = {optimizer.lr_warmup_steps} is longer than the {decay_steps} steps of the "
            "schedule; shorten it or set optimizer.lr_decay_steps"
        )
    steps = [stage.step for stage in optimizer.stages]
    if steps and (steps[0] != 0 or sorted(set(steps)) != steps):
        raise RecipeError(f"optimizer.stages start at steps {steps}; start the first at 0 and each after the last")


def _check_rollback(recipe: Recipe) -> None:
    """A bad step finds a checkpoint that is old enough, once so many steps are done."""
    training, checkpoint = recipe.training, recipe.checkpoint
    if training.on_bad_step != "rollback":
        return
    if not checkpoint.interval:
        raise RecipeError(
            "training.on_bad_step = 'rollback' needs checkpoints, and checkpoint.interval = 0; set it, or use 'skip'"
        )
    least = 1 + -(-training.rollback_steps // checkpoint.interval)
    if checkpoint.keep < least and not checkpoint.keep_every:
        raise RecipeError(
            f"training.rollback_steps = {training.rollback_steps} is more than what is kept reaches back: "
            f"{checkpoint.keep}, one each {checkpoint.interval} steps; set checkpoint.keep to {least} or more"
        )


def _divisible(value: int, name: str, by: int, by_name: str, otherwise: str = "") -> None:
    if value % by:
        lower, upper = value // by * by, -(-value // by) * by
        choice = f"{lower} or {upper}" if lower else str(upper)
        way_out = f"; use {choice}, or another {by_name.split()[0]}{', ' + otherwise if otherwise else ''}"
        raise RecipeError(f"{name} = {value} is not divisible by {by_name} = {by}{way_out}")


def check_experts(recipe: Recipe) -> None:
    """Raises RecipeError unless the recipe's experts can be trained on some number of ranks."""
    model, parallel = recipe.model, recipe.parallel
    experts = model.num_moe_experts
    if experts is None:
        _check_no_experts(recipe)
        return
    if model.moe_router_topk > experts:
        raise RecipeError(
            f"model.moe_router_topk = {model.moe_router_topk} is more than model.num_moe_experts = {experts}; "
            f"use at most {experts}"
        )
    if experts % parallel.expert:
        raise RecipeError(
            f"model.num_moe_experts = {experts} is not divisible by parallel.expert = {parallel.expert}; "
            f"use a multiple of {parallel.expert}, or a parallel.expert that divides {experts}"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        raise RecipeError(
            f"parallel.sequence = false with parallel.tensor = {parallel.tensor}: every rank would send the same "
            "tokens to the experts; set parallel.sequence=true, or parallel.tensor=1"
        )
    if parallel.zero_stage == 3:
        raise RecipeError(
            "parallel.zero_stage = 3 with model.num_moe_experts: an expert that sees no token would leave the others "
            "waiting in a gather; use parallel.zero_stage = 1 or 2"
        )
    if recipe.linear.sr_ste_decay > 0:
        raise RecipeError(
            f"linear.sr_ste_decay = {recipe.linear.sr_ste_decay}: it is added in every backward pass, and an expert "
            "without tokens has none; use 0 with model.num_moe_experts"
        )


def check_expert_world(recipe: Recipe, world_size: int) -> None:
    """Raises RecipeError unless experts can be spread over `world_size` ranks, which fill the layout exactly."""
    parallel = recipe.parallel
    stage = world_size // parallel.pipeline
    if stage % parallel.expert:
        raise RecipeError(
            f"parallel.expert = {parallel.expert} does not divide the {stage} ranks of a pipeline stage "
            f"(tensor x data); start a multiple of {parallel.pipeline * parallel.expert} ranks or change it"
        )


def _check_no_experts(recipe: Recipe) -> None:
    """Settings of experts say nothing where there are none: refused, not ignored."""
    model = recipe.model
    if recipe.parallel.expert != 1:
        raise RecipeError(
            f"parallel.expert = {recipe.parallel.expert}: the model has no experts; use 1, or set model.num_moe_experts"
        )
    for field, value, default in (
        ("moe_router_topk", model.moe_router_topk, 2),
        ("moe_ffn_hidden_size", model.moe_ffn_hidden_size, None),
        ("moe_aux_loss_coeff", model.moe_aux_loss_coeff, 0.0),
    ):
        if value != default:
            raise RecipeError(f"model.{field} = {value} needs model.num_moe_experts; set it, or leave this out")
