r"""The toys of ``stability.py``: saddles that attract SAM, and how it diffuses away from one.

On x² − y² and Beale's function, in float64: normalized SAM (``sam``), unnormalized SAM (``usam``) and renormalized SAM
(``stable_sam``). On a quadratic: the variance along an eigenvector of SGD and of unnormalized SAM that start at its
saddle, with gradient noise of covariance |H|/B, against the paper's formula

.. math::
    σ²(t) = \frac{η |λ|}{2 B λ (1 + ρλ)^2} \left(1 - e^{-2 λ (1 + ρλ)^2 t}\right)
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from matplotlib.axes import Axes

import optax_sam
from benchmarks.papers.descent import descend
from benchmarks.papers.reproduction import Claim, rounded, verdict
from examples.training.style import COLORS

SADDLE_START, SADDLE_RATE, SADDLE_STEPS = (-3.0, -0.01), 0.01, 500
SADDLE_LINKS = {
    "GD": optax.identity(),
    "SAM ρ = 0.5": optax_sam.sam(0.5),
    "USAM ρ = 0.4": optax_sam.usam(0.4),
    "USAM ρ = 0.6": optax_sam.usam(0.6),
}
ATTRACTED = ("SAM ρ = 0.5", "USAM ρ = 0.6")  # by the paper
CRITICAL_RHO = 0.5
SADDLE_COLORS = (COLORS["sgd"], COLORS["sam"], COLORS["usam"], COLORS["msam"])

BEALE_START, BEALE_SADDLE, BEALE_MINIMUM = (1.0, 2.0), (0.0, 1.0), (3.0, 0.5)
BEALE_RATE, BEALE_STEPS = 1.25e-5, 100_000
BEALE_RUNS = {
    "GD": (optax.identity(), None),
    "SAM ρ = 0.1": (optax_sam.sam(0.1), None),
    "SAM ρ = 0.5": (optax_sam.sam(0.5), None),
    "SAM ρ = 1": (optax_sam.sam(1.0), None),
    "StableSAM ρ = 0.5": (optax_sam.stable_sam(0.5), None),
    "SAM ρ = 0.5, momentum 0.9": (optax_sam.sam(0.5), 0.9),
    "SAM ρ = 0.5, momentum 0.95": (optax_sam.sam(0.5), 0.95),
}
BEALE_COLORS = (
    *(COLORS[name] for name in ("sgd", "usam", "sam")),
    "#332288",
    COLORS["stable_sam"],
    "#e69f00",
    "#d55e00",
)
NEAR = 0.1  # to the saddle, for good: trapped
TRAPPED = ("SAM ρ = 0.5", "SAM ρ = 1", "StableSAM ρ = 0.5", "SAM ρ = 0.5, momentum 0.9")  # by the paper

CURVATURES, DIFFUSION_RATE, DIFFUSION_TIME, PARTICLES = (1.0, -1.0), 1e-3, 2.0, 20_000
DIFFUSION_RHOS, DIFFUSION_BATCHES, NUM_TIMES, STANDARD_ERRORS = (0.0, 0.2, 0.5), (32, 128), 20, 4
RHO_COLORS = (COLORS["sgd"], COLORS["usam"], COLORS["msam"])


def saddle(w: jax.Array) -> jax.Array:
    """x² − y²."""
    return w[0] ** 2 - w[1] ** 2


def beale(w: Any) -> Any:
    """Beale's function: its minimum is at (3, 0.5), and it has a saddle at (0, 1)."""
    x, y = w
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def path_from(start: Sequence[float], loss_fn: Any, *args: Any) -> np.ndarray:
    """The path of ``descend(loss_fn, start, *args)`` in float64."""
    with jax.enable_x64(True):
        return np.asarray(jax.jit(lambda w: descend(loss_fn, w, *args))(jnp.array(start, jnp.float64)))


def kept(steps: int) -> np.ndarray:
    """The steps at which points of a path are shown: more of the first ones, and the last."""
    return np.unique(np.geomspace(1, steps + 1, 150).astype(int)) - 1


