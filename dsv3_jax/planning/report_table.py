"""Prints a plan as tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsv3_jax.planning.advice import advise
from dsv3_jax.planning.attention_form import attention_form
from dsv3_jax.planning.compiled import CompiledPlan
from dsv3_jax.planning.plan import RESERVED, Plan

_SHOWN_ADVICE = 5
_ATTENTION = {
    "scan": "by plain products",
    "hopper": "by the Hopper kernel",
    "tpu": "by the TPU kernel",
    "cudnn": "by cuDNN",
}


def size(count: float) -> str:
    """Returns bytes with three digits and a unit."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:.{0 if abs(count) >= 100 * unit else 1 if abs(count) >= 10 * unit else 2}f} {name}"
    return f"{count:.0f} B"


def show(plan: Plan, console: Console, compiled: CompiledPlan | None = None) -> None:
    """Prints the whole plan, and the compiler's figures beside it if there are any."""
    console.print(Group(*_parts(plan)))
    if compiled is not None:
        console.print(
            Group(Text(), _comparison(plan, compiled), _collectives(compiled), _compiler_verdict(plan, compiled))
        )


def memory_parts(plan: Plan) -> dict[str, float]:
    """Returns what fills a device, in the order of the table and the picture."""
    state, activations = plan.state, plan.activations
    parts = {
        "master weights": state.masters,
        "working weights": state.working_weights,
        "gathered layers": state.gathered_weights,
        "gradients": state.gradients,
        "moments of the optimizer": state.moments,
        "running average": state.average,
        "activations kept": sum(activations.kept.values()),
        "one layer recomputed": activations.recomputed if activations.recomputed >= activations.loss else 0.0,
        "loss": activations.loss if activations.loss > activations.recomputed else 0.0,
        "reserved": RESERVED,
    }
    return {name: value for name, value in parts.items() if value}


def _parts(plan: Plan) -> Iterable[RenderableType]:
    yield _title(plan)
    yield _memory(plan)
    yield _verdict(plan)
    yield _activations(plan)
    if plan.flows:
        yield _traffic(plan)
    yield _time(plan)
    yield _notes(plan)


def _title(plan: Plan) -> RenderableType:
    config = plan.config
    axes = ", ".join(f"{axis}={value}" for axis, value in vars(config.mesh).items() if value > 1) or "one device"
    held = ", ".join(f"{count} {kind}" for kind, count in plan.layers.items())
    layers = f"layers: {held}"
    if config.has_stages:
        layers = f"layers of every rank of the stage axis: {held}; busiest rank: {plan.rank}"
    lines = [
        f"{config.model.num_parameters(mtp=True) / 1e9:.1f}B parameters on {config.target.name}: {axes}",
        f"{config.batch_size:,} sequences of {config.sequence_length:,} per step, {config.passes} micro-batches of "
        f"{config.micro_batch_size} per rank; {config.precision}, rematerialisation {config.rematerialisation}"
        + (f", {config.schedule}" if config.has_stages else "")
        + f", attention {_ATTENTION[attention_form(config)]}",
        f"{layers}; {plan.state.parameters / 1e9:.3g}B parameters per device",
    ]
    return Text("\n".join(lines) + "\n")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _memory(plan: Plan) -> Table:
    table = _table("Memory of a device", "", "bytes", "of the device")
    capacity = plan.config.target.accelerator.memory
    for name, value in memory_parts(plan).items():
        table.add_row(name, size(value), f"{100 * value / capacity:.1f}%")
    table.add_section()
    table.add_row("all", size(plan.memory), f"{100 * plan.memory / capacity:.1f}%")
    return table


def _verdict(plan: Plan) -> RenderableType:
    capacity = size(plan.config.target.accelerator.memory)
    if plan.fits:
        return Text(f"Fits: {size(plan.spare)} of {capacity} to spare.\n", style="green")
    lines = [
        f"Does not fit: {size(-plan.spare)} more than the {capacity} of a device. Options of dsv3 train would save:"
    ]
    for advice in advise(plan)[:_SHOWN_ADVICE]:
        enough = "fits" if advice.fits else "not enough alone"
        lines.append(f"  {advice.change:52s} {size(advice.saved):>9s}  {enough}, time per token {advice.slower:+.0%}")
    return Text("\n".join(lines) + "\n", style="red")


