"""Could rho be read off a few batches? Three lengths that a loss has along its gradient, beside the rho that was tuned.

    python -m benchmarks.where_sam_pays.finder

For every setting that has been studied, at random params and after the training with tuned SGD; means over seeds and
batches. Nothing else is trained.
"""

import argparse
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import scipy.stats
import tqdm

import optax_sam
from benchmarks import timing
from benchmarks.papers.reproduction import RESULTS, write_record
from benchmarks.where_sam_pays import report
from benchmarks.where_sam_pays.methods import METHODS
from benchmarks.where_sam_pays.settings import SETTINGS
from benchmarks.where_sam_pays.training import Hyperparameters, Trainer

SEEDS, BATCHES = (0, 1, 2), 4
LENGTHS = 0.001 * 2 ** np.arange(0, 14, 0.25)
SHARE = 0.1  # of the rise that the quadratic may miss
PLACES = {"at random params": 0, "after SGD": 1}


def lengths(loss_fn: Any, params: Any, batch: Any) -> dict[str, float]:
    """Of a loss along its gradient: where the terms of first and second order are equal, and where it leaves both."""
    loss, gradient = jax.value_and_grad(loss_fn)(params, batch)
    norm = float(optax_sam.norm(gradient))
    curvature = optax_sam.directional_sharpness(loss_fn, params, gradient, [batch])
    direction = optax.tree.scale(1 / norm, gradient)
    end = optax.tree.add_scale(params, float(LENGTHS[-1]), direction)
    line = optax_sam.loss_along(loss_fn, params, end, [batch], positions=[0.0, *(LENGTHS / LENGTHS[-1])])
    rises = np.array(line.losses[1:]) - float(loss)
    missed = np.abs(rises - LENGTHS * norm - LENGTHS**2 * curvature / 2) > SHARE * np.abs(rises)
    return {
        "‖g‖": norm,
        "‖g‖ / curvature": norm / abs(curvature),
        "where it leaves its quadratic": float(LENGTHS[np.argmax(missed)] if missed.any() else LENGTHS[-1]),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.where_sam_pays.finder")
    parser.add_argument("--data-dir", type=pathlib.Path, default=pathlib.Path("data"))
    options = parser.parse_args(arguments)
    records, rows = report.records(RESULTS), {}
    for name, record in tqdm.tqdm(records.items(), unit=" settings"):
        setting, tuned = SETTINGS[name], record["methods"]["sgd"]["tuned"]
        trainer, data = Trainer(setting, METHODS["sgd"]), setting.load(options.data_dir)
        best = Hyperparameters(tuned["learning_rate"], tuned["weight_decay"], 0.0)
        found: dict[str, list[dict[str, float]]] = {place: [] for place in PLACES}
        for seed in SEEDS:
            sample = setting.draw(data, seed)
            for place, trained in PLACES.items():
                params, _ = trainer.run(best._replace(learning_rate=trained * best.learning_rate), seed, sample)
                for start in range(0, BATCHES * setting.batch_size, setting.batch_size):
                    part = slice(start, start + setting.batch_size)
                    found[place].append(lengths(trainer.loss_fn, params, (sample.inputs[part], sample.labels[part])))
        rows[name] = {"rho of SAM": record["methods"]["sam"]["tuned"]["rho"]} | {
            f"{quantity}, {place}": float(f"{np.exp(np.mean([np.log(one[quantity]) for one in several])):.4g}")
            for place, several in found.items()
            for quantity in several[0]
        }
    quantities = list(next(iter(rows.values())))
    table = np.array([[row[quantity] for quantity in quantities] for row in rows.values()])
    correlations = {
        quantity: float(np.asarray(scipy.stats.spearmanr(table[:, 0], table[:, column]))[0])
        for column, quantity in enumerate(quantities)
        if column
    }
    for name, row in rows.items():
        print(f"{name:<18}", "  ".join(f"{quantity} {value:.3g}" for quantity, value in row.items()))
    print("rank correlation with the tuned rho:", correlations)
    result = {"command": "python -m benchmarks.where_sam_pays.finder", **timing.environment()}
    result |= {"settings": rows, "rank_correlations": correlations}
    write_record(RESULTS / "rho_finder.json", result)


if __name__ == "__main__":
    main()
