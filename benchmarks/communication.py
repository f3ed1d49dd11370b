"""What a training step sends between devices: counted in the compiled program, then measured on the wire.

    python -m benchmarks.communication

1. Compiles the gradient estimate of each method for 1 to 8 CPU devices and reads its collectives, and their bytes, out
   of XLA's program.
2. Runs mSAM and synchronized SAM in 2, 4 and 8 processes on this machine, and counts the bytes that cross the loopback
   device (Linux).
3. Checks both against the formula, a ring all-reduce that sends 2 (N - 1) / N times the reduced bytes from each of N
   devices, and draws it up to 1,024 devices.
"""

import argparse
import json
import math
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tqdm
from jax.sharding import AxisType, PartitionSpec

import optax_sam
from benchmarks import timing
from optax_sam.estimator import AscentPer

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

RHO = 0.05
DEVICES = (1, 2, 4, 8)
WIDTHS = {"10 k": 90, "100 k": 310, "1 M": 995}
PROCESSES = (2, 4, 8)
PROJECTED = 1024
MEASURED_STEPS = 20
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


class Collective(NamedTuple):
    """One collective operation of a compiled program."""

    kind: str
    num_bytes: int


def collectives(program: str, branch: int = 0) -> list[Collective]:
    """The collectives that one run of a compiled program executes, where its conditionals take one branch.

    Args:
        program: the text of the compiled program, ``jax.jit(...).lower(...).compile().as_text()``.
        branch: index of the branch that every conditional takes.
    """
    computations, name = {}, ""
    for line in program.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = "ENTRY" if header.group(1) else header.group(2)
            computations[name] = []
        elif " = " in line:
            computations[name].append(line)
    return list(_executed(computations, "ENTRY", branch))


def _executed(computations: dict[str, list[str]], name: str, branch: int) -> Iterator[Collective]:
    for line in computations[name]:
        instruction = re.search(r" = (\(.*?\)|\S+) ([\w\-]+)\(", line)
        if instruction is None:
            raise ValueError(f"cannot read an instruction of the compiled program: {line}")
        shapes, kind = instruction.groups()
        if re.fullmatch(r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?", kind):
            yield Collective(kind.removesuffix("-start"), sum(map(_bytes_of, re.findall(r"(\w+)\[([\d,]*)\]", shapes))))
            continue
        repeats = re.search(r'known_trip_count":\{"n":"(\d+)"', line) if kind == "while" else None
        for called in _called(line, kind, branch):
            yield from list(_executed(computations, called, branch)) * (int(repeats.group(1)) if repeats else 1)


def _called(line: str, kind: str, branch: int) -> list[str]:
    """The computations that an instruction runs."""
    if kind == "conditional":
        branches = re.search(r"branch_computations=\{(.*?)\}", line)
        names = branches.group(1).split(", ") if branches else re.findall(r"(?:false|true)_computation=(\S+?),", line)
        return [names[branch].removeprefix("%")]
    return re.findall(r"(?:to_apply|calls|body)=%?([\w.\-]+)", line) if kind in ("while", "call", "fusion") else []


def _bytes_of(shape: tuple[str, str]) -> int:
    dtype, sizes = shape
    return ITEM_BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)


class Method(NamedTuple):
    """A gradient estimate.

    Attributes:
        link: what is made of the clean gradient.
        ascent_per: what one ascent is computed from.
        num_micro_batches: on each device.
        branch: the branch that a switch in it takes.
        rounds: how often all params are reduced, by the formula.
    """

    link: optax.GradientTransformationExtraArgs
    ascent_per: AscentPer = "micro_batch"
    num_micro_batches: int = 1
    branch: int = 0
    rounds: int = 1


SAM = optax_sam.sam(RHO)
METHODS = {
    "plain": Method(optax.with_extra_args_support(optax.identity())),
    "mSAM, M = 1 a device": Method(SAM),
    "mSAM, M = 4 a device": Method(SAM, num_micro_batches=4),
    "mSAM, M = 16 a device": Method(SAM, num_micro_batches=16),
    "StableSAM per device": Method(optax_sam.stable_sam(RHO)),
    "one ascent per device, M = 4": Method(SAM, "device", num_micro_batches=4),
    "synchronized SAM": Method(SAM, "batch", rounds=2),
    "synchronized SAM, M = 4": Method(SAM, "batch", num_micro_batches=4, rounds=2),
    "synchronized late SAM, before": Method(optax_sam.late(SAM, 1), "batch", branch=0),
    "synchronized late SAM, after": Method(optax_sam.late(SAM, 1), "batch", branch=1, rounds=2),
    "late mSAM, before": Method(optax_sam.late(SAM, 1), branch=0),
    "late mSAM, after": Method(optax_sam.late(SAM, 1), branch=1),
}


