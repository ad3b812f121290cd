"""Shows which experts serve which domain, with an auxiliary loss and without (report section 4.5.3 and figure 9).

    python experiments/expert_specialisation.py [--scale tiny|small|1b] [--seeds 0 1]

Claim: without an auxiliary loss experts specialise: on text of one domain, some experts receive many times the mean
load. A model that is balanced within every sequence spreads each domain over all experts. The figure is drawn like
figure 9: the relative load (load / mean load) of every expert in every layer, for three domains of held-out text.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from ablation import ArmResult, new_figure, open_trained, parse_options, run_arms, run_of, show, spread, write_results
from corpora import DOMAINS
from flax import nnx

ARMS = {
    "loss-based": {"balance": "sequence", "schedule": {"balance_weight": 0.01, "bias_update_speed": 0.0}},
    "loss-free": {"balance": "none", "schedule": {"balance_weight": 0.0}},
}
ROWS = 32  # sequences per domain, at most


def main(argv: list[str] | None = None) -> None:
    options = parse_options("expert_specialisation", __doc__, argv)

    def arm(name: str):
        return lambda seed: run_of(options, seed, steps=300, **ARMS[name])

    results = run_arms(options, {name: arm(name) for name in ARMS})
    loads = {name: [relative_loads(run) for run in runs] for name, runs in results.items()}
    numbers = {}
    for name, of_seeds in loads.items():
        numbers[name] = {
            "specialisation": spread([specialisation(load) for load in of_seeds]),
            "largest_relative_load": spread([float(load.max()) for load in of_seeds]),
            "validation_loss": spread([run.validation_loss for run in results[name]]),
        }
        print(f"{name:12}", {measure: show(value, 3) for measure, value in numbers[name].items()})

    based, free = (numbers[name]["specialisation"] for name in ARMS)
    noise = max(based["standard_deviation"] or 0.0, free["standard_deviation"] or 0.0)
    difference = free["mean"] - based["mean"]
    seen = difference > 2 * noise > 0
    verdict = (
        f"An expert's relative load on one domain differs from its mean over all domains by {show(free, 2)} in the "
        f"loss-free model and by {show(based, 2)} in the loss-based one (0: no specialisation). The busiest expert of "
        f"a domain has {numbers['loss-free']['largest_relative_load']['mean']:.1f} and "
        f"{numbers['loss-based']['largest_relative_load']['mean']:.1f} times the even load. The loss-free model "
        + ("specialises more, as claimed" if seen else "does not specialise more beyond the noise of the seeds")
        + f", at scale {options.scale}."
    )
    mean_loads = {
        f"{name}, seed {seed}": dict(zip(DOMAINS, load.tolist(), strict=True))
        for name, of_seeds in loads.items()
        for seed, load in zip(options.seeds, of_seeds, strict=True)
    }
    figures = {"expert_specialisation": draw({name: of_seeds[0] for name, of_seeds in loads.items()})}
    write_results(options, figures, verdict, {"arms": numbers, "relative_load": mean_loads})


def relative_loads(run: ArmResult) -> np.ndarray:
    """Returns load / mean load of every expert on held-out text: [domains, layers, experts], the MTP module last."""
    model, rows = open_trained(run.folder)
    load_of = nnx.jit(lambda model, tokens: model(tokens).routing.load)
    loads = np.stack([load_of(model, jnp.asarray(rows[domain][:ROWS])) for domain in DOMAINS]).astype(np.float64)
    return loads / loads.mean(axis=-1, keepdims=True)


def specialisation(loads: np.ndarray) -> float:
    """Returns the mean absolute difference between an expert's relative load on a domain and its mean over domains."""
    return float(np.mean(np.abs(loads - loads.mean(axis=0))))


def draw(loads: dict[str, np.ndarray]):
    """Draws figure 9: one panel per model; rows are pairs of layer and domain, columns are experts."""
    figure, axes = new_figure(len(loads), width=6.0, height=3.4)
    for axis, (name, load) in zip(axes, loads.items(), strict=True):
        layers = load.shape[1]
        rows = load.transpose(1, 0, 2).reshape(-1, load.shape[2])
        image = axis.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=max(4.0, float(load.max())))
        labels = [f"layer {layer + 1}" if layer < layers - 1 else "MTP" for layer in range(layers)]
        axis.set_yticks(range(len(rows)), [f"{label}, {domain}" for label in labels for domain in DOMAINS], fontsize=7)
        axis.set(xlabel="expert", title=f"{name}: relative load")
        figure.colorbar(image, ax=axis)
    return figure


if __name__ == "__main__":
    main()
