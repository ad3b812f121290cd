"""The report's own training run, calculated: 2,048 H800s, 16 stages of DualPipe, 64-way expert parallelism, ZeRO-1.

    python experiments/report_run.py [--precision fp8|bfloat16] [--rematerialisation report|none|full]
                                     [--schedule dualpipe|zb1p|1f1b] [--no-zero]

`dsv3 plan` plans this project's training step. The report's step (sections 3.2, 3.3.3, 4.2) keeps other things in
memory: master weights are divided over all replicas, besides a working copy in the products' format; every stage keeps
the activations of all its layers, and experts keep what they were sent. This experiment calculates that run, prints it
as `dsv3 plan` prints a plan, and compares it with what is published: 2.664M GPU hours for 14.8T tokens, from which a
step of 15,360 sequences of 4,096 tokens takes 19.9 s. `dsv3_jax.planning.step_time.REPORT_FRACTION` is derived here.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from command_line import CommandLine, folder
from report_memory import FORMATS, activation_memory, rank_layers, state_memory
from report_time import operations, step_time, traffic
from rich.console import Console

from dsv3_jax.config import ModelConfig
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.forward_operations import forward_operations
from dsv3_jax.planning.hardware import Target
from dsv3_jax.planning.plan import Plan, plan_as_dict
from dsv3_jax.planning.step_time import Reached
from dsv3_jax.sharding.mesh import MeshConfig

GPU_HOURS = 2.664e6  # of pre-training, published
TOKENS_OF_RUN = 14.8e12
RESULTS = Path(__file__).parent / "results" / "plans" / "report-h800-2048"

REPORT_RUN = PlanConfig(
    model=ModelConfig.preset("v3-671b"),
    target=Target.parse("h800:2048"),
    mesh=MeshConfig(stage=16, data=2, expert=64),
    batch_size=15360,
    precision="fp8",
    average="none",  # it is in the hosts' memory
    tokens=TOKENS_OF_RUN,
)


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--precision", choices=list(FORMATS), default="fp8")
    parser.add_argument("--rematerialisation", choices=["report", "none", "full"], default="report")
    parser.add_argument("--schedule", choices=["dualpipe", "zb1p", "1f1b"], default="dualpipe")
    parser.add_argument("--no-zero", dest="zero", action="store_false")
    parser.add_argument("--out", type=folder, default=RESULTS)
    given = vars(parser.parse_args(argv))
    out = given.pop("out")
    config = dataclasses.replace(REPORT_RUN, **given)
    plan = report_plan(config)

    from dsv3_jax.planning.picture import draw_plan
    from dsv3_jax.planning.report_table import show

    out.mkdir(parents=True, exist_ok=True)
    with (out / "plan.txt").open("w") as file:
        for console in (Console(width=110), Console(file=file, width=110)):
            show(plan, console)
            console.print(_compared_with_the_published(plan), highlight=False)
    (out / "plan.json").write_text(json.dumps(plan_as_dict(plan), indent=1) + "\n")
    draw_plan(plan, out / "plan.png")


def _compared_with_the_published(plan: ReportPlan) -> str:
    """Returns the published figures with the plan's."""
    expected = plan.expected.total
    return (
        f"In the host's memory: {plan.state.masters / 2**30:.2f} GiB of running average per device.\n"
        f"Published for this run: {GPU_HOURS:,.0f} GPU hours on {plan.config.target.devices:,} H800s, MFU 39%. It took "
        f"{GPU_HOURS / plan.device_hours(expected):.2f} times what the best kernels known would. Where these compute, "
        f"it reached {report_fraction():.4f} of their speed."
    )


class ReportPlan(Plan):
    """The plan of a run that keeps its weights and activations as the report's did, which `dsv3 train` does not."""

    @property
    def train_options(self) -> dict[str, str]:
        """None, since `dsv3 train` cannot make such a run."""
        return {}

    @property
    def at_the_reports_pace(self) -> float:
        """Seconds of a step as published, from GPU hours."""
        return GPU_HOURS * 3600 / self.config.target.devices / (TOKENS_OF_RUN / self.config.tokens_per_step)


def report_fraction() -> float:
    """Returns how fast the report's run computed, as a fraction of the speed of the best kernels known.

    Communication that is not hidden is left out of both times.
    """
    plan = report_plan(REPORT_RUN)
    exposed = plan.expected.exposed
    return (plan.expected.total - exposed) / (plan.at_the_reports_pace - exposed)


def report_plan(config: PlanConfig) -> ReportPlan:
    """Returns the plan of a run on a mesh with stages, at the rank of the stage axis that holds most."""
    ranks = rank_layers(config.model, config.mesh.stage, dualpipe=config.schedule == "dualpipe")
    memories = [(state_memory(config, layers), activation_memory(config, layers)) for layers in ranks]
    fullest = max(range(len(ranks)), key=lambda rank: memories[rank][0].total + memories[rank][1].total)
    layers, (state, activations) = ranks[fullest], memories[fullest]
    flows = traffic(config, layers)
    best = Reached.by_best_kernels(config.target.accelerator)
    bound, expected = (step_time(config, layers, state, flows, reached) for reached in (Reached(), best))
    products, core, plain = operations(config)
    once = 3 * sum(forward_operations(config.model, config.sequence_length))
    recomputed = (products + core + plain) / once - 1
    return ReportPlan(config, fullest, layers, state, activations, flows, bound, expected, recomputed)


if __name__ == "__main__":
    main()
