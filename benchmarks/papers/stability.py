"""Stability of SAM: saddles that attract it, how slowly it leaves one, and training without momentum.

    python -m benchmarks.papers.stability [--smoke] [--data-dir DIR] [--resume]

Kim, Park, Choi and Lee, Stability Analysis of Sharpness-Aware Minimization, 2023 (https://arxiv.org/abs/2301.06308).
The toys are in ``stability_toys.py``. Here is the network without normalization, on a part of CIFAR-10: momentum, batch
size and the rho of normalized SAM (``sam``), with a constant learning rate and no weight decay.
"""

import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import tqdm
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import optax_sam
from benchmarks.papers import stability_toys, training
from benchmarks.papers.reproduction import Claim, Reproduction, joint_verdict, paired_verdict, spread
from examples.training.style import COLORS

NUM_IMAGES, EPOCHS, SEEDS, LEARNING_RATE = 5_000, 20, 4, 0.05
MOMENTA, RHOS, BATCH_SIZES = (0.0, 0.9), (0.0, 0.1, 0.2, 0.5), (128, 32)


class Plain(nn.Module):
    """3×3 convolutions without normalization, each at half the resolution of the one before by its stride."""

    widths: Sequence[int] = (16, 32, 32)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (3, 3), 2)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def setting(momentum: float, rho: float, batch_size: int) -> str:
    return f"momentum {momentum:g}, rho {rho:g}, batch {batch_size}"


def attraction(trainer: training.Trainer, params: Any, rho: float) -> dict[str, float]:
    """The most negative curvature λ of the training loss, and ρ/‖g‖ for gradients of a batch and of many examples.

    SAM moves along the direction of λ as unnormalized SAM with that rho: inwards if ρ/‖g‖ is above 1/|λ|.
    """
    loss_fn, batches, size = trainer.task.clean_loss_fn, trainer.hessian_batches(), trainer.task.batch_size
    found = optax_sam.hessian_eigenvalues(loss_fn, params, batches, num_smallest=1, rtol=0.03)
    images, labels = (part[: training.HESSIAN_EXAMPLES] for part in (trainer.images, trainer.labels))
    norm = jax.jit(lambda *batch: optax.tree.norm(jax.grad(loss_fn)(params, batch)))
    norms = [norm(images[start:][:size], labels[start:][:size]) for start in range(0, len(images) - size + 1, size)]
    return {
        "smallest_eigenvalue": float(found.values[-1]),
        "ratio": float(np.mean(rho / np.array(norms))),
        "full_ratio": float(rho / norm(images, labels)),
    }


def networks(
    task: training.Task, folder: pathlib.Path, settings: dict[str, Any], rhos: Sequence[float], seeds: int
) -> dict[str, Any]:
    """Training loss and test accuracy at the end, (seeds,) for every momentum, rho and batch size."""
    links = {rho: optax_sam.sam(rho) if rho else optax.identity() for rho in rhos}
    optimizers = {momentum: optax.sgd(LEARNING_RATE, momentum or None) for momentum in MOMENTA}
    trainers = {
        size: training.Trainer(task._replace(batch_size=size), folder, settings, evaluations=2) for size in BATCH_SIZES
    }
    results: dict[str, Any] = {"attraction": []}
    total = len(MOMENTA) * len(rhos) * len(BATCH_SIZES) * seeds * task.epochs
    with tqdm.tqdm(total=total, desc="networks", unit=" epochs", disable=None) as bar:
        for batch_size, momentum, rho in itertools.product(BATCH_SIZES, MOMENTA, rhos):
            trainer, key = trainers[batch_size], setting(momentum, rho, batch_size)
            name = key.replace(", ", "-").replace(" ", "-")
            runs = [training.Run(f"{name}-{seed}", links[rho], optimizers[momentum], seed) for seed in range(seeds)]
            trained = [trainer.train(run, bar) for run in runs]
            scores = ("train_loss", "test_accuracy")
            results[key] = {score: [one.history[score][-1] for one in trained] for score in scores}
            if (batch_size, momentum, rho) == (BATCH_SIZES[0], MOMENTA[0], rhos[-1]):
                results["attraction"] = [attraction(trainer, one.params, rho) for one in trained]
    return results


