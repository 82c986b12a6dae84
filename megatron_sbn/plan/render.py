"""A plan as people read it, and as scripts do (`describe`): aligned tables, GiB, no figure without its assumption."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_sbn.config import Recipe
from megatron_sbn.plan.comm_bytes import bytes_of_all_ranks, bytes_per_rank
from megatron_sbn.plan.hardware import GIB
from megatron_sbn.plan.memory import RankMemory
from megatron_sbn.plan.search import Candidate, Choice, Machines
from megatron_sbn.plan.shapes import model_parameters
from megatron_sbn.plan.step_time import link, operations
from megatron_sbn.text_table import numeric, prefixed

SHOWN = 12  # layouts

_ASSUMED = (
    ("int8_gemm", "of int8 peak, forward GEMMs of quantized layers"),
    ("floating_gemm", "of bf16 peak, backward GEMMs, floating layers, head"),
    ("attention", "of bf16 peak, attention"),
    ("bandwidth", "of memory bandwidth"),
    ("link", "of link speeds"),
)


def page(recipe: Recipe, machines: Machines, own: Candidate, choice: Choice) -> str:
    """The whole plan; `own` is the layout that is shown in full."""
    blocks = [_title(recipe, machines), _model(recipe), _layout(own), _memory(own, machines), _bytes(own, machines)]
    blocks += [_flops(own), _time(own, machines), _assumptions(machines), _layouts(choice, machines, own)]
    return "\n\n".join("\n".join(block) for block in blocks)


def _title(recipe: Recipe, machines: Machines) -> list[str]:
    linear = recipe.linear
    bits = f", {linear.activation_bits}-bit activations" if linear.weight_format == "ternary" else ""
    return [
        f"{recipe.name} on {machines.nodes} node{'s' if machines.nodes > 1 else ''} x {machines.per_node} "
        f"{machines.device.name}: {linear.weight_format} {linear.sparsity[0]}:{linear.sparsity[1]}{bits}, "
        f"backward {linear.backward}, {'bf16' if recipe.model.bf16 else 'fp32'} between layers"
    ]


def _model(recipe: Recipe) -> list[str]:
    kinds = model_parameters(recipe)
    rows = [[f"  {name}", f"{count:,}"] for name, count in kinds.items() if count]
    return numeric(["Model", "parameters"], [*rows, ["  total", f"{sum(kinds.values()):,}"]])


def _layout(own: Candidate) -> list[str]:
    layout, training = own.layout, own.layout.recipe.training
    return [
        f"Layout {own.name}: {training.global_batch_size:,} sequences of {layout.recipe.model.seq_length:,} tokens a "
        f"step; each replica takes {layout.micro_batches} micro-batch{'es' if layout.micro_batches > 1 else ''} of "
        f"{training.micro_batch_size}"
    ]


def _memory(own: Candidate, machines: Machines) -> list[str]:
    memory = own.memory
    unit, scale = ("GiB", GIB) if memory.total >= GIB else ("MiB", 2**20)

    def scaled(value: float) -> str:
        return f"{value / scale:,.2f}"

    which = (
        f"a rank of stage {memory.stage} (of {own.layout.pipeline}), the fullest"
        if own.layout.pipeline > 1
        else "a rank"
    )
    rows = [[f"  {name}", scaled(value), "persistent"] for name, value in memory.lasting.items() if value]
    rows += [[f"  {name}", scaled(value), "forward+backward"] for name, value in memory.passes.items() if value]
    rows += [[f"  {name}", scaled(value), "optimizer step"] for name, value in memory.update.items() if value]
    rows.append([f"  peak, in the {peak_moment(memory)}", scaled(memory.total), ""])
    rows.append(["  usable: the data sheet's less a reserve", scaled(machines.usable), ""])
    lines = numeric([f"Memory of {which}", unit, "lifetime"], rows)
    if own.layout.recipe.linear.phases:
        lines.append(
            "  in the phase that takes most; communication volume and time are of the settings before any phase"
        )
    over = memory.total - machines.usable
    lines.append(f"  does not fit: {gib(over)} GiB too much" if over > 0 else f"  fits: {gib(-over)} GiB are left")
    if memory.host:
        lines.append(f"  and in host memory, offloaded: {gib(sum(memory.host.values()))} GiB a rank")
    return lines


def peak_moment(memory: RankMemory) -> str:
    """Which of a step's two moments takes more."""
    return "forward and backward" if sum(memory.passes.values()) >= sum(memory.update.values()) else "optimizer step"


def gib(value: float) -> str:
    """Bytes as GiB."""
    return f"{value / GIB:,.2f}"


def _bytes(own: Candidate, machines: Machines) -> list[str]:
    layout, most = own.layout, _largest_bytes(own)
    rows = []
    for group, total in bytes_of_all_ranks(layout).items():
        speed = link(layout, group, machines.device, machines.per_node)
        where = f"{'in a node' if speed == machines.device.node_link else 'between nodes'}, {speed / 1e9:.0f} GB/s"
        rows.append([f"  {group}", f"{prefixed(most[group])}B", f"{prefixed(total)}B", where])
    if not rows:
        return ["Communication per step: none, one rank"]
    return numeric(["Communication per step", "max per rank", "total", "link of a device"], rows)


def _largest_bytes(own: Candidate) -> dict[str, float]:
    """Bytes by group of the rank that sends most."""
    stages = [bytes_per_rank(own.layout, stage) for stage in range(own.layout.pipeline)]
    return {group: max(volume[group] for volume in stages) for group in stages[0]}


