"""What a training step costs: time, compilation, FLOPs and memory of every method and of what one would pick instead.

    python -m benchmarks.step_cost --name step_cost                  # all networks with SGD and AdamW: half an hour
    python -m benchmarks.step_cost --network CNN --optimizer sgd     # one table

Every program is one jitted training step with donated state: gradient estimate, optimizer, update of the params. Times
are medians over interleaved rounds, as ratios to the plain step of the same round. XLA counts the FLOPs of a loop's
body once, so programs with a loop show none.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tqdm

import optax_sam
from benchmarks import networks, peers, timing
from examples.training import style

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

RHO = 0.05
OPTIMIZERS = {"sgd": optax.sgd(1e-3, momentum=0.9), "adamw": optax.adamw(1e-3)}
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MICRO_BATCHES = (2, 8, 32)
STRATEGIES = ("scan", "unroll", "vmap", "lazy", "auto")
NEVER = 1 << 30
SAM = optax_sam.sam(RHO)
AS_TRACED = "as traced"
METHODS = {
    "plain": (optax.identity(), {}),
    "SAM": (SAM, {}),
    "USAM": (optax_sam.usam(RHO), {}),
    "ASAM": (optax_sam.asam(10 * RHO), {}),
    "StableSAM": (optax_sam.stable_sam(RHO), {}),
    "late SAM, before the switch": (optax_sam.late(SAM, NEVER), {}),
    "late SAM, after the switch": (optax_sam.late(SAM, 1), {}),
    f"late SAM, after, {AS_TRACED}": (optax_sam.late(SAM, 1), {}),
} | {
    f"mSAM, M = {size}, {strategy}": (SAM, {"num_micro_batches": size, "strategy": strategy})
    for size in MICRO_BATCHES
    for strategy in STRATEGIES
}
METHODS |= {
    f"mSAM, M = {size}, {strategy}": (SAM, {"num_micro_batches": size, "strategy": strategy})
    for size in (64, 512)
    for strategy in ("scan", "lazy", "auto")
}
METHODS |= {
    f"mStableSAM, M = 64, {strategy}": (optax_sam.stable_sam(RHO), {"num_micro_batches": 64, "strategy": strategy})
    for strategy in ("scan", "lazy")
}
METHODS["late mSAM, M = 8, before"] = (optax_sam.late(SAM, NEVER), {"num_micro_batches": 8})
METHODS["late mSAM, M = 8, after"] = (optax_sam.late(SAM, 1), {"num_micro_batches": 8})
METHODS[f"mSAM, M = 8, scan, {AS_TRACED}"] = METHODS["mSAM, M = 8, scan"]
REWRITES = jax.default_backend() == "cpu"  # convolutions in loops and branches
DRAWN: tuple[str, ...] = (  # those of them that were measured
    "SAM",
    "StableSAM",
    "late SAM, before the switch",
    "late SAM, after the switch",
    "mSAM, M = 8, auto",
    "mSAM, M = 8, lazy",
    "mSAM, M = 8, vmap",
    "mSAM, M = 64, scan",
    "mSAM, M = 64, lazy",
    "mSAM, M = 512, lazy",
    "optax.contrib.sam, opaque",
    "textbook mSAM, M = 8, vmap",
)


def make_step(task: networks.Task, link: Any, optimizer: Any, **options: Any) -> tuple[Any, Callable[..., Any]]:
    """The initial state and the training step of a method."""
    estimator = optax_sam.gradient_estimator(task.loss_fn, link, **options)

    def step(state, batch):
        params, link_state, optimizer_state = state
        _, grads, link_state = estimator.value_and_grad(params, link_state, batch)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return optax.apply_updates(params, updates), link_state, optimizer_state

    params = task.init()
    return (params, estimator.init(params), optimizer.init(params)), step


def chain_step(task: networks.Task, optimizer: Any) -> tuple[Any, Callable[..., Any]]:
    """SAM as the first link of an Optax chain."""
    tx = optax.chain(SAM, optimizer)
    grad_fn = jax.grad(task.loss_fn)

    def step(state, batch):
        params, tx_state = state
        updates, tx_state = tx.update(grad_fn(params, batch), tx_state, params, grad_fn=grad_fn, batch=batch)
        return optax.apply_updates(params, updates), tx_state

    params = task.init()
    return (params, tx.init(params)), step


class Program:
    """A training step with its state, and what XLA says of it once it is compiled."""

    def __init__(self, state: Any, step: Callable[..., Any], batch: Any) -> None:
        self.lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
        self.state, self.batch = state, batch

    def compile(self) -> "Program":
        start = time.perf_counter()
        self.step = self.lowered.compile()
        self.facts = {"compile_seconds": time.perf_counter() - start}
        cost, memory = self.step.cost_analysis() or {}, self.step.memory_analysis()
        self.facts |= {"flops": cost.get("flops"), "bytes_accessed": cost.get("bytes accessed")}
        self.facts |= {"has_loop": "while(" in (self.step.as_text() or "")}
        self.facts["temporary_bytes"] = getattr(memory, "temp_size_in_bytes", None)
        return self

    def __call__(self) -> Any:
        self.state = self.step(self.state, self.batch)
        return self.state


@contextlib.contextmanager
def convolutions_as_traced() -> Iterator[None]:
    """Without the rewriting of convolutions in loops and branches."""
    same = lambda function: function  # noqa: E731
    with (
        mock.patch("optax_sam.switching.canonicalized", same),
        mock.patch("optax_sam._micro_batches.canonicalized", same),
    ):
        yield


def programs(task: networks.Task, optimizer: str) -> Iterator[tuple[str, Program]]:
    """Every method and peer, traced."""
    batch, tx = task.batch(), OPTIMIZERS[optimizer]
    for name, (link, options) in METHODS.items():
        as_traced = name.endswith(AS_TRACED)
        is_indivisible = task.batch_shape[0] % options.get("num_micro_batches", 1)
        if is_indivisible or (as_traced and not (REWRITES and optimizer == "sgd")):
            continue
        with convolutions_as_traced() if as_traced else contextlib.nullcontext():
            yield name, Program(*make_step(task, link, tx, **options), batch)
    yield "SAM, in an Optax chain", Program(*chain_step(task, tx), batch)
    for name, make in peers.PEERS.items():
        yield name, Program(*make(task, tx), batch)


def measure(network: str, optimizer: str, precision: str, repeats: int, workers: int) -> dict[str, dict[str, Any]]:
    """All rows of one table."""
    task = networks.tasks(PRECISIONS[precision])[network]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        traced = tqdm.tqdm(programs(task, optimizer), desc=f"compiling {network}", disable=None, leave=False)
        pending = {name: pool.submit(program.compile) for name, program in traced}
        compiled = {name: future.result() for name, future in pending.items()}
    functions: dict[str, Callable[[], Any]] = dict(compiled)
    if jax.default_backend() == "cpu" and precision == "float32":
        functions |= peers.torch_steps(network, task, optimizer)
    seconds = timing.interleaved(functions, repeats)
    ratios = timing.ratios(seconds, "plain")
    rows = {}
    for name, values in seconds.items():
        median, low, high = ratios[name]
        rows[name] = {"milliseconds": 1e3 * float(np.median(values)), "ratio": median, "quartiles": [low, high]}
        rows[name] |= compiled[name].facts if name in compiled else {}
        if name.startswith("PyTorch"):
            own = values / seconds["PyTorch, plain"]
            rows[name]["ratio_to_own_plain"] = float(np.median(own))
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line per program, fit for 82 columns."""
    lines = [f"{'':<31}{'ms':>8}{'× plain':>8}{'quartiles':>13}{'compile':>8}{'GFLOP':>7}{'MB':>7}"]
    for name, row in rows.items():
        low, high = row["quartiles"]
        line = f"{name:<31}{row['milliseconds']:>8.2f}{row['ratio']:>8.2f}{f'{low:.2f}-{high:.2f}':>13}"
        if "compile_seconds" in row:
            gigaflops = "" if row["has_loop"] or not row["flops"] else f"{row['flops'] / 1e9:.2f}"
            line += f"{row['compile_seconds']:>6.1f} s{gigaflops:>7}{(row['temporary_bytes'] or 0) / 1e6:>7.1f}"
        elif "ratio_to_own_plain" in row:
            line += f"  {row['ratio_to_own_plain']:.2f} × own plain"
        lines.append(line)
    for size in MICRO_BATCHES:
        best, ratio = auto_to_best(rows, size)
        lines.append(f"auto at M = {size}: {ratio:.2f} × the best ({best})")
    return "\n".join(lines)


