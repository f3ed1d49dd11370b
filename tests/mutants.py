"""Mutants: would the tests notice another operator?

    COVERAGE_FILE=runs/mutants.coverage pytest -n auto -m "heavy or not heavy" \\
        --cov=optax_sam --cov-branch --cov-context=test --junitxml=runs/mutants.xml
    python tests/mutants.py [FILE ...]

Every binary operator, comparison and ``and`` or ``or`` of the package is replaced, one at a time, in a copy of the
project, and the tests that run its line, which the first command finds out, are run, the quickest first, until one
fails or the budget is used up. Before that, all of them must pass on the package as it is.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Iterator
from typing import NamedTuple

import coverage
import tqdm

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "optax_sam"
COPIED = ("optax_sam", "tests", "benchmarks", "examples", "README.md", "CHANGELOG.md", "pyproject.toml")
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
# Mutants that no test can notice: file, what the expression is then, and why it makes no difference.
ANOTHER_HASH = "another hash of the same quality"
BOUND = "at the bound itself both passes are exact"
EQUIVALENT = {
    ("_norms.py", "square >= 2.0 ** (-60)"): BOUND,
    ("_norms.py", "square <= 2.0 ** 126"): BOUND,
    ("_norms.py", "square <= 1"): "a sum of 1 needs no scale",
    ("_rounding.py", "place * jnp.uint32(size) - jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)"): ANOTHER_HASH,
    (
        "_rounding.py",
        "(bits ^ jax.lax.bitcast_convert_type(y, jnp.uint32)) - place * jnp.uint32(668265263)",
    ): ANOTHER_HASH,
    ("sharpness/lanczos.py", "remainder < 10 * eps * np.max(np.abs(matrix))"): "zeros for zeros in both",
    ("sharpness/landscape.py", "positions - d"): "second differences are symmetric",
}


class Mutant(NamedTuple):
    """One replaced operator: where it is, what the expression is then, and the source of the whole file."""

    file: str
    line: int
    end: int
    text: str
    source: str

    def digest(self) -> str:
        """Tells whether the same file was mutated in the same way before."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]


def mutants_of(file: str) -> Iterator[Mutant]:
    """All mutants of a file, formatted by ``ast.unparse`` like the rest of it."""
    original = (PACKAGE / file).read_text()
    count = sum(1 for _ in _operators(ast.parse(original)))
    for index in range(count):
        tree = ast.parse(original)
        node, name, position = list(_operators(tree))[index]
        if position is None:
            setattr(node, name, OTHERS[type(getattr(node, name))]())
        else:
            operators = getattr(node, name)
            operators[position] = OTHERS[type(operators[position])]()
        yield Mutant(file, node.lineno, node.end_lineno, ast.unparse(node), ast.unparse(tree))


