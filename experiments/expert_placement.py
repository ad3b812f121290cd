"""Measures the load of every rank before and after experts are placed with redundant copies (report section 3.4; EPLB).

    python experiments/expert_placement.py [--scale tiny|small|1b] [--seeds 0 1]
    python experiments/expert_placement.py --loads loads.npy|runs/mine [--ranks 8 --nodes 2 --redundant 8 --groups 4]

The experts of a model may be balanced over its training batches and still be unbalanced over the requests it serves,
because each domain has its own experts. Two models are trained: one balanced by the bias as in the report, one not
balanced. Each serves held-out text of every domain, and the load of every expert is recorded. A placement is chosen
with the first half of a recording and judged on the second half. Three placements on simulated ranks are compared: in
order, without copies; hierarchical, where the experts of a routing group and their copies stay within one node, so
that node-limited routing still works; and global, where they may be anywhere. The script also checks that placing the
experts does not change the model's logits.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ablation import (
    RESULTS,
    Options,
    new_figure,
    open_trained,
    parse_more_options,
    run_arms,
    run_of,
    show,
    spread,
    write_results,
)
from command_line import CommandLine, whole_number
from corpora import DOMAINS
from flax import nnx
from jaxtyping import Array, Float, Int

import dsv3_jax as dsv3
from dsv3_jax.runs.evaluation import load_run_with_data
from dsv3_jax.sharding.placed_experts import with_placed_experts
from dsv3_jax.sharding.placement import Placement, place_experts

Recording = Float[np.ndarray, "windows layers E"]
"""The number of tokens that each expert served in each window of the text."""

ARMS = {
    "balanced by the bias": {"balance": "none", "schedule": {"balance_weight": 0.0}},
    "not balanced": {"balance": "none", "schedule": {"balance_weight": 0.0, "bias_update_speed": 0.0}},
}
WINDOWS = 8
POLICIES = ("in order", "hierarchical", "global")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The simulated devices that the experts are placed on.

    Attributes:
      ranks: number of devices that hold experts.
      nodes: number of nodes that these devices are in.
      groups: number of routing groups of the model.
      redundant: number of expert copies beyond the first of each expert.
    """

    ranks: int = 8
    nodes: int = 2
    groups: int = 4
    redundant: int = 8


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument(
        "--loads",
        type=Path,
        help="instead of training, read the loads from this .npy file ([layers, experts], or [windows, layers, "
        "experts] in the order of serving), or serve the held-out text of the run in this folder",
    )
    parser.add_argument(
        "--ranks", type=whole_number(1), default=Ranks().ranks, help="devices that hold experts (default: %(default)s)"
    )
    parser.add_argument(
        "--nodes", type=whole_number(1), default=Ranks().nodes, help="nodes that they are in (default: %(default)s)"
    )
    parser.add_argument(
        "--redundant",
        type=whole_number(0),
        default=Ranks().redundant,
        help="expert copies beyond the first of each expert (default: %(default)s)",
    )
    parser.add_argument(
        "--groups",
        type=whole_number(1),
        help="routing groups (default: the model's; for a .npy file, one per node)",
    )
    options, given = parse_more_options("expert_placement", parser, argv)
    chosen = Ranks(given.ranks, given.nodes, given.groups or given.nodes, given.redundant)
    try:
        if given.loads is None:
            of_trained_models(options, chosen, given.groups)
        else:
            of_given_loads(options, chosen, given.groups, given.loads)
    except dsv3.UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def of_trained_models(options: Options, ranks: Ranks, groups: int | None) -> None:
    """Runs the experiment: trains the models, records their loads by domain, and writes the results."""

    def arm(name: str):
        return lambda seed: run_of(options, seed, steps=200, **ARMS[name])

    results = run_arms(options, {name: arm(name) for name in ARMS})
    recordings: dict[str, list[Recording]] = {}
    differences = []
    for name, runs in results.items():
        served = [ServedTexts(*open_trained(run.folder)) for run in runs]
        ranks = dataclasses.replace(ranks, groups=groups or served[0].model.config.n_group)
        for domain in DOMAINS:
            found = recordings[f"{name}, {domain}"] = [each.record(domain) for each in served]
            np.save(options.runs / f"loads-{name.replace(' ', '_')}-{domain}.npy", found[0])
        placement = place("global", recordings[f"{name}, {DOMAINS[0]}"][0][: WINDOWS // 2].sum(axis=0), ranks)
        differences.append(served[0].change_of_logits(DOMAINS[0], placement))

    numbers = {
        name: {
            policy: {
                when: spread([imbalances(recording, ranks, policy)[when] for recording in of_seeds])
                for when in ("placed by", "served after")
            }
            for policy in POLICIES
        }
        for name, of_seeds in recordings.items()
    }
    for name, policies in numbers.items():
        print(f"{name:34}", {policy: show(found["served after"], 2) for policy, found in policies.items()})
    swept = {arm: sweep([recordings[f"{arm}, {domain}"][0] for domain in DOMAINS], ranks) for arm in ARMS}
    drawn = {f"{arm}, {DOMAINS[-1]}": recordings[f"{arm}, {DOMAINS[-1]}"][0] for arm in ARMS}
    write_results(
        options,
        {"expert_placement": draw(drawn, swept, ranks)},
        _verdict(numbers, ranks, max(differences)),
        {
            "ranks": dataclasses.asdict(ranks),
            "busiest_rank_over_mean": numbers,
            "largest_change_of_logits": max(differences),
            "served_after_by_redundant_experts": swept,
        },
    )


def of_given_loads(options: Options, ranks: Ranks, groups: int | None, path: Path) -> None:
    """Writes the same results for a recording or a run that the user has."""
    out = options.runs if options.out.parent == RESULTS else options.out  # keep the results of the experiment itself
    options = dataclasses.replace(options, out=out, seeds=())
    difference = None
    if path.is_dir():
        served = open_run(path)
        ranks = dataclasses.replace(ranks, groups=groups or served.model.config.n_group)
        recording = served.record(None)
        placement = place("global", recording[: WINDOWS // 2].sum(axis=0), ranks)
        difference = served.change_of_logits(None, placement)
    else:
        recording = read_loads(path)
    found = {policy: imbalances(recording, ranks, policy) for policy in POLICIES}
    after = {policy: values["served after"] for policy, values in found.items()}
    verdict = (
        f"The busiest of {ranks.ranks} ranks has {after['in order']:.2f} times the mean load with experts in order, "
        f"{after['hierarchical']:.2f} with {ranks.redundant} redundant experts placed within nodes, "
        f"{after['global']:.2f} with them placed anywhere" + ("" if difference is None else f"; {_change(difference)}")
    )
    numbers = {"ranks": dataclasses.asdict(ranks), "busiest_rank_over_mean": found}
    figures = {"expert_placement": draw({path.name: recording}, {path.name: sweep([recording], ranks)}, ranks)}
    write_results(options, figures, f"{verdict}.", numbers | {"loads": path.name})


def read_loads(path: Path) -> Recording:
    """Reads loads from a .npy file. A single window is repeated, so that the placement is judged on the same loads.

    Raises:
      UserError: the file does not exist or does not hold loads.
    """
    try:
        loads = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise dsv3.UserError(f"--loads {path}: {reason}; give a .npy file of loads, or the folder of a run") from error
    if loads.ndim not in (2, 3) or loads.dtype.kind not in "iuf" or 0 in loads.shape:
        raise dsv3.UserError(
            f"--loads {path}: the file must hold numbers [layers, experts] or [windows, layers, experts], "
            f"not {loads.dtype} {list(loads.shape)}"
        )
    loads = loads.astype(np.float64)
    if loads.ndim == 2:
        return np.stack([loads, loads])
    return np.concatenate([loads, loads]) if len(loads) == 1 else loads


def place(policy: str, load: Float[np.ndarray, "layers E"], ranks: Ranks) -> Placement:
    """Returns the placement of a policy; "in order" holds expert i on rank i // (E / ranks), without copies.

    Raises:
      UserError: the ranks do not divide the experts.
      ConfigError: the experts and copies cannot be divided over ranks and nodes.
    """
    layers, experts = load.shape
    if policy == "in order":
        if experts % ranks.ranks:
            raise dsv3.UserError(f"--ranks {ranks.ranks} must divide the {experts} experts evenly")
        logical = np.tile(np.arange(experts), (layers, 1))
        return Placement(ranks.ranks, logical, logical[:, :, None], np.ones_like(logical))
    within = {"groups": ranks.groups, "nodes": ranks.nodes} if policy == "hierarchical" else {}
    return place_experts(load, physical=experts + ranks.redundant, devices=ranks.ranks, **within)


def imbalances(recording: Recording, ranks: Ranks, policy: str) -> dict[str, float]:
    """Returns the busiest rank's load / mean load, averaged over layers.

    "placed by" is measured on the half of the recording that the placement was chosen with, "served after" on the
    other half.
    """
    half = len(recording) // 2
    before, after = recording[:half].sum(axis=0), recording[half:].sum(axis=0)
    placement = place(policy, before, ranks)
    return {
        "placed by": float(placement.imbalance(before).mean()),
        "served after": float(placement.imbalance(after).mean()),
    }


def sweep(recordings: list[Recording], ranks: Ranks) -> dict[str, dict[int, float]]:
    """Returns for each policy the imbalance on unseen text by number of redundant experts, averaged over recordings."""
    counts = [multiple * ranks.ranks for multiple in range(5)]
    found: dict[str, dict[int, float]] = {}
    for policy in POLICIES[1:]:
        found[policy] = {}
        for count in counts:
            changed = dataclasses.replace(ranks, redundant=count)
            values = [imbalances(recording, changed, policy)["served after"] for recording in recordings]
            found[policy][count] = float(np.mean(values))
    return found


@nnx.jit
def _serve(model: dsv3.DeepSeekV3, tokens: Int[Array, "B T"]) -> tuple[Array, Array]:
    """Returns the loads [layers, E] and the logits [B, T, V]."""
    out = model(tokens)
    assert out.routing is not None
    return out.routing.load, out.logits


@dataclasses.dataclass(frozen=True)
class ServedTexts:
    """A trained model and the held-out text that it serves.

    Attributes:
      rows: int32 token rows for each domain; the key None stands for all of a run's held-out text.
    """

    model: dsv3.DeepSeekV3
    rows: Mapping[str | None, Int[np.ndarray, "rows T"]]

    def record(self, domain: str | None) -> Recording:
        """Serves the text in windows of equal size and returns the loads of each."""
        windows = self._windows(domain)
        return np.stack([np.asarray(_serve(self.model, jnp.asarray(rows))[0], np.float64) for rows in windows])

    def change_of_logits(self, domain: str | None, placement: Placement) -> float:
        """Returns the largest absolute change of a logit when the experts are placed."""
        tokens = jnp.asarray(self._windows(domain)[0])
        logits = [_serve(model, tokens)[1] for model in (self.model, with_placed_experts(self.model, placement))]
        return float(jnp.abs(logits[1] - logits[0]).max())

    def _windows(self, domain: str | None) -> Int[np.ndarray, "windows rows T"]:
        """Cuts the domain's rows into WINDOWS parts of equal size."""
        rows = self.rows[domain]
        count = len(rows) // WINDOWS
        if not count:
            raise dsv3.UserError(
                f"a recording needs at least {WINDOWS} rows of held-out text, but there are {len(rows)}; "
                "serve a run with more validation data"
            )
        return rows[: count * WINDOWS].reshape(WINDOWS, count, -1)


def open_run(folder: Path) -> ServedTexts:
    """Returns the model of a run's newest checkpoint and the run's validation rows.

    Raises:
      UserError: the folder holds no run or no checkpoint, or the run's data cannot be read any more.
    """
    loaded, data = load_run_with_data(folder)
    return ServedTexts(loaded.model, {None: data.validation_rows()[0][:, :-1]})


def draw(recordings: dict[str, Recording], swept: dict[str, dict[str, dict[int, float]]], ranks: Ranks):
    """Draws one panel per recording (load / mean load of every rank, in the layer that is least even in order) and one
    with the sweeps over the number of redundant experts."""
    figure, axes = new_figure(len(recordings) + 1, width=4.4, height=3.4)
    for axis, (name, recording) in zip(axes, recordings.items(), strict=False):
        half = len(recording) // 2
        before, after = recording[:half].sum(axis=0), recording[half:].sum(axis=0)
        layer = int(place("in order", before, ranks).imbalance(before).argmax())
        for shift, policy in enumerate(POLICIES):
            load = place(policy, before, ranks).device_loads(after)[layer]
            axis.bar(np.arange(ranks.ranks) + 0.27 * (shift - 1), load / load.mean(), width=0.27, label=policy)
        axis.axhline(1, color="black", linewidth=0.6)
        axis.set(xlabel="rank", ylabel="load / mean load", title=f"{name}: its least even layer")
        axis.title.set_fontsize(9)
    axes[0].legend(fontsize=7)
    for (name, curves), style in zip(swept.items(), ("-", "--"), strict=False):
        for policy, colour in zip(POLICIES[1:], ("tab:orange", "tab:green"), strict=True):
            values = curves[policy]
            axes[-1].plot(
                list(values), list(values.values()), style, marker="o", color=colour, label=f"{name}: {policy}"
            )
    axes[-1].set(xlabel="redundant experts", ylabel="busiest rank / mean", title="all layers, unseen text")
    axes[-1].title.set_fontsize(9)
    axes[-1].legend(fontsize=7)
    return figure


def _verdict(numbers: dict[str, Any], ranks: Ranks, difference: float) -> str:
    """Returns the result in words."""

    def after(arm: str, policy: str) -> float:
        return float(np.mean([numbers[f"{arm}, {domain}"][policy]["served after"]["mean"] for domain in DOMAINS]))

    parts = [
        f"{arm}: {after(arm, 'in order'):.2f} in order, {after(arm, 'hierarchical'):.2f} hierarchical, "
        f"{after(arm, 'global'):.2f} global"
        for arm in ARMS
    ]
    lower = all(after(arm, policy) < after(arm, "in order") for arm in ARMS for policy in POLICIES[1:])
    return (
        f"When serving one domain, the busiest of {ranks.ranks} ranks has this many times the mean load, on text that "
        f"was not used to choose the placement, with {ranks.redundant} redundant experts: {'; '.join(parts)}. "
        f"Redundant experts {'even out' if lower else 'do not always even out'} the load of the ranks; "
        f"{_change(difference)}."
    )


def _change(difference: float) -> str:
    return f"the logits change by at most {difference:.1e}" if difference else "the logits do not change"


if __name__ == "__main__":
    main()
