"""The study of a method in a setting: tuning on some seeds, then the test on fresh ones. Every run is kept."""

import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.where_sam_pays import tuning
from benchmarks.where_sam_pays.methods import METHODS
from benchmarks.where_sam_pays.settings import SETTINGS, SMOKE, Sample
from benchmarks.where_sam_pays.training import Hyperparameters, trainer_of

TUNING_SEEDS = (1_000, 1_001, 1_002, 1_003, 1_004)
FIRST_TEST_SEED = 100
NUM_HESSIANS = 10  # of the test seeds
NUM_RUNNERS_UP = 2
# The lattice: a value is base · √2^exponent; an exponent of rho at its lower limit means 0.
RHO, ZERO = 0.1, -9
BASES = {"sgd": Hyperparameters(0.02, 5e-3, RHO), "adamw": Hyperparameters(2e-3, 0.1, RHO)}
LIMITS = ((-8, 8), (-8, 8), (ZERO, 14))
# What an untuned baseline has: the decay of most scripts, respectively Optax's default, and a usual learning rate.
DEFAULTS = {"sgd": (0.05, 5e-4), "adamw": (1e-3, 1e-4)}
RHO_LINE = (ZERO, *range(ZERO + 3, LIMITS[2][1], 2))
RATES = range(-4, 12, 2)  # exponents of the learning rate, relative to the tuned one, in the study of its range


class Job(NamedTuple):
    """One method in one setting, by their names."""

    setting: str
    method: str
    folder: pathlib.Path
    data_dir: pathlib.Path
    smoke: bool = False


class Runs:
    """The runs of a job, each trained once: those of an earlier process are read from its file."""

    def __init__(self, job: Job) -> None:
        self.setting, self.method = SETTINGS[job.setting], METHODS[job.method]
        if job.smoke:
            self.setting = self.setting._replace(**SMOKE)
        self.data_dir = job.data_dir
        self.path = job.folder / job.setting / f"{job.method}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.known: dict[tuple[Any, ...], dict[str, Any]] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # torn when the process was killed
            del lines[-1]
            self.path.write_text("".join(lines), encoding="utf-8")
        for record in map(json.loads, lines):
            self.known[tuple(record["run"])] = record

    def validation(self, hyperparameters: Hyperparameters, seed: int) -> float:
        """Accuracy on the validation set, whose labels are as noisy as those of the training set."""
        return self._run("validation", hyperparameters, seed)["validation"]

    def test(self, hyperparameters: Hyperparameters, seed: int, hessian: bool) -> dict[str, Any]:
        """Accuracies on the test sets, gradients per step, and the largest eigenvalue if asked for."""
        return self._run("hessian" if hessian else "test", hyperparameters, seed)

    def _run(self, kind: str, hyperparameters: Hyperparameters, seed: int) -> dict[str, Any]:
        key = (kind, *hyperparameters, seed)
        if key not in self.known:
            _check_parent()
            start = time.perf_counter()
            record = {"run": [*key], **self._train(kind, hyperparameters, seed)}
            record["seconds"] = round(time.perf_counter() - start, 3)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.known[key] = record
        return self.known[key]

    def _train(self, kind: str, hyperparameters: Hyperparameters, seed: int) -> dict[str, Any]:
        trainer, sample = trainer_of(self.setting, self.method), self._sample(seed)
        params, gradients = trainer.run(hyperparameters, seed, sample)
        if kind == "validation":
            accuracy = trainer.accuracy(params, sample.validation_inputs, sample.validation_labels)
            return {"validation": round(float(accuracy), 6)}
        tests = {name: trainer.accuracy(params, *test) for name, test in self.setting.load(self.data_dir).tests.items()}
        record = {"gradients": gradients, "test": {name: round(float(value), 6) for name, value in tests.items()}}
        if kind == "hessian":
            record["eigenvalue"] = float(f"{trainer.largest_eigenvalue(params, sample):.4g}")
        return record

    def _sample(self, seed: int) -> Sample:
        return _sample(self.setting, self.data_dir, seed)

    def seconds(self) -> float:
        """Of all runs, on one core."""
        return sum(record["seconds"] for record in self.known.values())


def settle(cores: Any) -> None:
    """Keeps a process on the core that is next in a queue, before JAX counts the cores to make as many threads."""
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[core % len(allowed)]})


