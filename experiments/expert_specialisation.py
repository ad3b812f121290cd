"""Which experts serve which domain, balanced by a loss and without one (report section 4.5.3, appendix C, figure 9).

    python experiments/expert_specialisation.py [--scale tiny|small|1b] [--seeds 0 1]

Claim: without an auxiliary loss experts specialise: on one domain some carry many times the even load, while a model
balanced within every sequence spreads each domain over all experts. Drawn like figure 9: relative load (1 is even) of
every expert and layer, for three domains of the held out text.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from ablation import ArmResult, new_figure, parse_options, run_arms, run_of, show, spread, write_results
from corpora import DOMAINS
from flax import nnx

import dsv3_jax as dsv3
from dsv3_jax.data import prepare_data
from dsv3_jax.runs.folder import RunFolder

ARMS = {
    "loss-based": {"balance": "sequence", "schedule": {"balance_weight": 0.01, "bias_update_speed": 0.0}},
    "loss-free": {"balance": "none", "schedule": {"balance_weight": 0.0}},
}
ROWS = 32  # sequences a domain


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
        f"A domain's load lies {show(free, 2)} from the experts' mean over all domains in the loss-free model and "
        f"{show(based, 2)} in the loss-based one (0: no specialisation); the busiest expert of a domain has "
        f"{numbers['loss-free']['largest_relative_load']['mean']:.1f} and "
        f"{numbers['loss-based']['largest_relative_load']['mean']:.1f} times the even load: the loss-free model "
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
    """[domains, layers, experts]: each expert's tokens of held out text over the even share, the MTP module last."""
    folder = RunFolder(run.folder)
    config = folder.read_config()
    data = prepare_data(config.data, folder.cache, tokenizer_folder=folder.tokenizer)
    model, tokenizer, _ = dsv3.load_checkpoint(run.folder)
    load_of = nnx.jit(lambda model, tokens: model(tokens).routing.load)
    length = config.data.sequence_length
    loads = []
    for domain in DOMAINS:
        texts = [document.text for document in data.documents("validation") if document.domain == domain]
        ids = np.asarray(tokenizer.encode("\n".join(texts)), np.int32)
        rows = min(ROWS, len(ids) // length)
        load = np.asarray(load_of(model, jnp.asarray(ids[: rows * length].reshape(rows, length))), np.float64)
        loads.append(load / load.mean(axis=1, keepdims=True))
    return np.stack(loads)


def specialisation(loads: np.ndarray) -> float:
    """Mean distance of a domain's relative load from the same expert's mean over the domains."""
    return float(np.mean(np.abs(loads - loads.mean(axis=0))))


def draw(loads: dict[str, np.ndarray]):
    """Figure 9: a panel a model, rows are layers by domain, columns experts."""
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
