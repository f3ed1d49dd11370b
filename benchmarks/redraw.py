"""Pictures again, from the numbers of the runs: after a change of style nothing has to be run.

    python -m benchmarks.redraw           # all
    python -m benchmarks.redraw msam edge

The others show more than is kept: their own commands draw them.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks import communication, edge, overhead, step_cost
from benchmarks.papers import late_phase_report, msam, stablesam
from benchmarks.papers.reproduction import RESULTS
from benchmarks.where_sam_pays import report

FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "communication": lambda record: communication.draw(record["counted"], record["measured"]),
    "edge": lambda record: edge.draw(record["runs"]),
    "late_phase": late_phase_report.draw,
    "msam": lambda record: msam.figure(record, record["times"]),
    "outer_products": lambda record: step_cost.draw(record["tables"]),
    "overhead": lambda record: overhead.draw(record["seconds_by_params"]),
    "stablesam": lambda record: stablesam.figure(record["quadratic"], record["network"]),
    "step_cost": lambda record: step_cost.draw(record["tables"]),
    "where_sam_pays": report.draw,
}
RECORDS = {"where_sam_pays": "where_sam_pays_look_alike"}  # the others have the name of their picture


def figure_of(name: str) -> Figure:
    """The picture of that name."""
    path = RESULTS / f"{RECORDS.get(name, name)}.json"
    return FIGURES[name](json.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    for name in sys.argv[1:] or FIGURES:
        figure = figure_of(name)
        figure.savefig(RESULTS / f"{name}.png", dpi=130)
        plt.close(figure)


if __name__ == "__main__":
    main()
