"""Trains a network on digits with late mSAM in several processes, each with its own devices and its own images.

    python examples/training/multi_process.py --processes 2 --checkpoint-dir runs/checkpoints  # all on this machine
    python examples/training/multi_process.py --coordinator HOST:PORT --processes 2 --rank 0   # on each, with its rank

The part to take home is ``Trainer``: the estimator inside ``shard_map``, over a mesh of the devices of all processes.
The numbers depend on the number of devices, not on how these are spread over processes.

Each command trains in processes of its own and watches them (``workers``): if one dies it stops the rest, says why, and
where training goes on. What libraries log is in runs/NAME.
"""

import argparse
import json
import pathlib
import sys
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam
from examples.training import checkpoints, datasets, models, report, workers

LAYOUT = ("processes", "devices_per_process", "coordinator", "rank", "start_timeout")
PLACES = ("checkpoint_dir", "name", "folder")
SHARDED, REPLICATED = PartitionSpec("data"), PartitionSpec()


class Trainer:
    """What one process has of the training: functions over all devices, and the images of its own ones."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings, self.num_devices = settings, jax.device_count()
        self.mesh = jax.make_mesh((self.num_devices,), ("data",), axis_types=(AxisType.Auto,))
        owners = [device.process_index for device in self.mesh.devices.flat]
        self.own = np.flatnonzero(np.equal(owners, jax.process_index())).tolist()
        data = datasets.load("digits", pathlib.Path())
        self.images, self.labels = self.own_rows(data.train_images), self.own_rows(data.train_labels)
        self.test_images, self.test_labels = data.test_images, data.test_labels
        self.rows_per_step = settings.batch_size // self.num_devices
        self.steps_per_epoch = self.images.shape[1] // self.rows_per_step
        if not self.steps_per_epoch:
            raise workers.SettingsError(
                f"--batch-size {settings.batch_size} is more than {len(data.train_labels)} images"
            )
        self.model = models.MLP()
        self.logits = jax.jit(lambda params, images: self.model.apply({"params": params}, images))
        schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.epochs * self.steps_per_epoch)
        self.optimizer = optax.sgd(schedule, momentum=0.9)
        self.estimator = optax_sam.gradient_estimator(
            self.loss_fn,
            optax_sam.late(optax_sam.sam(settings.rho), start=settings.switch_at * self.steps_per_epoch),
            num_micro_batches=settings.micro_batches,
            axis_name="data",
        )
        specs = (REPLICATED, SHARDED, SHARDED, SHARDED)
        step = jax.shard_map(self.step_of_device, mesh=self.mesh, in_specs=specs, out_specs=REPLICATED)
        self.step = jax.jit(step, donate_argnums=0)

    def loss_fn(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, labels = batch
        logits = self.logits(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def init(self) -> Any:
        """Params, state of the link and state of the optimizer, the same on all devices."""

        def init():
            params = self.model.init(jax.random.key(self.settings.seed), self.test_images[:1])["params"]
            return params, self.estimator.init(params), self.optimizer.init(params)

        return jax.jit(init, out_shardings=NamedSharding(self.mesh, REPLICATED))()

    def step_of_device(self, state, images, labels, rows):
        params, link_state, optimizer_state = state
        batch = images[0, rows[0]], labels[0, rows[0]]
        loss, grads, link_state = self.estimator.value_and_grad(params, link_state, batch)
        updates, optimizer_state = self.optimizer.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), link_state, optimizer_state), loss

    def batches(self, epoch: int) -> Iterator[jax.Array]:
        """For each step the rows that each device takes of its own."""
        rngs = [np.random.default_rng((self.settings.seed, epoch, device)) for device in self.own]
        orders = np.stack([rng.permutation(self.images.shape[1]).astype(np.int32) for rng in rngs])
        for start in range(0, self.steps_per_epoch * self.rows_per_step, self.rows_per_step):
            yield self.to_devices(orders[:, start : start + self.rows_per_step])

    def own_rows(self, rows: np.ndarray) -> jax.Array:
        """Equal numbers of rows for all devices, dealt out like cards."""
        size = len(rows) // self.num_devices
        return self.to_devices(np.stack([rows[device :: self.num_devices][:size] for device in self.own]))

    def to_devices(self, blocks: np.ndarray) -> jax.Array:
        """A global array (device, ...), from the blocks of the devices of this process."""
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, SHARDED), blocks)

    def test_accuracy(self, params: Any) -> float:
        """Each process evaluates for itself: no communication, and the same number everywhere."""
        logits = np.asarray(self.logits(jax.device_get(params), self.test_images))
        return float(np.mean(logits.argmax(axis=-1) == self.test_labels))


def train(settings: argparse.Namespace) -> dict[str, Any]:
    """Trains from the last checkpoint on, if there is one; returns what was measured."""
    check_agreement(settings)
    trainer = Trainer(settings)
    steps = trainer.steps_per_epoch
    tqdm.tqdm.set_lock(threading.RLock())  # its own would be a semaphore, which outlives a killed process
    saved = checkpoints.Checkpoints(settings.checkpoint_dir)
    try:
        state, history = saved.restore(trainer.init(), {"train_loss": [], "test_accuracy": []})
    except ValueError as error:
        raise workers.SettingsError(str(error)) from error
    epochs = range(len(history["train_loss"]), settings.epochs)
    hidden = None if jax.process_index() == 0 else True
    with tqdm.tqdm(total=settings.epochs * steps, initial=epochs.start * steps, unit=" steps", disable=hidden) as bar:
        for epoch in epochs:
            losses = []
            for rows in trainer.batches(epoch):
                state, loss = trainer.step(state, trainer.images, trainer.labels, rows)
                losses.append(loss)
                bar.update()
            history["train_loss"].append(float(np.mean(jax.device_get(losses))))
            history["test_accuracy"].append(trainer.test_accuracy(state[0]))
            bar.set_postfix_str(f"{100 * history['test_accuracy'][-1]:.1f} % test accuracy")
            saved.save(epoch + 1, state, history)
    saved.close()  # not by `with`: after a failure it would wait for processes that are gone
    final = {name: values[-1] for name, values in history.items()}
    return final | {"params_norm": float(jax.jit(optax.tree.norm)(state[0])), "history": history}


def shared(settings: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    return {name: value for name, value in vars(settings).items() if name not in LAYOUT + PLACES}


def check_agreement(settings: argparse.Namespace) -> None:
    """Compares what all processes must have in common; they would otherwise wait for each other, or train apart."""
    if jax.device_count() != settings.devices:
        raise workers.SettingsError(
            f"there are {jax.device_count()} devices, not {settings.devices}: see --devices-per-process"
        )
    files = sorted(path.name for path in settings.checkpoint_dir.glob("*")) if settings.checkpoint_dir else None
    facts = json.dumps([shared(settings), jax.__version__, files]).encode()
    checksums = np.ravel(multihost_utils.process_allgather(np.uint32(zlib.crc32(facts))))
    if others := np.flatnonzero(checksums != checksums[0]).tolist():
        raise workers.SettingsError(f"process {others[0]} has another JAX, settings or --checkpoint-dir than process 0")


def run(settings: argparse.Namespace) -> None:
    """What each process does; the first writes results.json and prints a table."""
    final = train(settings)
    if jax.process_index() != 0:
        return
    results = {"settings": shared(settings), "processes": settings.processes, **report.environment(), **final}
    path = settings.folder / "results.json"
    path.write_text(json.dumps(report.finite(results), indent=1, allow_nan=False) + "\n")
    print("devices  processes  micro-batches  train loss  test accuracy  norm of params")
    print(
        f"{settings.devices:>7}{settings.processes:>11}{settings.devices * settings.micro_batches:>15}"
        f"{final['train_loss']:>12.6f}{100 * final['test_accuracy']:>13.2f} %{final['params_norm']:>16.9g}"
    )
    print(f"Wrote {path}.")


def advice(settings: argparse.Namespace) -> str:
    """What to do after a failure, and where training goes on."""
    again = "Start the same command again" if settings.rank is None else "Start all processes again"
    if settings.checkpoint_dir is None:
        return f"{again}: training begins anew; with --checkpoint-dir it would go on where it was."
    saved = [int(path.name) for path in settings.checkpoint_dir.glob("*") if path.name.isdecimal()]
    return f"{again}: training goes on after epoch {max(saved, default=0)} of {settings.epochs}."


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains with late mSAM in several processes.")
    add = parser.add_argument
    add("--processes", type=int, default=2, help="in all")
    add("--devices-per-process", type=int, default=1, help="CPU devices or GPUs of each")
    add("--coordinator", metavar="HOST:PORT", help="an address of rank 0; default: all processes on this machine")
    add("--rank", type=int, help="of this process, with --coordinator")
    add("--start-timeout", type=int, default=60, metavar="SECONDS", help="for all processes to find each other")
    add("--epochs", type=int, default=20)
    add("--batch-size", type=int, default=128, help="of all devices together")
    add("--micro-batches", type=int, default=8, help="on each device")
    add("--learning-rate", type=float, default=0.1, help="at the start of the cosine schedule")
    add("--rho", type=float, default=0.05)
    add("--switch-at", type=int, help="epoch at which mSAM starts; default: after half")
    add("--seed", type=int, default=0)
    add("--checkpoint-dir", type=pathlib.Path, help="save after every epoch, and go on from what is there")
    add("--name", default="multi_process", help="results and logs go to runs/NAME")
    settings = parser.parse_args(arguments)
    settings.folder = pathlib.Path("runs") / settings.name
    if settings.switch_at is None:
        settings.switch_at = settings.epochs // 2
    for name in ("processes", "devices_per_process", "start_timeout", "epochs", "batch_size", "micro_batches"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {getattr(settings, name)}")
    for name in ("learning_rate", "rho", "seed"):
        if not 0 <= getattr(settings, name) < np.inf:
            parser.error(f"--{name.replace('_', '-')} must be finite and at least 0; got {getattr(settings, name)}")
    settings.devices = settings.processes * settings.devices_per_process
    if settings.batch_size % (settings.devices * settings.micro_batches):
        counts = f"{settings.devices} devices × {settings.micro_batches} micro-batches"
        parser.error(f"--batch-size {settings.batch_size} must be divisible by {counts}")
    if not 0 <= settings.switch_at <= settings.epochs:
        parser.error(f"--switch-at must be an epoch from 0 to {settings.epochs}; got {settings.switch_at}")
    if settings.coordinator is not None and not settings.coordinator.rpartition(":")[2].isdecimal():
        parser.error(f"--coordinator must be HOST:PORT; got {settings.coordinator}")
    if (settings.coordinator is None) != (settings.rank is None):
        parser.error("--coordinator and --rank go together")
    if settings.rank is not None and not 0 <= settings.rank < settings.processes:
        parser.error(f"--rank must be from 0 to {settings.processes - 1}; got {settings.rank}")
    return settings


def main(arguments: list[str] | None = None) -> None:
    settings = parse(arguments)
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
        if settings.checkpoint_dir and settings.rank in (None, 0):
            checkpoints.claim(settings.checkpoint_dir, shared(settings))
        failure = workers.watch(run, settings)
    except (OSError, ValueError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = f"stopped. {advice(settings)}"
    else:
        if failure is None:
            return
        message = failure.obituary() if failure.was_refused() else f"{failure.obituary()}. {advice(settings)}"
    end_of_bar = "\n" if sys.stderr.isatty() else ""
    sys.exit(f"{end_of_bar}multi_process.py: {message}")


if __name__ == "__main__":
    main()
