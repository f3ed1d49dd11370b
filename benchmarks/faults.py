"""Where ``optax.contrib.sam`` breaks, and what ``optax_sam`` does there: both are run, side by side.

    python -m benchmarks.faults

Every check, in ``benchmarks/fault_checks.py``, compares with a closed form or with NumPy in float64. A fault that the
installed Optax does not have is said not to reproduce.
"""

import argparse
import itertools
import json
import pathlib
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optax_sam
from benchmarks import fault_checks as checks
from benchmarks import timing

WIDTHS = 2, 32, 42, 38
HEADER = "", "what is asked", "optax.contrib.sam", "optax_sam"
RESULTS = pathlib.Path(__file__).parent / "results"


class Fault(NamedTuple):
    """One line of the table.

    Attributes:
        number: its place in the table.
        asked: what a user wants.
        contrib: what ``optax.contrib.sam`` makes of it.
        ours: what ``optax_sam`` makes of it.
    """

    number: int
    asked: str
    contrib: Callable[[], checks.Outcome]
    ours: Callable[[], checks.Outcome]


FAULTS = [
    Fault(
        1,
        "a zero gradient is no step; an inf in one phase leaves the momentum of the other alone",
        lambda: checks.both(
            checks.zero_gradient(checks.opaque),
            checks.momentum_after_inf(checks.transparent(checks.RHO, optax.sgd(checks.RATE, momentum=0.9))),
        ),
        lambda: checks.both(checks.zero_gradient(checks.chained), checks.momentum_after_inf(checks.phases())),
    ),
    Fault(
        2,
        "ε has length ρ: for float16 gradients of 1e-5, and bfloat16 ones of 257 leaves and norm 720",
        lambda: checks.both(
            checks.perturbation_length(checks.opaque, checks.small_gradient()),
            checks.perturbation_length(checks.opaque, checks.many_leaves()),
        ),
        lambda: checks.both(
            checks.perturbation_length(checks.chained, checks.small_gradient()),
            checks.perturbation_length(checks.chained, checks.many_leaves()),
        ),
    ),
    Fault(
        3,
        "bfloat16 params move by ρ = 0.05 along g",
        lambda: checks.random_and_equal_params(checks.opaque),
        lambda: checks.random_and_equal_params(checks.chained),
    ),
    Fault(
        4,
        f"SAM of one batch, accumulated over {checks.MICRO_BATCHES} micro-batches",
        lambda: checks.noted(
            checks.accumulated("MultiSteps(sam)", checks.outside(checks.opaque)),
            checks.accumulated("sam(MultiSteps)", checks.inside(checks.opaque)),
        ),
        lambda: checks.noted(
            checks.estimated(), checks.accumulated("MultiSteps(chain(sam, …))", checks.outside(checks.chained))
        ),
    ),
    Fault(
        5,
        "with SAM off (sync_period=1; late), every step counts",
        lambda: checks.switched_off(checks.transparent(checks.RHO, optax.sgd(1.0), sync_period=1)),
        lambda: checks.switched_off(optax.chain(optax_sam.late(optax_sam.sam(checks.RHO), 4), optax.sgd(1.0))),
    ),
    Fault(
        6,
        "a schedule of ρ: 0.1, 0.2, 0.3",
        lambda: checks.noted(
            checks.scheduled("by default", checks.opaque(checks.schedule, optax.sgd(checks.RATE))),
            checks.scheduled(
                "reset_state=False", checks.opaque(checks.schedule, optax.sgd(checks.RATE), reset_state=False)
            ),
        ),
        lambda: checks.scheduled("by default", checks.chained(checks.schedule, optax.sgd(checks.RATE))),
    ),
    Fault(
        7,
        "params and state can be donated",
        lambda: checks.noted(
            checks.donated("transparent", checks.transparent, 4), checks.donated("opaque", checks.opaque, 2)
        ),
        lambda: checks.donated("two steps", checks.chained, 2),
    ),
    Fault(
        8,
        "bools and PRNG keys in the optimizer's state, in a loop",
        lambda: checks.both(
            checks.looped("bool", checks.transparent, checks.if_finite(), 4),
            checks.looped("key", checks.transparent, checks.noise(), 4),
        ),
        lambda: checks.both(
            checks.looped("bool", checks.chained, checks.if_finite(), 2),
            checks.looped("key", checks.chained, checks.noise(), 2),
        ),
    ),
    Fault(
        9,
        "reduce_on_plateau in the same chain",
        lambda: checks.both(checks.plateau("opaque", checks.opaque), checks.plateau("transparent", checks.transparent)),
        lambda: checks.plateau("four steps", checks.chained),
    ),
    Fault(
        10,
        "clipping to 1 and weight decay of 0.1 in the same chain act on the update",
        lambda: checks.noted(
            checks.clipped_and_decayed("in front", checks.in_front(checks.opaque)),
            checks.clipped_and_decayed("inside", checks.behind(checks.opaque)),
        ),
        lambda: checks.noted(
            checks.clipped_and_decayed("behind", checks.behind(checks.chained)),
            checks.clipped_and_decayed("in front", checks.in_front(checks.chained)),
        ),
    ),
    Fault(
        11,
        "only the first leaf moves, by ρ = 0.5 (the second has ‖g‖ = 2.24)",
        lambda: checks.only_first(optax.contrib.sam(optax.sgd(checks.RATE), checks.masked_ascent(), opaque_mode=True)),
        lambda: checks.only_first(optax.chain(optax_sam.sam(checks.RHO, mask=checks.FIRST), optax.sgd(checks.RATE))),
    ),
    Fault(
        12,
        "partition and masked around SAM: the right update, or an error that says where to put them",
        lambda: checks.noted(
            checks.grouped_both_ways(checks.opaque),
            checks.grouped("sam(partition)", lambda base: checks.opaque(checks.RHO, checks.partition(base))),
        ),
        lambda: checks.both(
            checks.grouped_both_ways(checks.chained),
            checks.grouped("behind", lambda base: checks.chained(checks.RHO, checks.partition(base))),
        ),
    ),
    Fault(
        13,
        "a grad_fn that returns a pair: the gradient out of it, or an error that says so",
        lambda: checks.tupled(checks.opaque),
        lambda: checks.tupled(checks.chained),
    ),
    Fault(
        14,
        "the caller never sees w + ε, and each optimizer runs once a step",
        lambda: checks.seen_params(checks.transparent_tallied, 4),
        lambda: checks.seen_params(checks.chained_tallied, 2),
    ),
    Fault(
        15,
        "a step is that of the formula, in float64",
        checks.one_step_of_contrib,
        lambda: checks.one_step(checks.chained),
    ),
]


