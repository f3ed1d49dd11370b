"""Where outer products pay: time of mSAM against the size of a micro-batch and the width of the network.

    python -m benchmarks.lazy --name lazy       # about six minutes
    python -m benchmarks.lazy --fit             # the constants of the cost model that fit these times best

An MLP of two hidden layers on 512 examples, split into 2 to 512 micro-batches, with each strategy, relative to the
plain gradient. Lines in the figure are what the cost model of ``optax_sam/_lazy/plan.py`` says before anything is run.
"""

import argparse
import itertools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import scipy.optimize

import optax_sam
from benchmarks import timing
from optax_sam._lazy import plan

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

BATCH = 512
WIDTHS = (256, 1024, 2048)
SIZES = (1, 4, 16, 64, 256)  # examples in a micro-batch
STRATEGIES = ("lazy", "scan", "vmap")
COLORS = {"lazy": "#0072b2", "scan": "#d55e00", "vmap": "#009e73"}
MOST_COPIES = 2e9  # bytes of the params of all micro-batches: what needs more is left out
MOST_TIME = 40.0  # predicted, in plain gradients
FOLDER = pathlib.Path(__file__).parent / "results"


def loss_fn(params: list[jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, labels = batch
    *hidden, output = params
    for w in hidden:
        x = jax.nn.relu(x @ w)
    return optax.softmax_cross_entropy_with_integer_labels(x @ output, labels).mean()


def problem(width: int) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array]]:
    """Params of a network as wide as its input, and a batch."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(width, width), (width, width), (width, 10)]
    params = [jax.random.normal(key, shape) * (2 / width) ** 0.5 for key, shape in zip(keys, shapes, strict=False)]
    return params, (jax.random.normal(keys[3], (BATCH, width)), jnp.arange(BATCH) % 10)


def gradient(strategy: str | None, size: int) -> Any:
    """The jitted function of params and a batch to loss and gradient: mSAM, or plain without a strategy."""
    if strategy is None:
        return jax.jit(jax.value_and_grad(loss_fn))
    options: dict[str, Any] = {"num_micro_batches": BATCH // size, "strategy": strategy}
    return jax.jit(optax_sam.value_and_grad(loss_fn, optax_sam.sam(0.05), **options))


def counts(width: int, strategy: str | None, size: int) -> tuple[float, float, float]:
    """What the cost model counts: multiply-adds, weights read and written in turn, and all at once."""
    params, batch = problem(width)
    weights = sum(w.size for w in params)
    micro_batch = jax.tree.map(lambda x: x[:size], batch)
    if strategy is None:
        return plan.multiply_adds(jax.make_jaxpr(gradient(None, size))(params, batch).jaxpr), weights, 0
    if strategy == "lazy":
        program = jax.make_jaxpr(gradient("lazy", size))(params, batch)
        formed = params[-1].size if size * sum(params[-1].shape) >= params[-1].size else 0
        return plan.multiply_adds(program.jaxpr), 2 * weights, BATCH // size * 2 * formed
    one = plan.multiply_adds(
        jax.make_jaxpr(optax_sam.value_and_grad(loss_fn, optax_sam.sam(0.05)))(params, micro_batch).jaxpr
    )
    turns = BATCH // size
    return turns * one, turns * 2 * weights * (strategy == "scan"), turns * 2 * weights * (strategy == "vmap")


def predicted(count: tuple[float, float, float], alpha: float, alpha_of_copies: float) -> float:
    return count[0] + alpha * count[1] + alpha_of_copies * count[2]


def cells(width: int) -> list[tuple[str | None, int]]:
    """The strategies and sizes to run: not those that would need too much memory or time."""
    plain = predicted(counts(width, None, 1), plan.ALPHA, plan.ALPHA_OF_COPIES)
    found: list[tuple[str | None, int]] = [(None, BATCH)]
    for strategy, size in itertools.product(STRATEGIES, SIZES):
        bytes_of_copies = 4 * BATCH // size * 2 * width**2 if strategy == "vmap" else 0
        cost = predicted(counts(width, strategy, size), plan.ALPHA, plan.ALPHA_OF_COPIES)
        if bytes_of_copies < MOST_COPIES and cost < MOST_TIME * plain:
            found.append((strategy, size))
    return found


def measure(width: int, repeats: int) -> list[dict[str, Any]]:
    """Times of one width, interleaved, relative to the plain gradient."""
    arguments, functions = problem(width), {}
    for strategy, size in cells(width):
        compiled = gradient(strategy, size).lower(*arguments).compile()
        functions[strategy, size] = lambda compiled=compiled: compiled(*arguments)
    seconds = timing.interleaved({str(cell): function for cell, function in functions.items()}, repeats)
    ratios = timing.ratios(seconds, str((None, BATCH)))
    return [
        {
            "width": width,
            "strategy": strategy or "plain",
            "size": size,
            "milliseconds": 1e3 * float(np.median(seconds[str((strategy, size))])),
            "ratio": ratios[str((strategy, size))][0],
            "quartiles": ratios[str((strategy, size))][1:],
            "counts": counts(width, strategy, size),
        }
        for strategy, size in functions
    ]


def fit(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The constants for which predicted ratios are nearest to measured ones, by the squares of logarithms."""
    plain = {row["width"]: row["counts"] for row in rows if row["strategy"] == "plain"}
    rows = [row for row in rows if row["strategy"] != "plain"]

    def errors(logarithms):
        constants = np.exp(logarithms)
        ratios = [predicted(row["counts"], *constants) / predicted(plain[row["width"]], *constants) for row in rows]
        return np.log(ratios) - np.log([row["ratio"] for row in rows])

    found = scipy.optimize.least_squares(errors, np.log([plan.ALPHA, plan.ALPHA_OF_COPIES]), loss="soft_l1").x
    return float(np.exp(found[0])), float(np.exp(found[1]))