def auto_to_best(rows: dict[str, dict[str, Any]], size: int) -> tuple[str, float]:
    """The fastest strategy for M, and the time of auto relative to its."""
    times = {strategy: rows[f"mSAM, M = {size}, {strategy}"]["milliseconds"] for strategy in STRATEGIES}
    best = min(times, key=times.__getitem__)
    return best, times["auto"] / times[best]


def summary(tables: list[dict[str, Any]]) -> str:
    """Time relative to the plain step in float32, a Markdown table: a column per network, a value per optimizer."""
    tables = [entry for entry in tables if entry["precision"] == "float32"]
    networks_, optimizers = (list(dict.fromkeys(entry[key] for entry in tables)) for key in ("network", "optimizer"))
    rows_of = {(entry["network"], entry["optimizer"]): entry["rows"] for entry in tables}

    def value(name, row):
        return "–" if row is None else f"{row['milliseconds']:.0f} ms" if name == "plain" else f"{row['ratio']:.2f}"

    lines = [f"| {' / '.join(optimizers)} | {' | '.join(networks_)} |", "|---" * (len(networks_) + 1) + "|"]
    for name in dict.fromkeys(name for entry in tables for name in entry["rows"]):
        cells = (
            " / ".join(value(name, rows_of.get((network, optimizer), {}).get(name)) for optimizer in optimizers)
            for network in networks_
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(tables: list[dict[str, Any]]) -> Figure:
    """Time relative to the plain step of a few programs, a mark for each network; SGD, float32."""
    chosen = {entry["network"]: entry["rows"] for entry in tables if entry["precision"] == "float32"}
    chosen |= {entry["network"]: entry["rows"] for entry in tables if entry["optimizer"] == "sgd"}
    names = [name for name in DRAWN if any(name in rows for rows in chosen.values())]
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.35 * len(names)), layout="constrained")
    colors = style.SAM, style.MSAM, style.STABLE, style.LATE
    for (network, rows), color, marker in zip(chosen.items(), colors, "os^D", strict=False):
        shown = [name for name in names if name in rows]
        places = [names.index(name) for name in shown]
        axis.plot([rows[name]["ratio"] for name in shown], places, marker, color=color, ms=6, alpha=0.8, label=network)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="time of a training step / plain step", xlim=(0, None))
    for cost in (1, 2):
        axis.axvline(cost, color=style.PLAIN, lw=1, ls="--")
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    style.tidy(axis)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=list(networks.tasks()), default=list(networks.tasks()))
    parser.add_argument("--optimizer", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), default=["float32"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, default=1, help="programs compiled at the same time")
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="begin no table that would end later, were it as long as the longest before",
    )
    parser.add_argument("--name", help="results go to benchmarks/results/NAME.json and .png")
    settings = parser.parse_args()
    results = {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        **timing.environment(),
        "tables": [],
        "left_out": [],
    }
    folder = pathlib.Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    start, longest = time.perf_counter(), 0.0
    for setting in itertools.product(settings.optimizer, settings.precision, settings.network):
        begin = time.perf_counter()
        if begin - start + longest > settings.seconds:
            results["left_out"].append(setting)
            continue
        optimizer, precision, network = setting
        rows = measure(network, optimizer, precision, settings.repeats, settings.workers)
        longest = max(longest, time.perf_counter() - begin)
        print(f"\n{network}, {optimizer}, {precision}\n{table(rows)}", flush=True)
        results["tables"].append({"network": network, "optimizer": optimizer, "precision": precision, "rows": rows})
        if settings.name:
            (folder / f"{settings.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{summary(results['tables'])}")
    for setting in results["left_out"]:
        print(f"left out, as time was up: {', '.join(setting)}")
    if settings.name:
        (folder / f"{settings.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(results["tables"]).savefig(folder / f"{settings.name}.png", dpi=130)


if __name__ == "__main__":
    main()