def _flops(own: Candidate) -> list[str]:
    made = operations(own.layout)
    rows = [
        [f"  {name}", prefixed(made[f"{key}_token"]), prefixed(made[f"{key}_step"])]
        for name, key in (("dense-equivalent", "dense"), ("sparse-effective", "sparse"))
    ]
    return numeric(["FLOPs (docs/metrics.md)", "a token", "a step"], rows)


def _time(own: Candidate, machines: Machines) -> list[str]:
    expected = own.duration
    unit, size = ("seconds", 1.0) if expected.step >= 0.1 else ("ms", 1e-3)
    rows = [
        [f"  {name}", f"{value / size:,.3f}", f"{value / expected.step:.0%}"]
        for name, value in expected.seconds.items()
        if value
    ]
    rows.append(["  step", f"{expected.step / size:,.3f}", ""])
    steps = own.layout.recipe.training.steps
    dense = operations(own.layout)["dense_step"] / expected.step / expected.devices
    lines = numeric(["Time, ASSUMED from data sheets, not measured", unit, ""], rows)
    rate, share = expected.tokens_per_second, dense / machines.device.bf16
    lines.append(
        f"  {rate:,.0f} tokens/s in all, {rate / expected.devices:,.0f} a device; {share:.0%} of "
        f"bf16 peak in dense FLOPs; {steps:,} steps in {_length(expected.step * steps)}"
    )
    return lines


def _length(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds >= 86400 else f"{seconds / 3600:,.1f} hours"


def _assumptions(machines: Machines) -> list[str]:
    device, assumed = machines.device, asdict(machines.assumed)
    names = ", ".join(name for name, _ in _ASSUMED)
    peaks = (
        f"bf16 {prefixed(device.bf16)}FLOP/s, int8 {prefixed(device.int8)}OP/s, 2:4 {prefixed(device.sparse_int8)}OP/s"
    )
    links = f"{prefixed(device.node_link)}B/s in a node, {prefixed(device.network)}B/s between nodes"
    return [
        f"Assumed for {device.name} ({device.source}):",
        f"  peaks: {peaks}",
        f"  memory: {prefixed(device.memory)}B at {prefixed(device.bandwidth)}B/s; {gib(device.reserve)} GiB of it are "
        "left to CUDA, NCCL and fragmentation",
        f"  links of a device, one way: {links}",
        *(f"  {assumed[name]:.0%} {what}" for name, what in _ASSUMED),
        "  communication overlaps with nothing; N:M saves time where it is 2:4, in forward alone",
        f"  change a share with --assume NAME=SHARE: {names}",
    ]


def _layouts(choice: Choice, machines: Machines, own: Candidate) -> list[str]:
    shown = list(choice.fitting[:SHOWN])
    if own.memory.total <= machines.usable and all(one.layout != own.layout for one in shown):
        shown = sorted([*shown, own], key=lambda one: one.duration.step)
    header = ["Layouts that fit, fastest first", "micro-batch", "GiB", "s/step", "tokens/s", "a device"]
    lines = numeric(header, [_line(one, own) for one in shown])
    lines.append("  * is the layout above; ZeRO-2 takes and sends what ZeRO-1 does")
    if len(choice.fitting) > SHOWN:
        lines.append(f"  and {len(choice.fitting) - SHOWN} more that fit")
    if choice.too_large:
        over, nearest = choice.too_large[0]
        lines.append(f"  {len(choice.too_large)} do not fit; the nearest, {nearest.name}, lacks {gib(over)} GiB")
    return lines


def _line(one: Candidate, own: Candidate) -> list[str]:
    rate = one.duration.tokens_per_second
    mark = "*" if one.layout == own.layout else " "
    size, step = one.layout.recipe.training.micro_batch_size, f"{one.duration.step:,.2f}"
    cells = [str(size), gib(one.memory.total), step, f"{rate:,.0f}", f"{rate / one.layout.world:,.0f}"]
    return [f"{mark} {one.name}", *cells]


def describe(recipe: Recipe, machines: Machines, own: Candidate, choice: Choice) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, counts."""
    layout = own.layout
    return {
        "name": recipe.name,
        "device": machines.device.name,
        "devices": machines.devices,
        "usable_bytes": machines.usable,
        "parameters": model_parameters(recipe),
        "layout": _candidate(own),
        "memory": _memory_values(own.memory),
        "comm_bytes": {"all": bytes_of_all_ranks(layout), "most": _largest_bytes(own)},
        "flops": operations(layout),
        "seconds": dict(own.duration.seconds),
        "assumed": asdict(machines.assumed),
        "fitting": [_candidate(one) for one in choice.fitting],
        "too_large": [_candidate(one) | {"over_bytes": over} for over, one in choice.too_large],
    }


def _candidate(one: Candidate) -> dict[str, Any]:
    parallel, training = one.layout.recipe.parallel, one.layout.recipe.training
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "data": one.layout.data,
        "expert": parallel.expert,
        "zero_stage": parallel.zero_stage,
        "micro_batch_size": training.micro_batch_size,
        "memory_bytes": one.memory.total,
        "step_seconds": one.duration.step,
        "tokens_per_second": one.duration.tokens_per_second,
    }


def _memory_values(memory: RankMemory) -> dict[str, Any]:
    parts: dict[str, Mapping[str, float]] = {
        "lasting": memory.lasting,
        "passes": memory.passes,
        "update": memory.update,
        "host": memory.host,
    }
    return {"stage": memory.stage, "total": memory.total} | {name: dict(values) for name, values in parts.items()}
