"""What the reproductions share: options, parts that are computed once, claims with their verdicts, results on disk."""

import argparse
import json
import os
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from benchmarks import timing
from examples.training import checkpoints
from examples.training.report import finite, interval

matplotlib.use("Agg")

RESULTS = pathlib.Path(__file__).parents[1] / "results"
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
WIDTH = 100


class Claim(NamedTuple):
    """What a paper says, what we measured, and what follows; which paper, where a record is of several."""

    claim: str
    measured: str
    verdict: str
    paper: str = ""


def verdict(holds: bool) -> str:
    """Of what has no spread."""
    return HOLDS if holds else FAILS


def paired_verdict(differences: npt.ArrayLike) -> str:
    """Of a claim that differences are positive: the 95 % t-interval of their mean over seeds decides."""
    low, high = interval(differences)
    return HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED


def joint_verdict(verdicts: Sequence[str]) -> str:
    """Of a claim that says several things: one that fails decides, and so does nothing short of all that hold."""
    return FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS


def spread(values: npt.ArrayLike, digits: int = 2, scale: float = 1.0) -> str:
    """Mean ± standard deviation over seeds."""
    values = scale * np.asarray(values)
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def rounded(values: np.ndarray, digits: int = 5) -> list[Any]:
    """To so many digits, for JSON."""
    return np.array([float(f"{x:.{digits}g}") for x in values.ravel()]).reshape(values.shape).tolist()


def write_record(path: pathlib.Path, record: dict[str, Any]) -> None:
    """As JSON; what is not finite becomes null."""
    text = json.dumps(finite(record), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


class Reproduction:
    """The reproduction of one paper: its options, the folder where a run that is stopped goes on, its results.

    Attributes:
        smoke: whether everything is to be as small as can be.
        data_dir: where the files of the data sets are.
        folder: for checkpoints and finished parts.
    """

    def __init__(self, name: str, description: str | None, arguments: Sequence[str] | None) -> None:
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.papers.{name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "--smoke", action="store_true", help="everything as small as can be, on scikit-learn's digits"
        )
        parser.add_argument(
            "--data-dir",
            type=pathlib.Path,
            default=pathlib.Path("data"),
            help="where the files of the data sets are or go",
        )
        parser.add_argument("--resume", action="store_true", help="go on with the run that was stopped")
        settings = parser.parse_args(arguments)
        self.name, self.smoke, self.data_dir = name, settings.smoke, settings.data_dir
        self.folder = pathlib.Path("runs", "papers", f"{name}-smoke" if settings.smoke else name)
        if settings.smoke:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.folder.exists() and not settings.resume:
            sys.exit(f"{self.folder} holds a run of this script: pass --resume to go on with it, or delete the folder")
        self.folder.mkdir(parents=True, exist_ok=True)

    def few(self, values: Sequence[Any]) -> list[Any]:
        """All the values; in the smoke run the first and the last."""
        return [values[0], values[-1]] if self.smoke else list(values)

    def part(self, name: str, settings: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns, a tree for JSON; from the file of an earlier run if there is one.

        Raises:
            ValueError: the earlier run had other settings, versions or hardware.
        """
        folder = self.folder / name
        checkpoints.claim(folder, {**settings, **timing.environment()})
        path = folder / "result.json"
        if not path.exists():
            result = compute()
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(result), encoding="utf-8")
            partial.rename(path)
        return json.loads(path.read_text(encoding="utf-8"))

    def finish(self, results: dict[str, Any], claims: Sequence[Claim], figure: Figure) -> None:
        """Writes NAME.json and NAME.png, and prints the claims."""
        folder = self.folder if self.smoke else RESULTS
        command = f"python -m benchmarks.papers.{self.name}" + (" --smoke" if self.smoke else "")
        record = {
            "command": command,
            **timing.environment(),
            "claims": [claim._asdict() for claim in claims],
            **results,
        }
        write_record(folder / f"{self.name}.json", record)
        figure.savefig(folder / f"{self.name}.png", dpi=130)
        for claim in claims:
            print(f"\n{claim.verdict.upper()}")
            for label, text in (("claim", claim.claim), ("measured", claim.measured)):
                print(textwrap.fill(text, WIDTH, initial_indent=f"  {label:<10}", subsequent_indent=" " * 12))
        shown = os.path.relpath(folder)
        print(f"\nWrote {shown}/{self.name}.json and {shown}/{self.name}.png.")
