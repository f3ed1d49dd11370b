"""Where the gain of SAM comes from: how many examples share an ascent, and when SAM begins.

    python -m benchmarks.papers.understanding [--smoke] [--data-dir DIR] [--resume]

Andriushchenko and Flammarion, Towards Understanding Sharpness-Aware Minimization, 2022
(https://arxiv.org/abs/2206.06232). Reproduced to the digits that the authors print: a diagonal linear network with
unnormalized SAM. With normalized SAM: a curve through 12 points, and a residual network on a subset of CIFAR-10 with
fewer and fewer examples for each ascent, with SAM that goes on from a solution of SGD, and with labels by people who
are often wrong (CIFAR-10N).

Other than in the paper: 5,000 images (2,500 with the wrong labels) without augmentation, a small network with
GroupNorm, a cosine schedule, and weight decay behind SAM instead of in the loss.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import optax
import tqdm

import optax_sam
from benchmarks.papers import training
from benchmarks.papers import understanding_report as report
from benchmarks.papers import understanding_toys as toys
from benchmarks.papers.reproduction import Reproduction
from examples.training import datasets

NUM_IMAGES, EPOCHS, SEEDS, LEARNING_RATE, RHO = 5_000, 16, (0, 1, 2), 0.1, 0.1
PER_ASCENT = (128, 32, 8)  # examples
TUNING_FRACTION, TUNING_RATE = 1 / 3, 0.01  # of the epochs; a tenth of the learning rate
NOISE_IMAGES, NOISE_EPOCHS, NOISE_EVALUATIONS, NOISE_LABELS = 2_500, 48, 12, "worse_label"  # epochs enough to fit them
SMOKE_NOISE = 0.4  # of the labels, about as many as in CIFAR-10N's worst
LABELS_FILE = "cifar-10n-labels.npz"

SGD, SAM = optax.identity(), optax_sam.sam(RHO)


def diagonal(steps: int) -> dict[str, Any]:
    """All of the diagonal linear network."""
    names = tqdm.tqdm(toys.TABLES, desc="diagonal network", disable=None)
    return {"tables": {name: toys.table(name, steps) for name in names}, "switch": toys.switches(steps)}


def ascents(trainer: training.Trainer, per_ascent: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    """Final test accuracies and training losses, (seeds,) each, of SGD and by the examples of an ascent."""
    optimizer, batch_size = training.decayed_sgd(trainer.task, LEARNING_RATE), trainer.task.batch_size
    methods = {"SGD": (SGD, 1)} | {str(examples): (SAM, batch_size // examples) for examples in per_ascent}
    results: dict[str, Any] = {}
    total = len(methods) * len(seeds) * trainer.task.epochs
    with tqdm.tqdm(total=total, desc="examples per ascent", unit=" epochs", disable=None) as bar:
        for name, (link, num_micro_batches) in methods.items():
            runs = [training.Run(f"{name}-{seed}", link, optimizer, seed, num_micro_batches) for seed in seeds]
            results[name] = last([trainer.train(run, bar) for run in runs])
    return results


def fine_tuning(trainer: training.Trainer, seeds: Sequence[int]) -> dict[str, Any]:
    """The same of SGD, and where SGD and SAM come to from there with a small learning rate."""
    epochs = max(round(TUNING_FRACTION * trainer.task.epochs), 1)
    optimizer = training.decayed_sgd(trainer.task, LEARNING_RATE)
    starts = [trainer.train(training.Run(f"SGD-{seed}", SGD, optimizer, seed)) for seed in seeds]
    results = {"start": last(starts)}
    optimizer = training.decayed_sgd(trainer.task, TUNING_RATE, epochs=epochs)
    with tqdm.tqdm(total=2 * len(seeds) * epochs, desc="fine-tuning", unit=" epochs", disable=None) as bar:
        for name, link in {"SGD": SGD, "SAM": SAM}.items():
            runs = [
                training.Run(f"SGD-{seed}-{name}", link, optimizer, seed, start=start.params, epochs=epochs)
                for seed, start in zip(seeds, starts, strict=True)
            ]
            results[name] = last([trainer.train(run, bar) for run in runs])
    return results


def last(runs: Sequence[training.Trained]) -> dict[str, list[float]]:
    return {key: [run.history[key][-1] for run in runs] for key in ("test_accuracy", "train_loss")}


def human_labels(data_dir: pathlib.Path, true_labels: np.ndarray) -> np.ndarray:
    """The labels that people gave to the first training images of CIFAR-10, the worst of three for each.

    Raises:
        DatasetError: their file is absent, or is not of these images.
    """
    path = data_dir / LABELS_FILE
    if not path.exists():
        raise datasets.DatasetError(
            f"{LABELS_FILE} is not in {data_dir}. Make it from CIFAR-10_human.pt of "
            "https://github.com/UCSC-REAL/cifar-10-100n: an array of labels for each of its keys, among them "
            f"clean_label and {NOISE_LABELS}, in the order of the training images."
        )
    with np.load(path) as labels:
        missing = {"clean_label", NOISE_LABELS} - set(labels)
        if missing:
            raise datasets.DatasetError(f"{path} has no {' and '.join(sorted(missing))}; it has {', '.join(labels)}")
        clean, noisy = (labels[key][: len(true_labels)] for key in ("clean_label", NOISE_LABELS))
    if not np.array_equal(clean, true_labels):
        raise datasets.DatasetError(f"{path}: clean_label is not the labels of the training images of CIFAR-10")
    return noisy.astype(np.int32)


def flipped_labels(true_labels: np.ndarray) -> np.ndarray:
    """Some of the labels replaced by others: the first of a random permutation."""
    rng = np.random.default_rng(0)
    places = rng.permutation(len(true_labels))[: round(SMOKE_NOISE * len(true_labels))]
    noisy = true_labels.copy()
    noisy[places] = (true_labels[places] + rng.integers(1, 10, len(places))) % 10
    return noisy


def noisy_task(reproduction: Reproduction) -> tuple[training.Task, np.ndarray]:
    """The task with the labels that are often wrong, and which of them are."""
    task = training.cifar10(reproduction, NOISE_IMAGES, NOISE_EPOCHS, augments=False)
    true_labels = task.data.train_labels
    noisy = flipped_labels(true_labels) if reproduction.smoke else human_labels(reproduction.data_dir, true_labels)
    return task._replace(data=task.data._replace(train_labels=noisy)), noisy != true_labels


def noise(trainer: training.Trainer, is_wrong: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
    """Test accuracy over epochs, and how many of the right and wrong labels are fitted at the end, (seeds,) each."""
    optimizer = training.decayed_sgd(trainer.task, LEARNING_RATE)
    parts = {"wrong_fitted": np.flatnonzero(is_wrong), "right_fitted": np.flatnonzero(~is_wrong)}
    results: dict[str, Any] = {"wrong_labels": float(is_wrong.mean())}
    total = 2 * len(seeds) * trainer.task.epochs
    with tqdm.tqdm(total=total, desc="label noise", unit=" epochs", disable=None) as bar:
        for name, link in {"SGD": SGD, "SAM": SAM}.items():
            runs = [trainer.train(training.Run(f"{name}-{seed}", link, optimizer, seed), bar) for seed in seeds]
            results[name] = {key: [run.history[key] for run in runs] for key in runs[0].history}
            for key, part in parts.items():
                images, labels = trainer.images[part], trainer.labels[part]
                results[name][key] = [trainer.score(run.params, images, labels)[1] for run in runs]
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    reproduction = Reproduction("understanding", __doc__, arguments)
    smoke, seeds, per_ascent = reproduction.smoke, reproduction.few(SEEDS), reproduction.few(PER_ASCENT)
    noisy, is_wrong = noisy_task(reproduction)  # first, as its file may be absent
    clean = training.cifar10(reproduction, NUM_IMAGES, EPOCHS, augments=False)
    steps, curve_steps = (50, 200) if smoke else (toys.STEPS, toys.CURVE_STEPS)
    labels = "flipped at random" if smoke else f"{NOISE_LABELS} of CIFAR-10N"
    curve_seeds = 3 if smoke else toys.CURVE_SEEDS
    shared = {"learning_rate": LEARNING_RATE, "rho": RHO, **training.SGD_SETTINGS}
    on_clean, on_noisy = clean.settings() | shared, noisy.settings() | shared | {"labels": labels}
    settings = {
        "diagonal": {"steps": steps, "tables": toys.table_settings(), "switch": toys.switch_settings()},
        "curves": {"steps": curve_steps, "seeds": curve_seeds, "learning_rate": toys.CURVE_RATE, "rho": toys.CURVE_RHO},
        "ascents": {**on_clean, "seeds": seeds, "per_ascent": per_ascent},
        "fine_tuning": {**on_clean, "seeds": seeds, "fraction": TUNING_FRACTION, "fine_tuning_rate": TUNING_RATE},
        "noise": {**on_noisy, "seeds": seeds, "evaluations": NOISE_EVALUATIONS},
    }
    trainer = training.Trainer(clean, reproduction.folder / "clean", on_clean, evaluations=2)
    noisy_trainer = training.Trainer(noisy, reproduction.folder / "noisy", on_noisy, NOISE_EVALUATIONS)
    computations = {
        "diagonal": lambda: diagonal(steps),
        "curves": lambda: toys.curves(curve_steps, curve_seeds),
        "ascents": lambda: ascents(trainer, per_ascent, seeds),
        "fine_tuning": lambda: fine_tuning(trainer, seeds),
        "noise": lambda: noise(noisy_trainer, is_wrong, seeds),
    }
    results = {name: reproduction.part(name, settings[name], compute) for name, compute in computations.items()}
    recorded = {name: {"settings": settings[name], "measured": result} for name, result in results.items()}
    reproduction.finish(recorded, report.claims(results, settings), report.figure(results))


if __name__ == "__main__":
    main()