def network_claims(results: dict[str, Any], rhos: Sequence[float]) -> list[Claim]:
    """For each rho, from differences between runs of the same seed."""
    (none, some), (large, small) = MOMENTA, BATCH_SIZES

    def scores(key: str, momentum: float, rho: float, batch_size: int) -> np.ndarray:
        return np.array(results[setting(momentum, rho, batch_size)][key])

    def gain(momentum: float, rho: float, batch_size: int) -> np.ndarray:
        accuracy = scores("test_accuracy", momentum, rho, batch_size)
        return 100 * (accuracy - scores("test_accuracy", none, rho, large))

    def both(quantity: str, sam: np.ndarray, sgd: np.ndarray, digits: int) -> str:
        return f"{quantity}: SAM {spread(sam, digits)}, SGD {spread(sgd, digits)} ({len(sam)} seeds)."

    claims = []
    for rho in rhos[1:]:
        sam, sgd = (scores("train_loss", none, key, large) for key in (rho, 0.0))
        claims.append(
            Claim(
                f"Without momentum, normalized SAM (rho {rho}) trains worse than SGD.",
                both(f"Training loss, batch size {large}", sam, sgd, digits=3),
                paired_verdict((sam - sgd).tolist()),
            )
        )
        for claim, changed, momentum, batch_size in (
            ("Momentum", f"momentum {some} instead of {none:g}, batch size {large}", some, large),
            ("A smaller batch", f"batch size {small} instead of {large}, as many epochs, no momentum", none, small),
        ):
            sam, sgd = (gain(momentum, key, batch_size) for key in (rho, 0.0))
            losses = [scores("train_loss", *key).mean() for key in ((none, rho, large), (momentum, rho, batch_size))]
            measured = both(f"Points of test accuracy from {changed}", sam, sgd, digits=1)
            verdicts = [paired_verdict(values.tolist()) for values in (sam, sam - sgd)]
            claims.append(
                Claim(
                    f"{claim} gains SAM (rho {rho}) accuracy, and more than SGD.",
                    f"{measured} SAM's training loss: {losses[1]:.2f} instead of {losses[0]:.2f}.",
                    joint_verdict(verdicts),
                )
            )
    return claims


def saddle_claim(results: dict[str, Any], rho: float) -> Claim:
    """Whether linearized, on average over batches, SAM is drawn to where it ended."""
    curvatures = -np.array([one["smallest_eigenvalue"] for one in results["attraction"]])
    pull, full_pull = (
        (curvatures * [one[key] for one in results["attraction"]]).tolist() for key in ("ratio", "full_ratio")
    )
    losses = results[setting(MOMENTA[0], rho, BATCH_SIZES[0])]["train_loss"]
    return Claim(
        f"Without momentum, normalized SAM (rho {rho}) ends at a saddle that attracts it: a curvature λ < 0 with "
        "|λ|ρ/‖g‖ > 1.",
        f"Batch size {BATCH_SIZES[0]}: λ = {spread((-curvatures).tolist(), 3)}, |λ|ρ/‖g‖ {spread(pull, 2)} for g of a "
        f"batch, {spread(full_pull, 1)} of {training.HESSIAN_EXAMPLES:,} examples ({len(pull)} seeds); "
        f"training loss {spread(losses, 3)}, of guessing {np.log(10):.3f}.",
        paired_verdict((np.array(pull) - 1).tolist()),
    )


def draw_networks(axes: Sequence[Axes], results: dict[str, Any], rhos: Sequence[float]) -> None:
    panels = ("train_loss", 1, "training loss"), ("test_accuracy", 100, "test accuracy (%)")
    for axis, (key, scale, label) in zip(axes, panels, strict=True):
        for momentum, batch_size in itertools.product(MOMENTA, BATCH_SIZES):
            values = scale * np.array([results[setting(momentum, rho, batch_size)][key] for rho in rhos])
            axis.errorbar(
                range(len(rhos)),
                values.mean(axis=1),
                yerr=values.std(axis=1, ddof=1) if values.shape[1] > 1 else None,
                color=COLORS["late_sam" if momentum else "sam"],
                linestyle="-" if batch_size == BATCH_SIZES[0] else "--",
                marker="o",
                markersize=4,
                capsize=3,
                label=f"momentum {momentum:g}, batch {batch_size}",
            )
        axis.set(title=f"Plain CNN: {label}", xlabel="ρ of SAM (0: SGD)")
        axis.set_xticks(range(len(rhos)), [f"{rho:g}" for rho in rhos])


def draw(results: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    stability_toys.draw_paths(axes[0], results["saddle"], results["beale"])
    stability_toys.draw_diffusion(axes[1, 0], results["diffusion"])
    draw_networks(axes[1, 1:], results["networks"], results["network_settings"]["rhos"])
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False, handlelength=3)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    reproduction = Reproduction("stability", __doc__, arguments)
    particles, rhos, seeds = (2_000, RHOS[::3], 2) if reproduction.smoke else (stability_toys.PARTICLES, RHOS, SEEDS)
    task = training.cifar10(reproduction, NUM_IMAGES, EPOCHS, augments=False)._replace(network=Plain())
    settings = {**task.settings(), "seeds": seeds, "learning_rate": LEARNING_RATE}
    settings |= {"rhos": rhos, "momenta": MOMENTA, "batch_sizes": BATCH_SIZES}
    del settings["batch_size"]
    train = functools.partial(networks, task, reproduction.folder / "checkpoints", settings, rhos, seeds)
    diffuse = functools.partial(stability_toys.diffusions, particles)
    results = {
        "saddle": reproduction.part("saddle", {"steps": stability_toys.SADDLE_STEPS}, stability_toys.saddle_paths),
        "beale": reproduction.part("beale", {"steps": stability_toys.BEALE_STEPS}, stability_toys.beale_paths),
        "diffusion": reproduction.part("diffusion", {"particles": particles}, diffuse),
        "network_settings": settings,
        "networks": reproduction.part("networks", settings, train),
    }
    claims = stability_toys.path_claims(results["saddle"], results["beale"])
    claims += stability_toys.diffusion_claims(results["diffusion"])
    claims += [*network_claims(results["networks"], rhos), saddle_claim(results["networks"], rhos[-1])]
    reproduction.finish(results, claims, draw(results))


if __name__ == "__main__":
    main()
