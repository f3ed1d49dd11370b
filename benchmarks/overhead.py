"""What the library itself adds: cost against the number of params, many leaves, tracing and dispatch.

python -m benchmarks.overhead
"""

import argparse
import functools
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tqdm

import optax_sam
from benchmarks import networks, step_cost, timing
from examples.training import style

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

SAM = optax_sam.sam(0.05)
LINKS = {
    "identity": optax.with_extra_args_support(optax.identity()),
    "sam": SAM,
    "asam": optax_sam.asam(0.5),
    "stable_sam": optax_sam.stable_sam(0.05),
}
SIZES = tuple(10**power for power in range(3, 9))
LEAVES = (1, 10, 1000)


def loss_fn(params: Any) -> jax.Array:
    """As cheap as a loss can be: its gradient is one pass over the params."""
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params)) / 2  # pyright: ignore[reportReturnType]


def update(link: optax.GradientTransformationExtraArgs, params: Any) -> Any:
    """The clean gradient, and what the link makes of it."""
    grad_fn = jax.grad(loss_fn)
    return link.update(grad_fn(params), link.init(params), params, grad_fn=grad_fn)[0]


def against_size(repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of an update by number of params, for each link."""
    seconds = {name: {} for name in LINKS}
    for size in tqdm.tqdm(SIZES, desc="sizes", disable=None, leave=False):
        params = jnp.linspace(0, 1, size)
        programs = {
            name: functools.partial(jax.jit(functools.partial(update, link)), params) for name, link in LINKS.items()
        }
        for name, values in timing.interleaved(programs, repeats).items():
            seconds[name][str(size)] = float(np.median(values))
    return seconds


def ratios_in_a_step(repeats: int) -> dict[str, tuple[float, float, float]]:
    """Renormalization relative to SAM, and an inactive switch relative to the plain step, on the MLP."""
    task = networks.tasks()["MLP"]
    programs = {}
    for name in ("plain", "SAM", "StableSAM", "late SAM, before the switch"):
        link, options = step_cost.METHODS[name]
        state, step = step_cost.make_step(task, link, step_cost.OPTIMIZERS["sgd"], **options)
        programs[name] = step_cost.Program(state, step, task.batch()).compile()
    seconds = timing.interleaved(programs, repeats)
    return {
        "StableSAM / SAM": timing.ratios(seconds, "SAM")["StableSAM"],
        "before the switch / plain": timing.ratios(seconds, "plain")["late SAM, before the switch"],
    }


def by_leaves(num_leaves: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds to trace, compile and run an update with leaves of 10 params, for each link; running is dispatch."""
    params = {f"{index:04}": jnp.full(10, index / num_leaves) for index in range(num_leaves)}
    rows, programs = {}, {}
    for name, link in tqdm.tqdm(LINKS.items(), desc=f"{num_leaves} leaves", disable=None, leave=False):
        jax.make_jaxpr(functools.partial(update, link))(params)  # what is done once, whatever the link
        start = time.perf_counter()
        lowered = jax.jit(functools.partial(update, link)).lower(params)
        traced = time.perf_counter()
        compiled = lowered.compile()
        rows[name] = {"trace": traced - start, "compile": time.perf_counter() - traced}
        programs[name] = functools.partial(compiled, params)
    for name, values in timing.interleaved(programs, repeats).items():
        rows[name]["run"] = float(np.median(values))
    return rows


def draw(seconds: dict[str, dict[str, float]]) -> Figure:
    """Time of an update relative to the clean gradient alone, against the number of params."""
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, values in seconds.items():
        ratios = [value / seconds["identity"][size] for size, value in values.items()]
        color = style.COLORS.get(name, style.PLAIN)
        axis.plot([int(size) for size in values], ratios, "o-", color=color, label=name)
    axis.set(xscale="log", xlabel="params in one leaf", ylabel="time / clean gradient alone", ylim=(0, None))
    axis.set_title("a quadratic loss, whose gradient is one pass over the params", fontsize=10)
    axis.legend(frameon=False)
    style.tidy(axis)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    sizes, ratios = against_size(repeats), ratios_in_a_step(repeats)
    leaves = {str(number): by_leaves(number, repeats) for number in LEAVES}
    print(f"{'ms by number of params':<24}" + "".join(f"{size:>9.0e}" for size in SIZES))
    for name, values in sizes.items():
        print(f"{name:<24}" + "".join(f"{1e3 * value:>9.3f}" for value in values.values()))
    for number, rows in leaves.items():
        print(f"\n{f'{number} leaves of 10 params':<24}{'trace s':>9}{'compile s':>11}{'run ms':>9}")
        for name, row in rows.items():
            print(f"{name:<24}{row['trace']:>9.3f}{row['compile']:>11.2f}{1e3 * row['run']:>9.3f}")
    print(f"\n{'step of the MLP':<30}{'ratio':>7}{'quartiles':>15}")
    for name, (median, low, high) in ratios.items():
        print(f"{name:<30}{median:>7.3f}{f'{low:.3f}-{high:.3f}':>15}")
    results = {"command": " ".join(["python", *sys.orig_argv[1:]]), **timing.environment()}
    results |= {"seconds_by_params": sizes, "seconds_by_leaves": leaves, "ratios_in_a_step": ratios}
    folder = pathlib.Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "overhead.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(sizes).savefig(folder / "overhead.png", dpi=130)


if __name__ == "__main__":
    main()