def saddle_paths() -> dict[str, Any]:
    """Paths on x² − y², and by which factor a step of USAM stretches y, for a range of rho."""
    optimizer = optax.sgd(SADDLE_RATE)
    results: dict[str, Any] = {"paths": {}, "final_y": {}, "rhos": np.linspace(0.3, 0.7, 9).round(3).tolist()}
    for name, link in SADDLE_LINKS.items():
        path = path_from(SADDLE_START, saddle, link, optimizer, SADDLE_STEPS)
        results["paths"][name] = rounded(path[kept(SADDLE_STEPS)])
        results["final_y"][name] = float(np.abs(path[-1, 1]))
    ends = [
        path_from(SADDLE_START, saddle, optax_sam.usam(rho), optimizer, SADDLE_STEPS)[-1, 1] for rho in results["rhos"]
    ]
    factors = (np.array(ends) / SADDLE_START[1]) ** (1 / SADDLE_STEPS)
    results["critical_rho"] = float(np.interp(-1, -factors, results["rhos"]))
    return results


def beale_paths() -> dict[str, Any]:
    """Paths on Beale's function; the distance to the saddle at the end, and the largest of the last tenth."""
    results: dict[str, Any] = {}
    for name, (link, momentum) in BEALE_RUNS.items():
        path = path_from(BEALE_START, beale, link, optax.sgd(BEALE_RATE, momentum), BEALE_STEPS)
        distances = np.linalg.norm(path - BEALE_SADDLE, axis=1)
        results[name] = {
            "path": rounded(path[kept(BEALE_STEPS)]),
            "distances": rounded(distances[kept(BEALE_STEPS)]),
            "end": path[-1].tolist(),
            "to_saddle": float(distances[-BEALE_STEPS // 10 :].max()),
            "to_minimum": float(np.linalg.norm(path[-1] - BEALE_MINIMUM)),
        }
    return results


def variance_by_formula(curvature: float, rho: float, batch_size: int, times: np.ndarray, power: int = 2) -> np.ndarray:
    """σ²(t) along an eigenvector; with ``power`` 2, as the paper has it, the rate is λ(1 + ρλ)²."""
    rate = curvature * (1 + rho * curvature) ** power
    return DIFFUSION_RATE * abs(curvature) / (2 * batch_size * rate) * -np.expm1(-2 * rate * times)


@functools.partial(jax.jit, static_argnames=("particles", "differentiated"))
def diffusion(rho: Any, batch_size: Any, key: jax.Array, particles: int, differentiated: bool = False) -> jax.Array:
    """Variances of particles along both eigenvectors, (times, 2), as SGD or unnormalized SAM leaves the saddle.

    A step is w ← w − η (∇L(w + ρ∇L(w)) + noise). The params are the coordinates of all particles and the loss the sum
    of theirs, so that the unnormalized perturbation of each is its own. With ``differentiated`` the gradient is that
    of L(w + ρ∇L(w)) as a function of w; SAM leaves out its factor 1 + ρ∇²L(w).
    """
    curvatures = jnp.array(CURVATURES)
    noise_scale = jnp.sqrt(jnp.abs(curvatures) / batch_size)[None]
    loss_fn = lambda w: 0.5 * jnp.sum(curvatures[None] * w**2)  # noqa: E731
    gradient, link = jax.grad(loss_fn), optax_sam.usam(rho)
    if differentiated:
        gradient, link = jax.grad(lambda w: loss_fn(w + rho * jax.grad(loss_fn)(w))), optax.identity()
    tx = optax.chain(link, optax.sgd(DIFFUSION_RATE))

    def step(carry, key):
        w, state = carry
        updates, state = tx.update(gradient(w), state, w, grad_fn=gradient)
        noise = noise_scale * jax.random.normal(key, w.shape)
        moved: Any = optax.apply_updates(w, updates)
        return (moved - DIFFUSION_RATE * noise, state), None

    def until_next_time(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, jnp.mean(carry[0] ** 2, axis=0)

    keys = jax.random.split(key, (NUM_TIMES, round(DIFFUSION_TIME / DIFFUSION_RATE / NUM_TIMES)))
    start = jnp.zeros((particles, len(CURVATURES)))
    return jax.lax.scan(until_next_time, (start, tx.init(start)), keys)[1]


def diffusions(particles: int) -> dict[str, Any]:
    """Simulated variances of every rho and batch size, and their largest relative errors to the formulas."""
    times = np.linspace(0, DIFFUSION_TIME, NUM_TIMES + 1)[1:]
    results: dict[str, Any] = {"times": times.round(6).tolist(), "standard_error": math.sqrt(2 / particles), "runs": []}
    cases = list(itertools.product(DIFFUSION_RHOS, DIFFUSION_BATCHES, (False, True)))
    cases = [case for case in cases if case[0] or not case[2]]
    for seed, (rho, batch_size, differentiated) in enumerate(tqdm.tqdm(cases, desc="diffusion", disable=None)):
        variances = np.array(diffusion(rho, batch_size, jax.random.key(seed), particles, differentiated))
        errors = {}
        for power in (1, 2):
            formula = [variance_by_formula(curvature, rho, batch_size, times, power) for curvature in CURVATURES]
            errors[str(power)] = float(np.abs(variances / np.stack(formula, axis=1) - 1).max())
        run = {"rho": rho, "batch_size": batch_size, "differentiated": differentiated, "largest_errors": errors}
        results["runs"].append(run | {"variances": rounded(variances)})
    return results


def path_claims(saddles: dict[str, Any], beales: dict[str, Any]) -> list[Claim]:
    start = abs(SADDLE_START[1])
    attracted = {name for name, y in saddles["final_y"].items() if y < start}
    trapped = {name: run["to_saddle"] < NEAR for name, run in beales.items()}

    def beale_claim(text: str, names: Sequence[str]) -> Claim:
        ends = "; ".join(f"{name}: {beales[name]['to_saddle']:.1g}" for name in names)
        measured = f"Largest distance to the saddle in the last tenth of {BEALE_STEPS:,} steps: {ends}."
        return Claim(text, measured, verdict(all(trapped[name] == (name in TRAPPED) for name in names)))

    return [
        Claim(
            "The saddle of x² − y² attracts normalized SAM, and unnormalized SAM above rho = 0.5; GD leaves it.",
            f"|y| after {SADDLE_STEPS} steps from {start}: "
            + ", ".join(f"{name} {y:.2g}" for name, y in saddles["final_y"].items())
            + f". A step of USAM keeps |y| at rho = {saddles['critical_rho']:.4f}.",
            verdict(attracted == set(ATTRACTED) and abs(saddles["critical_rho"] - CRITICAL_RHO) < 0.005),
        ),
        beale_claim(
            "On Beale's function normalized SAM with rho 0.5 and 1 ends at the saddle, with rho 0.1 and GD do not; "
            "renormalizing does not free it.",
            list(BEALE_RUNS)[:5],
        ),
        beale_claim(
            "There momentum 0.95 frees normalized SAM with rho 0.5, momentum 0.9 does not.", list(BEALE_RUNS)[5:]
        ),
    ]


def diffusion_claims(results: dict[str, Any]) -> list[Claim]:
    allowed = STANDARD_ERRORS * results["standard_error"]

    def largest(power: int, is_sam: bool, differentiated: bool = False) -> float:
        runs = [run for run in results["runs"] if (run["rho"] > 0, run["differentiated"]) == (is_sam, differentiated)]
        return max(run["largest_errors"][str(power)] for run in runs)

    runs = [run for run in results["runs"] if not run["differentiated"]]
    leaving = {(run["rho"], run["batch_size"]): run["variances"][-1][1] for run in runs}
    ratios = {key: leaving[key] / leaving[0, key[1]] for key in leaving if key[0]}
    small, large = sorted(DIFFUSION_BATCHES)
    by_batch = [leaving[rho, small] / leaving[rho, large] for rho in DIFFUSION_RHOS]
    rhos = " and ".join(map(str, DIFFUSION_RHOS[1:]))
    rule = (
        f"to t = {DIFFUSION_TIME:g}, λ = ±1, B = {small} and {large} ({STANDARD_ERRORS} standard errors: {allowed:.1%})"
    )
    return [
        Claim(
            "The variance of SGD along an eigenvector is η|λ|/(2Bλ) · (1 − exp(−2λt)).",
            f"Largest relative error {rule}: {largest(2, False):.1%}.",
            verdict(largest(2, False) < allowed),
        ),
        Claim(
            "That of unnormalized SAM is the same with λ(1 + ρλ)² for the rate λ: η|λ|/(2Bλ(1 + ρλ)²) · (1 − exp(…)).",
            f"Largest relative error {rule}, rho {rhos}: {largest(2, True):.0%}; "
            f"with the rate λ(1 + ρλ): {largest(1, True):.1%}. The square is right for the gradient of L(w + ρ∇L(w)) "
            f"with the derivative of ∇L(w), which SAM leaves out: {largest(2, True, True):.1%}.",
            verdict(largest(2, True) < allowed),
        ),
        Claim(
            "SAM leaves a saddle more slowly than SGD, and small batches are faster.",
            f"Variance along λ = −1 at t = {DIFFUSION_TIME:g} relative to SGD's: "
            + ", ".join(f"{ratio:.2f} (rho {rho:g}, B = {batch})" for (rho, batch), ratio in ratios.items())
            + f". At B = {small} relative to B = {large}: {', '.join(f'{ratio:.2f}' for ratio in by_batch)} "
            f"(rho {', '.join(map(str, DIFFUSION_RHOS))}); by the formula {large / small:g} for each.",
            verdict(max(ratios.values()) < 1 - 2 * allowed and min(by_batch) > 1 + 2 * allowed),
        ),
    ]


def draw_paths(axes: Sequence[Axes], saddles: dict[str, Any], beales: dict[str, Any]) -> None:
    """|y| on the saddle; paths on Beale's function, and their distance to its saddle."""
    for (name, path), color in zip(saddles["paths"].items(), SADDLE_COLORS, strict=True):
        axes[0].semilogy(kept(SADDLE_STEPS), np.abs(path)[:, 1], label=name, color=color)
    axes[0].set(title="Distance from the ridge of x² − y²", xlabel="step", ylabel="|y|", ylim=(1e-5, 1e3))
    x, y = np.meshgrid(np.linspace(-0.5, 3.4, 200), np.linspace(-0.3, 2.1, 200))
    axes[1].contour(x, y, np.log(beale(np.stack([x, y])) + 1e-3), 25, colors="0.85", linestyles="-", linewidths=0.8)
    for (name, run), color in zip(beales.items(), BEALE_COLORS, strict=True):
        style = "--" if "momentum" in name else "-"
        axes[1].plot(*np.array(run["path"]).T, color=color, linestyle=style, label=name)
        axes[2].loglog(kept(BEALE_STEPS) + 1, run["distances"], color=color, linestyle=style)
    axes[1].plot(*BEALE_SADDLE, "kX", label="saddle", linestyle="none")
    axes[1].plot(*BEALE_MINIMUM, "k*", label="minimum", linestyle="none", markersize=10)
    axes[1].set(title="Beale's function", xlabel="x", ylabel="y")
    axes[2].set(title="Beale's function: distance to the saddle", xlabel="step", ylim=(1e-5, 5))


def draw_diffusion(axis: Axes, results: dict[str, Any]) -> None:
    """Variances along the direction in which the saddle falls."""
    times = np.array(results["times"])
    for run in results["runs"]:
        if run["differentiated"]:
            continue
        rho, batch_size = run["rho"], run["batch_size"]
        color, small = RHO_COLORS[DIFFUSION_RHOS.index(rho)], batch_size == min(DIFFUSION_BATCHES)
        label = f"ρ = {rho:g}, B = {batch_size}" if rho else f"SGD, B = {batch_size}"
        variances = np.array(run["variances"])[:, 1]
        axis.semilogy(times, variances, "o" if small else "s", color=color, markersize=4, label=label, linestyle="none")
        for power, style in ((1, "-"), (2, "--")) if rho else ((1, "-"),):
            formula = variance_by_formula(CURVATURES[1], rho, batch_size, times, power)
            axis.semilogy(times, formula, style, color=color, linewidth=1)
    axis.set(
        title="USAM leaves a saddle, λ = −1\n(dashed: the paper's (1 + ρλ)²; solid: 1 + ρλ)",
        xlabel="t",
        ylabel="variance",
    )