def draw(rows: list[dict[str, Any]], constants: tuple[float, float]) -> Figure:
    """Time against the size of a micro-batch, a panel for each width; lines are predicted, markers measured."""
    widths = list(dict.fromkeys(row["width"] for row in rows))
    figure, axes = plt.subplots(1, len(widths), figsize=(3.4 * len(widths), 3.6), sharey=True, squeeze=False)
    for axis, width in zip(axes[0], widths, strict=True):
        plain = predicted(counts(width, None, 1), *constants)
        for strategy in STRATEGIES:
            line = [predicted(counts(width, strategy, size), *constants) / plain for size in SIZES]
            axis.plot(SIZES, line, color=COLORS[strategy], linewidth=1, alpha=0.6)
            points = [row for row in rows if (row["width"], row["strategy"]) == (width, strategy)]
            axis.plot(
                [row["size"] for row in points],
                [row["ratio"] for row in points],
                "o",
                color=COLORS[strategy],
                markersize=5,
                label=strategy,
            )
        axis.axhline(2, color="0.6", linewidth=1, zorder=0)
        axis.set(xscale="log", yscale="log", ylim=(1, 130), title=f"width {width}", xlabel="examples in a micro-batch")
        axis.set_xticks(SIZES, SIZES)
        axis.set_yticks((1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 16, 32, 64, 128))
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("time / plain gradient")
    axes[0][-1].legend(frameon=False)
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--fit", action="store_true", help="fit the constants to the times in results/lazy.json")
    parser.add_argument("--name", help="results go to benchmarks/results/NAME.json and .png")
    settings = parser.parse_args()
    if settings.fit:
        rows = json.loads((FOLDER / "lazy.json").read_text())["rows"]
        print("ALPHA, ALPHA_OF_COPIES = {:.0f}, {:.0f}".format(*fit(rows)))
        return
    rows = [row for width in settings.width for row in measure(width, settings.repeats)]
    constants = plan.ALPHA, plan.ALPHA_OF_COPIES
    plain = {row["width"]: predicted(row["counts"], *constants) for row in rows if row["strategy"] == "plain"}
    for row in rows:
        row["predicted"] = predicted(row["counts"], *constants) / plain[row["width"]]
        print("{width:>5} {strategy:>6} {size:>4} {ratio:>8.2f} predicted {predicted:>6.2f}".format(**row))
    if settings.name:
        results = {
            "command": " ".join(["python", *sys.orig_argv[1:]]),
            **timing.environment(),
            "constants": constants,
            "rows": rows,
        }
        (FOLDER / f"{settings.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(rows, constants).savefig(FOLDER / f"{settings.name}.png", dpi=130)


if __name__ == "__main__":
    main()
