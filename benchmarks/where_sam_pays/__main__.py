"""Where SAM pays: every method tuned alike, in settings with wrong labels and without, against three controls.

    python -m benchmarks.where_sam_pays                       # all but those for a GPU: hours; goes on where it stopped
    python -m benchmarks.where_sam_pays --setting look_alike  # one
    python -m benchmarks.where_sam_pays --smoke               # everything as small as can be: a minute

Writes one JSON file for each setting, with every seed, and the picture, and prints the tables.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm

from benchmarks import timing
from benchmarks.papers.reproduction import RESULTS, write_record
from benchmarks.where_sam_pays import claims, report, study
from benchmarks.where_sam_pays.methods import FEW, METHODS
from benchmarks.where_sam_pays.settings import FOR_GPU, SETTINGS
from examples.training import checkpoints

RUNS = pathlib.Path("runs/where_sam_pays")
PICTURE = "look_alike"
EVERY_METHOD = ("look_alike", "clean", "symmetric", "cifar_10n")
RATES_SETTING, RATES_METHODS = "look_alike", ("sgd", "usam", "sam", "stable_sam")
# A worker computes on one core: matrices this small are not worth two, and runs are plenty.
WORKER = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str((RUNS / "programs").resolve()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.where_sam_pays",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, metavar="NAME")
    parser.add_argument("--data-dir", type=pathlib.Path, default=pathlib.Path("data"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, each of them on one core")
    parser.add_argument("--smoke", action="store_true", help="everything as small as can be, on scikit-learn's digits")
    options = parser.parse_args(arguments)
    runs = RUNS.with_name("where_sam_pays-smoke") if options.smoke else RUNS
    if options.smoke:
        shutil.rmtree(runs, ignore_errors=True)
    results = runs if options.smoke else RESULTS
    os.environ.update(WORKER)
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    names = options.setting or [name for name in SETTINGS if options.smoke or name not in FOR_GPU]
    for worker in range(options.workers):
        cores.put(worker)
    with concurrent.futures.ProcessPoolExecutor(options.workers, context, study.settle, (cores,)) as pool:
        for name in names:
            jobs = [study.Job(name, method, runs, options.data_dir, options.smoke) for method in methods_of(name)]
            record = record_of(pool, jobs)
            write_record(results / f"where_sam_pays_{name}.json", record)
            print(report.table(record), end="\n\n")
    found = report.records(results)
    record = {"command": "python -m benchmarks.where_sam_pays", "claims": [c._asdict() for c in claims.claims(found)]}
    write_record(results / "where_sam_pays.json", record)
    figure = report.draw(found[PICTURE if PICTURE in found else names[0]])
    figure.savefig(results / "where_sam_pays.png", dpi=130)


def methods_of(setting: str) -> Sequence[str]:
    """All, or the few of the settings that only answer one question."""
    return list(METHODS) if setting in EVERY_METHOD else FEW


def record_of(pool: concurrent.futures.Executor, jobs: Sequence[study.Job]) -> dict[str, Any]:
    """All of a setting: what came out, and under which conditions."""
    setting = study.Runs(jobs[0]).setting
    conditions = {key: value for key, value in setting._asdict().items() if isinstance(value, int | str)}
    conditions |= {"network": " ".join(repr(setting.network).split()), **timing.environment()}
    checkpoints.claim(jobs[0].folder / jobs[0].setting, conditions)
    with tqdm.tqdm(total=len(jobs), desc=jobs[0].setting, unit=" methods") as bar:
        found = dict(_completed(pool, study.studied, jobs, bar))
    record = {
        "command": f"python -m benchmarks.where_sam_pays --setting {jobs[0].setting}",
        **conditions,
        "core_minutes": round(sum(study.Runs(job).seconds() for job in jobs) / 60, 1),
        "methods": {job.method: found[job.method] for job in jobs},
    }
    if jobs[0].setting == RATES_SETTING:
        chosen = [job for job in jobs if job.method in RATES_METHODS]
        with tqdm.tqdm(total=len(chosen), desc="learning rates", unit=" methods") as bar:
            record["rates"] = dict(_completed(pool, study.rates_of, chosen, bar))
    return record


def _completed(pool, function, jobs, bar) -> Iterator[tuple[str, Any]]:
    """(name of the method, result) of each job as it is completed."""
    futures = {pool.submit(function, job): job.method for job in jobs}
    for future in concurrent.futures.as_completed(futures):
        yield futures[future], future.result()
        bar.set_postfix_str(futures[future])
        bar.update()


if __name__ == "__main__":
    main()
