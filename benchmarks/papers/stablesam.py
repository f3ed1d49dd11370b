"""StableSAM: which learning rates SAM can take, on a quadratic and on a real network.

    python -m benchmarks.papers.stablesam [--smoke] [--data-dir DIR] [--resume]

Tan et al., Stabilizing Sharpness-aware Minimization Through A Simple Renormalization Strategy, 2024
(https://arxiv.org/abs/2401.07250). Learning-rate limits on a quadratic, with unnormalized SAM; and a residual network
on a subset of CIFAR-10 over a grid of learning rates, with normalized SAM, a cosine schedule and weight decay.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tqdm
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import optax_sam
from benchmarks.papers import training
from benchmarks.papers.descent import descend
from benchmarks.papers.reproduction import (
    UNDECIDED,
    Claim,
    Reproduction,
    paired_verdict,
    spread,
    verdict,
)
from examples.training import style
from examples.training.report import interval

CURVATURES, QUADRATIC_RHO, QUADRATIC_STEPS = (10.0, 1.0), 0.1, 400
QUADRATIC_LINKS = {
    "GD": optax.identity(),
    "USAM": optax_sam.usam(QUADRATIC_RHO),
    "renormalized USAM": optax_sam.renormalized(optax_sam.usam(QUADRATIC_RHO)),
}
CONVERGED = 0.5  # of the distance at the start; at the limits it stays, at the smallest learning rate it is 0.1
# By the paper: step sizes below 2/λ converge, those of USAM below 2/(λ(1 + ρλ)).
PREDICTED = {"GD": 0.2, "USAM": 0.1, "renormalized USAM": 0.2}

NUM_IMAGES, EPOCHS, SEEDS, RHO = 5_000, 12, 3, 0.1
LEARNING_RATES = (0.02, 0.1, 0.5, 1.0, 2.0)
LINKS = {
    "sgd": optax.identity(),
    "sam": optax_sam.sam(RHO),
    "stable_sam": optax_sam.stable_sam(RHO),
    "truncated": optax_sam.stable_sam(RHO, max_scale=1.0),
}
COLORS = {"sgd": style.PLAIN, "sam": style.SAM, "stable_sam": style.STABLE, "truncated": style.LATE}
TITLES = {"sgd": "SGD", "sam": "SAM", "stable_sam": "StableSAM", "truncated": "StableSAM, scale ≤ 1"}
CHANCE = 0.1  # the accuracy of guessing

Results = dict[str, dict[str, dict[str, list[float]]]]


@functools.partial(jax.jit, static_argnums=0)
def final_distance(link: optax.GradientTransformation, learning_rate: jax.Array) -> jax.Array:
    """‖w‖ / ‖w₀‖ after gradient descent with the link on L(w) = ½ Σ λᵢ wᵢ²."""
    path = descend(
        lambda w: jnp.array(CURVATURES) @ w**2 / 2, jnp.ones(2), link, optax.sgd(learning_rate), QUADRATIC_STEPS
    )
    return jnp.linalg.norm(path[-1]) / jnp.linalg.norm(path[0])


def quadratic() -> dict[str, Any]:
    """The final distances over a grid of learning rates, and the largest rate of the grid that converges."""
    rates = np.round(np.arange(0.005, 0.2401, 0.0025), 4)
    distances, limits = {}, {}
    with jax.enable_x64(True):
        for name, link in QUADRATIC_LINKS.items():
            distances[name] = [float(final_distance(link, rate)) for rate in rates]
            limits[name] = float(rates[np.array(distances[name]) < CONVERGED][-1])
    return {"learning_rates": rates.tolist(), "distances": distances, "limits": limits}


def network(task: training.Task, trainer: training.Trainer, rates: Sequence[float], seeds: Sequence[int]) -> Results:
    """Final test accuracies and training losses by link and learning rate, (seeds,) each."""
    results: Results = {name: {} for name in LINKS}
    total = len(LINKS) * len(rates) * len(seeds) * task.epochs
    with tqdm.tqdm(total=total, desc="networks", unit=" epochs", disable=None) as bar:
        for rate in rates:
            optimizer = training.decayed_sgd(task, rate)
            for name, link in LINKS.items():
                runs = [training.Run(f"{name}-{rate}-{seed}", link, optimizer, seed) for seed in seeds]
                histories = [trainer.train(run, bar).history for run in runs]
                results[name][str(rate)] = {
                    key: [history[key][-1] for history in histories] for key in ("test_accuracy", "train_loss")
                }
    return results


def accuracies(results: Results, name: str, rate: float) -> np.ndarray:
    """In percent, (seeds,)."""
    return 100 * np.array(results[name][str(rate)]["test_accuracy"])


def best_rate(results: Results, name: str) -> float:
    """The learning rate with the largest mean accuracy."""
    return max(map(float, results[name]), key=lambda rate: accuracies(results, name, rate).mean())


def claims(toy: dict[str, Any], results: Results) -> list[Claim]:
    return [quadratic_claim(toy), better_claim(results), *range_claims(results)]


def quadratic_claim(toy: dict[str, Any]) -> Claim:
    limits, step = toy["limits"], toy["learning_rates"][1] - toy["learning_rates"][0]
    shown = ", ".join(f"{name} {limit:g}" for name, limit in limits.items())
    return Claim(
        "On a quadratic with largest curvature 10 and rho = 0.1, GD converges for learning rates below 0.2, USAM below "
        "0.1, and renormalized USAM again below 0.2.",
        f"Largest learning rates that converge, in steps of {step:g}: {shown}.",
        verdict(all(0 < PREDICTED[name] - limits[name] <= 1.01 * step for name in limits)),
    )


def better_claim(results: Results) -> Claim:
    rates = {name: best_rate(results, name) for name in ("sgd", "sam")}
    sgd, sam = (accuracies(results, name, rate) for name, rate in rates.items())
    return Claim(
        "SAM (normalized) is better than SGD, each at its best learning rate.",
        f"Test accuracy: SGD {spread(sgd, 1)} % at {rates['sgd']:g}, SAM {spread(sam, 1)} % at {rates['sam']:g} "
        f"({len(sam)} seeds; learning rates chosen on the same test set).",
        paired_verdict((sam - sgd).tolist()),
    )


def range_claims(results: Results) -> list[Claim]:
    """What becomes of each link at the learning rates above SAM's best one: means over them, by seed."""
    claims = {
        "sgd": "Above SAM's best learning rate SAM (normalized) loses more accuracy than SGD: its range is smaller.",
        "stable_sam": "There StableSAM (normalized) does better than SAM.",
        "truncated": "There StableSAM (normalized) with a scale of at most 1 does better than SAM.",
    }
    best = best_rate(results, "sam")
    above = [rate for rate in map(float, results["sam"]) if rate > best]
    if not above:
        measured = f"SAM is best at {best:g}, the largest learning rate of all."
        return [Claim(claim, measured, UNDECIDED) for claim in claims.values()]
    means = {name: np.mean([accuracies(results, name, rate) for rate in above], axis=0) for name in LINKS}
    lost = {name: accuracies(results, name, best) - means[name] for name in LINKS}
    rates = ", ".join(f"{rate:g}" for rate in above)
    shown = "; ".join(f"{TITLES[name]} {spread(means[name], 1)}" for name in LINKS)
    falls = "; ".join(f"{TITLES[name]} {spread(lost[name], 1)}" for name in LINKS)
    measured = (
        f"Mean test accuracy (%) at {rates}: {shown}; less than at {best:g}: {falls} ({len(means['sam'])} seeds)."
    )
    gains = {"sgd": lost["sam"] - lost["sgd"]}
    gains |= {name: means[name] - means["sam"] for name in ("stable_sam", "truncated")}
    return [Claim(claim, measured, paired_verdict(gains[name].tolist())) for name, claim in claims.items()]