def make_params(width: int) -> dict[str, jax.Array]:
    return {"first": jnp.ones((8, width)), "hidden": jnp.ones((width, width)), "output": jnp.ones((width, 1))}


def count_parameters(width: int) -> int:
    return sum(leaf.size for leaf in jax.eval_shape(lambda: make_params(width)).values())


def loss_fn(params: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
    hidden = jnp.tanh(jnp.tanh(batch @ params["first"]) @ params["hidden"])
    return jnp.mean((hidden @ params["output"] - 1) ** 2)


def compiled(method: Method, num_devices: int, width: int) -> Any:
    """The gradient estimate of a method, compiled for some devices."""
    estimator = optax_sam.gradient_estimator(
        loss_fn,
        method.link,
        num_micro_batches=method.num_micro_batches,
        ascent_per=method.ascent_per,
        axis_name="data",
    )
    mesh = jax.make_mesh((num_devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:num_devices])
    specs = PartitionSpec(), PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(estimator.value_and_grad, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    params = jax.eval_shape(lambda: make_params(width))
    state = jax.eval_shape(estimator.init, params)
    return jax.jit(mapped).lower(params, state, jax.ShapeDtypeStruct((16 * num_devices, 8), jnp.float32)).compile()


def reduced_bytes(method: str, num_parameters: int) -> int:
    """The formula for what is reduced in a step: the loss, and the params once or twice."""
    return 4 + 4 * num_parameters * METHODS[method].rounds


def sent_bytes(reduced: float, num_devices: int) -> float:
    """What a ring all-reduce of ``reduced`` bytes sends from each device."""
    return 2 * (num_devices - 1) / num_devices * reduced


def count() -> list[dict[str, Any]]:
    """Collectives of every method, for all numbers of devices and params, as they stand in the compiled programs."""
    rows = []
    cases = [(name, size, devices) for name in METHODS for size in WIDTHS for devices in DEVICES]
    for name, size, devices in tqdm.tqdm(cases, desc="compiling", disable=None, leave=False):
        method = METHODS[name]
        num_parameters = count_parameters(WIDTHS[size])
        found = collectives(compiled(method, devices, WIDTHS[size]).as_text(), method.branch)
        row = {"method": name, "parameters": num_parameters, "devices": devices}
        row |= {"operations": [c.kind for c in found], "reduced_bytes": sum(c.num_bytes for c in found)}
        rows.append(row | {"formula": reduced_bytes(name, num_parameters)})
    return rows


def loopback_bytes() -> int:
    """Bytes sent over the loopback device so far."""
    [line] = [line for line in pathlib.Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def work(coordinator: str, num_processes: int, rank: int, method: str, width: int) -> None:
    """One of the processes of :func:`measure`; the first prints the bytes of a step."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes, rank)
    program = compiled(METHODS[method], num_processes, width)
    mesh = jax.make_mesh((num_processes,), ("data",), (AxisType.Auto,))
    everywhere, split = (jax.NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    params, state = jax.device_put((make_params(width), METHODS[method].link.init(make_params(width))), everywhere)
    examples = np.random.default_rng(rank).normal(size=(16, 8)).astype(np.float32)
    batch = jax.make_array_from_process_local_data(split, examples)
    jax.block_until_ready(program(params, state, batch))
    marks = []
    for steps in (0, MEASURED_STEPS):
        for _ in range(steps):
            jax.block_until_ready(program(params, state, batch))
        time.sleep(1)  # until the last packets of all are through
        marks.append(loopback_bytes())
        time.sleep(1)
    if rank == 0:
        print((marks[1] - marks[0]) / MEASURED_STEPS)


def measure() -> list[dict[str, Any]]:
    """Bytes on the loopback device per step and process, in real processes."""
    rows = []
    cases = [(name, processes) for name in ("mSAM, M = 1 a device", "synchronized SAM") for processes in PROCESSES]
    for name, processes in tqdm.tqdm(cases, desc="measuring", disable=None, leave=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        width = WIDTHS["1 M"]
        command = [sys.executable, __file__, "--work", coordinator, str(processes)]
        workers = [
            subprocess.Popen([*command, str(rank), name, str(width)], stdout=subprocess.PIPE, text=True)
            for rank in range(processes)
        ]
        output = [worker.communicate(timeout=300)[0] for worker in workers]
        if any(worker.returncode for worker in workers):
            sys.exit(f"communication.py: a process of {processes} failed, see above")
        num_parameters = count_parameters(width)
        formula = sent_bytes(reduced_bytes(name, num_parameters), processes)
        rows.append(
            {
                "method": name,
                "parameters": num_parameters,
                "processes": processes,
                "sent_bytes": float(output[0].split()[-1]) / processes,
                "formula": formula,
            }
        )
    return rows


def draw(counted: list[dict[str, Any]], measured: list[dict[str, Any]]) -> Figure:
    """Bytes sent per device against devices: the formula to 1,024, and the points that were measured."""
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    devices = [2**power for power in range(PROJECTED.bit_length())]
    num_parameters = max(row["parameters"] for row in counted)
    lines = {
        "synchronized SAM": ("#d55e00", "synchronized SAM: 2 reductions"),
        "mSAM, M = 1 a device": ("#0072b2", "mSAM with any M, and the plain phase of late SAM: 1"),
    }
    for name, (color, label) in lines.items():
        sent = [sent_bytes(reduced_bytes(name, num_parameters), n) / 1e6 for n in devices]
        axis.plot(devices, sent, color=color, label=label)
        points = [row for row in measured if row["method"] == name]
        axis.plot(
            [row["processes"] for row in points],
            [row["sent_bytes"] / 1e6 for row in points],
            "o",
            color=color,
            label="measured between processes",
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(devices, [str(n) for n in devices])
    axis.set_ylim(bottom=0)
    axis.set(xlabel="devices", ylabel="MB sent by each device in a step")
    axis.set_title(f"ring all-reduce of {num_parameters:,} float32 params; beyond 8 devices: formula only", fontsize=10)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    return figure


def report(counted: list[dict[str, Any]], measured: list[dict[str, Any]]) -> str:
    """The tables, fit for 80 columns."""
    shown = (*DEVICES, PROJECTED)
    lines = [
        f"{'kB sent by each device in a step':<41}" + "".join(f"{n:>7}" for n in shown) + " devices",
        f"{'':<29}{'params':>7}{'ops':>5}" + " (ring; the last by formula alone)".rjust(35),
    ]
    for name in METHODS:
        for number, size in enumerate(sorted({row["parameters"] for row in counted})):
            rows = [row for row in counted if (row["method"], row["parameters"]) == (name, size)]
            sent = [sent_bytes(row["reduced_bytes"], row["devices"]) for row in rows]
            sent.append(sent_bytes(reduced_bytes(name, size), PROJECTED))
            operations = "/".join(str(n) for n in sorted({len(row["operations"]) for row in rows}))
            lines.append(
                f"{'' if number else name:<29}{size / 1e3:>6.0f}k{operations:>5}"
                + "".join(f"{x / 1e3:>7.0f}" for x in sent)
            )
    lines += ["", f"{'on the wire, per process':<31}{'processes':>12}{'MB measured':>15}{'MB by formula':>15}"]
    for row in measured:
        megabytes = f"{row['sent_bytes'] / 1e6:>15.3f}{row['formula'] / 1e6:>15.3f}"
        lines.append(f"{row['method']:<31}{row['processes']:>12}{megabytes}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        coordinator, processes, rank, method, width = arguments.work
        return work(coordinator, int(processes), int(rank), method, int(width))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    counted, measured = count(), measure()
    wrong = [row for row in counted if row["reduced_bytes"] != row["formula"]]
    print(report(counted, measured))
    print(f"\n{len(counted) - len(wrong)} of {len(counted)} compiled programs reduce what the formula says.")
    folder = pathlib.Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    results = {"command": " ".join(["python", *sys.orig_argv[1:]]), **timing.environment()}
    results |= {"counted": counted, "measured": measured}
    (folder / "communication.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(counted, measured).savefig(folder / "communication.png", dpi=150)
    return None


if __name__ == "__main__":
    main()