def compare() -> list[dict[str, Any]]:
    """One row for each fault."""
    rows = []
    for fault in FAULTS:
        contrib, ours = fault.contrib(), fault.ours()
        row = {"number": fault.number, "asked": fault.asked}
        row |= {"contrib": ("does not reproduce: " if contrib.is_right else "") + contrib.text}
        row |= {"ours": ("WRONG: " if not ours.is_right else "") + ours.text}
        rows.append(row | {"contrib_is_right": contrib.is_right, "ours_is_right": ours.is_right})
    return rows


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    return str(row["number"]), row["asked"], row["contrib"], row["ours"]


def table(rows: list[dict[str, Any]]) -> str:
    """For a terminal of 120 columns."""
    lines = []
    for texts in (HEADER, *map(cells, rows)):
        columns = [textwrap.wrap(text, width) for text, width in zip(texts, WIDTHS, strict=True)]
        for parts in itertools.zip_longest(*columns, fillvalue=""):
            lines.append("  ".join(f"{part:<{width}}" for part, width in zip(parts, WIDTHS, strict=True)).rstrip())
        lines.append("")
    return "\n".join(lines)


def markdown(rows: list[dict[str, Any]]) -> str:
    """For ``benchmarks/README.md``."""
    lines = [HEADER, ["---"] * len(HEADER), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line).replace("<", "&lt;") + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the rows as benchmarks/README.md has them")
    as_markdown = parser.parse_args().markdown
    rows = compare()
    print(markdown(rows) if as_markdown else table(rows))
    if as_markdown:
        return
    results = {"command": "python -m benchmarks.faults", **timing.environment(), "rows": rows}
    (RESULTS / "faults.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