def figure(toy: dict[str, Any], results: Results) -> Figure:
    drawing, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    styles = {"GD": (style.PLAIN, "-"), "USAM": (style.UNNORMALIZED, "-"), "renormalized USAM": (style.STABLE, "--")}
    for name, (color, line) in styles.items():
        distances = np.clip([np.inf if x is None else x for x in toy["distances"][name]], 1e-16, 1e16)
        axes[0].semilogy(toy["learning_rates"], distances, label=name, color=color, linestyle=line)
        axes[0].axvline(PREDICTED[name], color=color, linestyle=":", linewidth=1)
    axes[0].axhline(1, color="black", linewidth=0.5)
    axes[0].set(title="Quadratic, dotted: limits by the paper", xlabel="learning rate")
    axes[0].set(ylabel=f"‖w‖ / ‖w₀‖ after {QUADRATIC_STEPS} steps", ylim=(1e-16, 1e20))
    _curves(axes[1], results)
    axes[1].axhline(100 * CHANCE, color="black", linewidth=0.5)
    seeds = len(next(iter(results["sgd"].values()))["test_accuracy"])
    axes[1].set(title=f"ResNet, {seeds} seeds and their mean", ylabel="test accuracy (%)")
    _differences(axes[2], results)
    axes[2].set(title="difference to SAM, paired, 95 % intervals", ylabel="difference of test accuracy (points)")
    style.tidy(*axes)
    axes[0].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0, 0.75), handlelength=1.5)
    axes[1].legend(frameon=False)
    return drawing