def _operators(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Where the operators are: a node, the name of its field and, in a list, the position."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in OTHERS:
            yield node, "op", None
        elif isinstance(node, ast.Compare):
            for position in range(len(node.ops)):
                yield node, "ops", position


class Coverage:
    """The tests that run a line of the package, the quickest first."""

    def __init__(self, contexts: pathlib.Path, times: pathlib.Path):
        self._data = coverage.CoverageData(contexts)
        self._data.read()
        cases = xml.etree.ElementTree.parse(times).iter("testcase")
        self._seconds = {(case.get("classname"), case.get("name")): float(case.get("time", 0)) for case in cases}

    def tests_of(self, file: str, lines: range, budget: float) -> list[str]:
        """The tests, up to a budget of seconds (and the quickest in any case)."""
        contexts = self._data.contexts_by_lineno(str(ROOT / "optax_sam" / file))
        found = {context for line in lines for context in contexts.get(line, [])}
        names = {context.removesuffix("|run") for context in found if context.endswith("|run")}
        seconds = {name: self._seconds_of(name) for name in names}
        chosen, total = [], 0.0
        for name in sorted(names, key=lambda name: (seconds[name], name)):
            total += seconds[name]
            if chosen and total > budget:
                break
            chosen.append(name)
        return chosen

    def _seconds_of(self, name: str) -> float:
        file, _, test = name.partition("::")
        return self._seconds.get((file.removesuffix(".py").replace("/", "."), test), 1.0)


def copy_of_project(folder: pathlib.Path) -> pathlib.Path:
    """A copy whose package is formatted by ``ast.unparse``, as mutants are."""
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for path in (folder / PACKAGE.name).rglob("*.py"):
        path.write_text(ast.unparse(ast.parse(path.read_text())))
    return folder


def run_tests(
    folder: pathlib.Path, tests: list[str], timeout: float, *options: str, output: int | None = subprocess.DEVNULL
) -> int:
    """The exit status of pytest, or that of a process that had to be killed."""
    arguments = folder / "tests.txt"
    arguments.write_text("\n".join(tests))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "heavy or not heavy"]
    command += [f"@{arguments}", *options]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output, process_group=0)
    try:
        return run.wait(timeout)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def survives(mutant: Mutant, folder: pathlib.Path, tests: list[str], timeout: float) -> bool:
    """Whether none of the tests fails in this copy of the project; a mutant that they cannot end on is noticed."""
    path = folder / PACKAGE.name / mutant.file
    original = path.read_text()
    path.write_text(mutant.source)
    try:
        return not tests or run_tests(folder, tests, timeout) == 0
    finally:
        path.write_text(original)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="of optax_sam; default: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests for each mutant")
    parser.add_argument("--log", type=pathlib.Path, default=ROOT / "runs/mutants.jsonl", help="read and continued")
    options = parser.parse_args()
    files = options.files or sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
    mutants = [mutant for file in files for mutant in mutants_of(file)]
    names = [(mutant.file, mutant.text) for mutant in mutants]
    if ambiguous := [name for name in EQUIVALENT if names.count(name) > 1]:
        raise SystemExit(f"More than one mutant is called {ambiguous}.")
    seen = Coverage(ROOT / "runs/mutants.coverage", ROOT / "runs/mutants.xml")
    done = {}
    if options.log.exists():
        lines = map(json.loads, options.log.read_text().splitlines())
        done = {line["digest"]: line["survives"] for line in lines}
    # A survivor is tried again, with other tests or a larger budget; what was noticed once stays so.
    rest = [mutant for mutant in mutants if done.get(mutant.digest(), True)]
    chosen = {m.digest(): seen.tests_of(m.file, range(m.line, m.end + 1), options.budget) for m in rest}
    with tempfile.TemporaryDirectory() as work:
        folders = queue.SimpleQueue()
        for number in range(options.workers):
            folder = pathlib.Path(work, str(number))
            folder.mkdir()
            folders.put(copy_of_project(folder))
        everything = sorted({name for names in chosen.values() for name in names})
        if everything and run_tests(folder, everything, 7200, "-n", str(options.workers), output=None):
            raise SystemExit("The tests fail on the package as it is.")

        def run(mutant: Mutant) -> None:
            folder, start = folders.get(), time.perf_counter()
            try:
                alive = survives(mutant, folder, chosen[mutant.digest()], timeout=60 + 10 * options.budget)
            finally:
                folders.put(folder)
            done[mutant.digest()] = alive
            line = mutant._asdict() | {
                "digest": mutant.digest(),
                "budget": options.budget,
                "tests": len(chosen[mutant.digest()]),
            }
            line |= {"survives": alive, "seconds": round(time.perf_counter() - start, 1)}
            del line["source"]
            with options.log.open("a") as log:
                log.write(json.dumps(line, ensure_ascii=False) + "\n")

        with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
            list(tqdm.tqdm(pool.map(run, rest), total=len(rest), unit="mutant"))
    alive = [mutant for mutant in mutants if done[mutant.digest()]]
    for mutant in alive:
        print(
            f"{mutant.file}:{mutant.line}: {mutant.text}: {EQUIVALENT.get((mutant.file, mutant.text), 'NOT NOTICED')}"
        )
    noticed, explained = len(mutants) - len(alive), sum((mutant.file, mutant.text) in EQUIVALENT for mutant in alive)
    print(f"The tests notice {noticed} of {len(mutants)} mutants; {explained} others make no difference.")


if __name__ == "__main__":
    main()