def _check_parent() -> None:
    """Ends this process where the one that it works for was killed: two would write to one file after a restart."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)  # an exception would be kept for the parent, and the next job begun


@functools.lru_cache(maxsize=len(TUNING_SEEDS))
def _sample(setting, data_dir, seed):
    return setting.draw(setting.load(data_dir), seed)


def at(optimizer: str, point: tuning.Point) -> Hyperparameters:
    """The hyperparameters at a point of the lattice."""
    values = [float(f"{base * 2 ** (x / 2):.4g}") for base, x in zip(BASES[optimizer], point, strict=True)]
    return Hyperparameters(*values)._replace(rho=0.0 if point[2] == ZERO else values[2])


def tuned(job: Job) -> tuning.Point:
    """The best point on the tuning seeds, from a coarse grid; for SGD, which has no rho, from a finer one."""
    if METHODS[job.method].has_rho:
        return _search(job, itertools.product(range(-2, 5, 3), range(-3, 4, 3), RHO_LINE), LIMITS)
    return _search(job, itertools.product(range(-4, 5, 2), range(-6, 5, 2), [ZERO]), (*LIMITS[:2], (ZERO, ZERO)))


def best_rho_by_default(job: Job) -> Hyperparameters:
    """With the learning rate and decay of an untuned baseline, the best rho."""
    rate, decay = DEFAULTS[SETTINGS[job.setting].optimizer]
    *_, rho = (ZERO,)
    if METHODS[job.method].has_rho:
        fixed = (0, 0), (0, 0)
        *_, rho = _search(job, [(0, 0, rho) for rho in RHO_LINE], (*fixed, LIMITS[2]), rate, decay)
    return at(SETTINGS[job.setting].optimizer, (0, 0, rho))._replace(learning_rate=rate, weight_decay=decay)


def _search(job: Job, grid: Iterable[tuning.Point], limits: Any, *fixed: float) -> tuning.Point:
    """The point with the best mean accuracy on the validation sets of the tuning seeds."""
    runs, optimizer = Runs(job), SETTINGS[job.setting].optimizer
    seeds = TUNING_SEEDS[:1] if job.smoke else TUNING_SEEDS
    points = list(grid)

    def score(point, num_seeds):
        hyperparameters = Hyperparameters(*(*fixed, *at(optimizer, point)[len(fixed) :]))
        return sum(runs.validation(hyperparameters, seed) for seed in seeds[:num_seeds]) / num_seeds

    return tuning.search(score, points[:: len(points) // 3] if job.smoke else points, limits, len(seeds))


def studied(job: Job) -> dict[str, Any]:
    """The method tuned and with the baseline's defaults, each tested on all fresh seeds."""
    point = tuned(job)
    runs = Runs(job)
    optimizer = runs.setting.optimizer
    limits = LIMITS if METHODS[job.method].has_rho else LIMITS[:2]
    edges = [Hyperparameters._fields[axis] for axis in tuning.at_edge(point[: len(limits)], limits)]
    return {
        "tuned": tested(runs, at(optimizer, point), NUM_HESSIANS) | {"edges": edges},
        "runners_up": [tested(runs, other, 0) for other in _runners_up(runs, at(optimizer, point))],
        "default": tested(runs, best_rho_by_default(job), 0),
    }


def _runners_up(runs: Runs, best: Hyperparameters) -> list[Hyperparameters]:
    """The next best of the tuning: how much they differ when tested says how much of a result is luck."""
    scores: dict[Hyperparameters, list[float]] = {}
    for (kind, *values, _), record in runs.known.items():
        if kind == "validation":
            scores.setdefault(Hyperparameters(*values), []).append(record["validation"])
    most = max(map(len, scores.values()))
    tried = [found for found in scores if len(scores[found]) == most and found[:2] != DEFAULTS[runs.setting.optimizer]]
    return sorted((found for found in tried if found != best), key=lambda found: -sum(scores[found]))[:NUM_RUNNERS_UP]


def rates_of(job: Job) -> list[dict[str, Any]]:
    """The method at its tuned decay and rho, with learning rates below and above the tuned one."""
    runs, optimizer = Runs(job), SETTINGS[job.setting].optimizer
    best = at(optimizer, tuned(job))
    rates = [best._replace(learning_rate=float(f"{best.learning_rate * 2 ** (x / 2):.4g}")) for x in RATES]
    return [tested(runs, hyperparameters, 0) for hyperparameters in rates]


def tested(runs: Runs, hyperparameters: Hyperparameters, num_hessians: int) -> dict[str, Any]:
    """Accuracies by test set, and eigenvalues, in the order of the seeds."""
    numbers = range(runs.setting.num_seeds)
    records = [runs.test(hyperparameters, FIRST_TEST_SEED + number, number < num_hessians) for number in numbers]
    return {
        **hyperparameters._asdict(),
        "gradients": round(sum(record["gradients"] for record in records) / len(records), 4),
        "test": {name: [record["test"][name] for record in records] for name in records[0]["test"]},
        "eigenvalues": [record["eigenvalue"] for record in records if "eigenvalue" in record],
    }