def _activations(plan: Plan) -> Table:
    activations = plan.activations
    table = _table(f"Activations kept, {activations.micro_batches:g} micro-batches in flight", "", "bytes")
    for name, value in sorted(activations.kept.items(), key=lambda item: -item[1]):
        table.add_row(name, size(value))
    table.add_section()
    for kind, value in activations.kept_per_layer.items():
        table.add_row(f"one {kind} layer, one micro-batch", size(value))
    return table


def _traffic(plan: Plan) -> Table:
    table = _table("Sent by a device per step", "axis", "what", "bytes", "over", "seconds")
    for flow in plan.flows:
        link = "between nodes" if flow.between_nodes else "within a node"
        table.add_row(flow.axis, flow.what, size(flow.sent), link, f"{flow.seconds:.3g}")
    return table


def _time(plan: Plan) -> Table:
    table = _table(
        f"Time, and cost of {plan.config.tokens / 1e12:.4g}T tokens ({plan.config.steps:,} steps)",
        "",
        "step, s",
        "MFU",
        "tokens/s per device",
        "days",
        "device hours",
    )
    rows = {
        "at the hardware's peaks": plan.bound.total,
        "with the best kernels known": plan.expected.total,
        "at the pace of the report's run": plan.at_the_reports_pace,
    }
    for name, seconds in rows.items():
        rate = plan.tokens_per_device(seconds)
        table.add_row(
            name,
            f"{seconds:.3g}",
            f"{100 * plan.mfu(seconds):.1f}%",
            f"{rate:,.0f}",
            f"{plan.days(seconds):,.1f}",
            f"{plan.device_hours(seconds):,.0f}",
        )
    return table


def _notes(plan: Plan) -> Text:
    time = plan.expected
    parts = {name: value for name, value in vars(time).items() if value}
    spent = ", ".join(f"{name.replace('_', ' ')} {value / time.total:.0%}" for name, value in parts.items())
    lines = [f"Best kernels' step: {spent}; recomputation adds {plan.recomputed:.0%} operations."]
    if plan.config.target.accelerator.platform == "cpu":
        lines.append("A processor's speed here is an order of magnitude; `dsv3 train` measures it.")
    options = [f"{name} {value}".strip() for name, value in plan.train_options.items() if _is_said(name, value)]
    if options:
        lines.append(f"Options of dsv3 train for this plan: {' '.join(options)}")
    return Text("\n".join(lines))


def _is_said(option: str, value: str) -> bool:
    """Whether an option of `dsv3 train` is worth printing: mesh axes of size 1 and what ZeRO does by itself are not."""
    return not (option.startswith("--mesh.") and value == "1") and option != "--training.zero"


def _comparison(plan: Plan, compiled: CompiledPlan) -> Table:
    table = _table("Plan and compiler, per device", "", "plan", "compiler")
    state = plan.state
    arguments = state.masters + state.moments + state.average
    table.add_row("arguments: master weights, moments, average", size(arguments), size(compiled.argument_bytes))
    table.add_row(
        "all else while the step runs", size(plan.memory - RESERVED - arguments), size(compiled.temporary_bytes)
    )
    table.add_section()
    table.add_row("at the peak", size(plan.memory - RESERVED), size(compiled.peak_bytes))
    return table


def _collectives(compiled: CompiledPlan) -> Table:
    table = _table("Collectives of the compiled step", "kind", "devices", "runs", "sent", "largest result", "hidden")
    for item in compiled.collectives:
        # How many rows of a ragged exchange's buffers are filled is known when it runs.
        most = "at most " if item.kind.startswith("ragged") else ""
        hidden = "" if item.hidden is None else f"{item.hidden:.0%}"
        table.add_row(
            item.kind, f"{item.group:,}", f"{item.runs:,}", most + size(item.sent), size(item.largest), hidden
        )
    return table


def _compiler_verdict(plan: Plan, compiled: CompiledPlan) -> Text:
    spare = plan.config.target.accelerator.memory - compiled.peak_bytes
    verdict = f"fits with {size(spare)} to spare" if spare >= 0 else f"does not fit: {size(-spare)} too much"
    notes = ""
    if any(item.hidden is not None for item in compiled.collectives):
        notes = (
            "Hidden is what runs beside computation, by the compiler's order and the rooflines of its instructions.\n"
        )
    if plan.config.has_stages:
        notes += "A stage's collectives are counted in every branch of every tick, and for one layer.\n"
    return Text(
        f"{notes}The compiler says: the step {verdict}. Lowered in {compiled.lower_seconds:.0f} s and compiled in "
        f"{compiled.compile_seconds:.0f} s here, within {size(compiled.host_peak_bytes)}.",
        style="green" if spare >= 0 else "red",
    )
