"""Mutants: would the tests notice another operator?

    python tests/mutants.py [FILE ...] [--workers N]

Every arithmetic operator, comparison and ``and`` or ``or`` of the package is replaced, one at a time, in a copy of the
project, and the tests of its file are run until one fails. Mutants that no test notices are printed.
"""

import argparse
import ast
import concurrent.futures
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import tqdm

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ("optax_sam", "tests", "benchmarks", "examples", "README.md", "pyproject.toml")
OTHERS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
# The tests that are nearest to a file come first; a mutant is dead at the first failure.
TESTS = {
    "ascent.py": "ascent numbers transform family golden sharding devices",
    "averaging.py": "averaging errors family devices estimator contract",
    "axes.py": "axes errors switching sharding devices measurement_devices",
    "checks.py": "errors hessian landscape",
    "convolution.py": "convolution cost",
    "estimator.py": "estimator errors family numbers devices sharding",
    "family.py": "errors family switching",
    "measurement.py": "measurement measurement_devices errors",
    "micro_batches.py": "estimator errors numbers devices cost",
    "renormalization.py": "renormalization errors family numbers",
    "sharding.py": "sharding devices errors",
    "switching.py": "switching errors numbers family axes measurement",
    "transform.py": "transform errors numbers family contract devices",
    "sharpness/hessian.py": "hessian errors",
    "sharpness/lanczos.py": "hessian landscape sharpness",
    "sharpness/landscape.py": "landscape errors",
    "sharpness/plots.py": "plots errors",
    "sharpness/rise.py": "sharpness errors",
    "sharpness/streaming.py": "hessian sharpness landscape errors",
}


class Mutant(NamedTuple):
    """One replaced operator: a file of the package, the line, what it reads then, and the source of the whole file."""

    file: str
    line: int
    text: str
    source: str


def mutants_of(file: str) -> Iterator[Mutant]:
    """All mutants of a file, formatted by ``ast.unparse`` like the rest of it."""
    original = (ROOT / "optax_sam" / file).read_text()
    count = sum(1 for _ in _operators(ast.parse(original)))
    for index in range(count):
        tree = ast.parse(original)
        node, name, position = list(_operators(tree))[index]
        if position is None:
            setattr(node, name, OTHERS[type(getattr(node, name))]())
        else:
            operators = getattr(node, name)
            operators[position] = OTHERS[type(operators[position])]()
        yield Mutant(file, node.lineno, ast.unparse(node), ast.unparse(tree))


def _operators(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Where the operators are: a node, the name of its field and, in a list, the position."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in OTHERS:
            yield node, "op", None
        elif isinstance(node, ast.Compare):
            for position in range(len(node.ops)):
                yield node, "ops", position


def survives(mutant: Mutant, folder: pathlib.Path) -> bool:
    """Whether no test in this copy of the project fails."""
    path = folder / "optax_sam" / mutant.file
    original = path.read_text()
    path.write_text(mutant.source)
    files = [f"tests/test_{name}.py" for name in TESTS[mutant.file].split()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", *files]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    except subprocess.TimeoutExpired:
        return False
    finally:
        path.write_text(original)
    if run.returncode not in (0, 1, 2):
        raise RuntimeError(f"pytest ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return run.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(TESTS), metavar="FILE", help="of optax_sam; default: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--log", type=pathlib.Path, help="a line of JSON for each mutant; those in it are not run again"
    )
    options = parser.parse_args()
    mutants = [mutant for file in options.files for mutant in mutants_of(file)]
    done = {}
    if options.log and options.log.exists():
        lines = map(json.loads, options.log.read_text().splitlines())
        done = {(line["file"], line["line"], line["text"]): line["survives"] for line in lines}
    with tempfile.TemporaryDirectory() as work:
        folders = queue.SimpleQueue()
        for number in range(options.workers):
            folder = pathlib.Path(work, str(number))
            for name in COPIED:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                folder.mkdir(exist_ok=True)
                copy(ROOT / name, folder / name)
            folders.put(folder)

        def run(mutant: Mutant) -> bool:
            folder, start = folders.get(), time.perf_counter()
            try:
                alive = survives(mutant, folder)
            finally:
                folders.put(folder)
            if options.log:
                line = {**mutant._asdict(), "survives": alive, "seconds": round(time.perf_counter() - start, 1)}
                del line["source"]
                with options.log.open("a") as log:
                    log.write(json.dumps(line, ensure_ascii=False) + "\n")
            return alive

        alive = [mutant for mutant in mutants if done.get(mutant[:3])]
        rest = [mutant for mutant in mutants if mutant[:3] not in done]
        with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
            outcomes = tqdm.tqdm(pool.map(run, rest), total=len(rest), unit="mutant")
            alive += [mutant for mutant, outcome in zip(rest, outcomes, strict=True) if outcome]
    for mutant in alive:
        print(f"{mutant.file}:{mutant.line}: {mutant.text}")
    print(f"{len(mutants) - len(alive)} of {len(mutants)} mutants are noticed.")


if __name__ == "__main__":
    main()
