"""A training run with a checkpoint after every step, which kills itself in the middle of a step if it is told to."""

import argparse
import os
import pathlib
import signal
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import optax_sam
from examples.training import checkpoints
from tests.helpers.problems import GradientCounter, mlp_batch, mlp_loss, mlp_params

STEPS, START, MICRO_BATCHES, BATCH_SIZE = 12, 6, 4, 16
RHO = optax.linear_schedule(0.05, 0.2, STEPS - START)


def gradients_before(step: int) -> int:
    """How many gradients of micro-batches are executed before a step: one in each, from the switch on two."""
    return MICRO_BATCHES * (step + max(step - START, 0))


class DeadlyCounter(GradientCounter):
    """Counts the gradients that are executed, and kills the process during one of them."""

    def __init__(self, kill_at: int | None) -> None:
        super().__init__()
        self.gradients, self.kill_at = 0, kill_at

    def add(self, num_examples: int) -> None:
        self.gradients += num_examples
        if self.gradients == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def make_step(counter: DeadlyCounter) -> tuple[Any, Any]:
    """The state to start from, and (state, batch) → (state, loss): late in training along an averaged gradient."""
    ascent = optax.chain(optax.ema(0.9), optax_sam.normalized_ascent(RHO))
    estimator = optax_sam.gradient_estimator(
        counter.counted(mlp_loss, num_examples=1),
        optax_sam.late(optax_sam.sharpness_aware(ascent), START),
        num_micro_batches=MICRO_BATCHES,
        strategy="scan",
    )
    optimizer = optax.sgd(0.05, momentum=0.9)

    def step(state, batch):
        params, link_state, optimizer_state = state
        loss, grads, link_state = estimator.value_and_grad(params, link_state, batch)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), link_state, optimizer_state), loss

    params = mlp_params()
    return (params, estimator.init(params), optimizer.init(params)), jax.jit(step, donate_argnums=0)


def place(tree: Any, spec: PartitionSpec) -> Any:
    """The tree on the devices of the mesh, if there are several."""
    mesh = jax.sharding.get_mesh()
    return tree if mesh.empty else jax.device_put(tree, NamedSharding(mesh, spec))


def train(folder: pathlib.Path, stop: int, kill_at: int | None) -> dict[str, np.ndarray]:
    """Trains until a step, and returns all numbers; the restored ones are written to a file first."""
    counter = DeadlyCounter(kill_at)
    state, step = make_step(counter)
    with checkpoints.Checkpoints(folder / "checkpoints") as saved:
        state, history = saved.restore(place(state, PartitionSpec()), {"loss": []})
        first = len(history["loss"])
        print(f"from step {first}", flush=True)
        np.savez(folder / "restored.npz", **numbers(state, history))
        counter.gradients = gradients_before(first)
        for number in range(first, stop):
            batch = place(mlp_batch(seed=number, size=BATCH_SIZE), PartitionSpec("data"))
            state, loss = step(state, batch)
            history["loss"].append(float(loss))
            saved.save(number + 1, state, history)
    jax.effects_barrier()
    print(f"{counter.gradients} gradients")
    return numbers(state, history)


def numbers(state: Any, history: dict[str, list[float]]) -> dict[str, np.ndarray]:
    """By name."""
    leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}
    return leaves | {"loss": np.array(history["loss"])}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--kill-at", type=int, metavar="GRADIENT", help="counted from the first step on")
    parser.add_argument("--stop", type=int, default=STEPS, metavar="STEP")
    parser.add_argument("--devices", type=int, default=1)
    settings = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", settings.devices)
    if settings.devices > 1:
        jax.set_mesh(jax.make_mesh((settings.devices,), ("data",)))
    np.savez(settings.folder / "end.npz", **train(settings.folder, settings.stop, settings.kill_at))


if __name__ == "__main__":
    main()