def _over_rates(axis: Axes, results: Results) -> list[float]:
    """The learning rates, which become the x axis."""
    rates = list(map(float, results["sgd"]))
    axis.set(xscale="log", xlabel="learning rate")
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    return rates


def _curves(axis: Axes, results: Results) -> None:
    rates = _over_rates(axis, results)
    for name, color in COLORS.items():
        values = np.array([accuracies(results, name, rate) for rate in rates])
        axis.plot(rates, values.mean(axis=1), color=color, label=TITLES[name])
        axis.plot(rates, values, ".", color=color, alpha=0.6)


def _differences(axis: Axes, results: Results) -> None:
    """Where an interval is without zero, the links differ."""
    rates = _over_rates(axis, results)
    for shift, (name, color) in enumerate((name, color) for name, color in COLORS.items() if name != "sam"):
        for rate in rates:
            differences = accuracies(results, name, rate) - accuracies(results, "sam", rate)
            low, high = interval(differences)
            x = rate * 1.08 ** (shift - 1)
            axis.plot([x, x], [low, high], color=color, lw=2, alpha=1 if low > 0 or high < 0 else 0.35)
            axis.plot(x, np.mean(differences), "o", color=color, ms=5)
    axis.axhline(0, color=COLORS["sam"], lw=1)
    axis.set_ylim(-25, 25)


def main(arguments: Sequence[str] | None = None) -> None:
    reproduction = Reproduction("stablesam", __doc__, arguments)
    rates, seeds = reproduction.few(LEARNING_RATES), reproduction.few(range(SEEDS))
    task = training.cifar10(reproduction, NUM_IMAGES, EPOCHS, augments=False)
    settings = {**task.settings(), "rho": RHO, **training.SGD_SETTINGS}
    trainer = training.Trainer(task, reproduction.folder / "runs", settings, evaluations=1)
    settings = {**settings, "learning_rates": rates, "seeds": seeds}
    toy = quadratic()
    results = reproduction.part("network", settings, lambda: network(task, trainer, rates, seeds))
    record = {"quadratic": toy, "network": {**settings, **results}}
    reproduction.finish(record, claims(toy, results), figure(toy, results))


if __name__ == "__main__":
    main()
