"""What follows from the numbers of ``late_phase``: claims with their verdicts, and the figure."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.reproduction import HOLDS, UNDECIDED, Claim, joint_verdict, paired_verdict, spread, verdict
from examples.training import style
from examples.training.style import COLORS

LATE, EARLY, RESTARTED = COLORS["late_sam"], COLORS["asam"], COLORS["stable_sam"]
CLAIMED = ("late-0.9", "late-0.75", "restarted-0.75", "early-0.75")


def claims(results: dict[str, Any]) -> list[Claim]:
    """Of all experiments, in the order of the script."""
    return [
        *_claims_of_valley(results["valley"]),
        *_claims_of_escape(results["escape"]),
        *_claims_of_network(results["network"]["methods"]),
        *_claims_of_lines(results["network"]["lines"]),
        *_claims_of_adversarial(results["adversarial"]),
    ]


def _claims_of_valley(found: dict[str, Any]) -> list[Claim]:
    paths = {name: np.array(path) for name, path in found["paths"].items()}
    gd, late = paths["GD"], paths["late USAM"]
    limits, exact = found["limits"], found["exact_limits"]
    normalized = np.abs(paths["late SAM"][:, 1])
    return [
        Claim(
            "Toy valley, P1: SAM leaves exponentially fast a minimum where gradient descent is stable",
            f"GD stays at u = {gd[-1, 0]:.4f}, v = {gd[-1, 1]:.0e}; after the switch to USAM |v| grows by "
            f"{found['growth']:.6f} per step (exact: {found['exact_growth']:.6f}); largest stable u: GD "
            f"{limits['GD']:.4f} (exact {exact['GD']:.4f}), USAM {limits['USAM']:.4f} (exact {exact['USAM']:.4f})",
            verdict(
                abs(found["growth"] - found["exact_growth"]) < 1e-6 < found["growth"] - 1
                and all(abs(limits[name] - exact[name]) <= 1e-4 for name in limits)
            ),
        ),
        Claim(
            "Toy valley, P2 and P3: it stays in the valley and ends at a flatter minimum, below its limit of stability",
            f"USAM settles at u = {late[-1, 0]:.4f}, sharpness {late[-1, 0] ** 2:.3f} after {gd[-1, 0] ** 2:.3f}; "
            f"barrier of the loss between both: {found['barrier']:.1g} (both at v = 0); from "
            f"{found['ends']['starts']} minima between the limits it ends at |u| ≤ {found['ends']['largest']:.4f}, "
            f"loss ≤ {found['ends']['loss']:.1g}",
            verdict(
                found["barrier"] <= 1e-12 and max(found["ends"]["largest"], late[-1, 0]) < exact["USAM"] < gd[-1, 0]
            ),
        ),
        Claim(
            "Toy valley, P4: it converges fast to the flatter minimum",
            f"at the end USAM shrinks |v| by {found['decay']:.4f} per step (exact: {found['exact_decay']:.4f}), from "
            f"{np.abs(late[:, 1]).max():.2f} at its peak to {abs(late[-1, 1]):.0e} at step {len(late) - 1}; with "
            f"normalized SAM of the same rho |v| goes from {normalized.max():.2f} to {normalized[-1]:.0e}, at u = "
            f"{paths['late SAM'][-1, 0]:.2f}",
            verdict(abs(found["decay"] - found["exact_decay"]) < 1e-6 < 1 - found["decay"]),
        ),
    ]


def _claims_of_escape(found: dict[str, Any]) -> list[Claim]:
    sam, sgd, usam = (found[name] for name in ("sam", "sgd", "usam"))
    seeds = f"{len(sam['rate'])} seeds"
    logs = {name: np.log([sam[name], sgd[name]]) for name in ("at_switch", "end", "eigenvalue")}
    factors = {name: spread(np.exp(found[name]["rate"]).tolist(), 3) for name in found}
    fits = {name: np.array(sam[f"{name}_fit"]) for name in ("exponential", "linear")}
    return [
        Claim(
            "Digits, P1: after the switch from SGD to SAM the training loss rises first",
            f"{seeds}: factor per step in the {sam['fitted_steps']} steps after the switch {factors['sam']} with "
            f"normalized SAM, {factors['sgd']} with SGD going on, {factors['usam']} with unnormalized SAM of that rho; "
            f"median loss {np.median(sam['at_switch']):.1e} at the switch, {np.median(sam['peak']):.1e} at the peak",
            joint_verdict(
                [paired_verdict(sam["rate"]), paired_verdict(np.subtract(sam["rate"], sgd["rate"]).tolist())]
            ),
        ),
        Claim(
            f"Digits, P1: for {sam['fitted_steps']} steps this rise is nearer to exponential than to linear",
            f"{seeds}, the same steps: R² of a straight line {spread(fits['exponential'].tolist())} for the log of the "
            f"loss, {spread(fits['linear'].tolist())} for the loss",
            paired_verdict((fits["exponential"] - fits["linear"]).tolist()),
        ),
        Claim(
            "Digits, P4: the training loss soon falls again, below that at the switch",
            f"{seeds}: median loss at the end {np.median(sam['end']):.1e}, {np.median(sam['at_switch']):.1e} at the "
            f"switch, SGD going on {np.median(sgd['end']):.1e}",
            paired_verdict((logs["at_switch"][0] - logs["end"][0]).tolist()),
        ),
        Claim(
            "Digits, P3: SAM ends at a flatter minimum than SGD going on",
            f"{seeds}: median of the largest Hessian eigenvalue {np.median(sam['eigenvalue']):.3g}, SGD "
            f"{np.median(sgd['eigenvalue']):.3g}, unnormalized SAM {np.median(usam['eigenvalue']):.3g}",
            paired_verdict((logs["eigenvalue"][1] - logs["eigenvalue"][0]).tolist()),
        ),
    ]


def _values(methods: dict[str, Any], quantity: str) -> dict[str, np.ndarray]:
    """(seeds,) for each method: accuracies as they are, eigenvalues in logarithms."""
    values = {name: np.array([seed[quantity] for seed in method["seeds"]]) for name, method in methods.items()}
    return {name: np.log(value) for name, value in values.items()} if quantity == "eigenvalue" else values


def _nearer(value: np.ndarray, to: np.ndarray, than: np.ndarray) -> str:
    """Whether a value is nearer to one than to another, by seeds."""
    return paired_verdict((np.abs(value - than) - np.abs(value - to)).tolist())


def _shown(value: np.ndarray, quantity: str) -> str:
    return f"{spread(value.tolist(), scale=100)} %" if quantity == "test_accuracy" else spread(np.exp(value).tolist())


def _claims_of_network(methods: dict[str, Any]) -> list[Claim]:
    return [
        *_claims_of_quantity(methods, "test_accuracy", "test accuracy", "higher"),
        *_claims_of_quantity(methods, "eigenvalue", "largest Hessian eigenvalue", "smaller"),
        Claim(
            "A switch at step t of T costs 1 + (T − t)/T gradients a step",
            "executed: " + ", ".join(f"{name} {method['gradients']:.3f}" for name, method in methods.items()),
            verdict(all(abs(m["gradients"] - m["formula"]) <= 1 / m["steps"] for m in methods.values())),
        ),
    ]


def _claims_of_quantity(methods: dict[str, Any], quantity: str, words: str, better: str) -> list[Claim]:
    values = _values(methods, quantity)
    sgd, sam = values["sgd"], values["sam"]
    shown = {name: _shown(value, quantity) for name, value in values.items()}
    ends = f"{len(sgd)} seeds: SGD {shown['sgd']}, SAM {shown['sam']}"
    sign = 1 if better == "higher" else -1
    differ = paired_verdict((sign * (sam - sgd)).tolist())
    found = [Claim(f"CIFAR-10 subset: {words} {better} with SAM all along than with SGD", ends, differ)]
    for name in [name for name in CLAIMED if name in values]:
        kind, fraction = name.split("-")
        if kind == "early":
            claim = f"SAM, from {fraction} T on SGD: {words} not kept, nearer to SGD's than to SAM's"
            decision = _nearer(values[name], to=sgd, than=sam)
        else:
            momentum = "carried across" if kind == "late" else "restarted at"
            late = f"SGD, from {fraction} T on SAM, momentum {momentum} the switch: {words}"
            gain = paired_verdict((sign * (values[name] - sgd)).tolist())
            found.append(Claim(f"{late} {better} than SGD's", f"{ends}, this {shown[name]}", gain))
            claim = f"{late} nearer to SAM's than to SGD's"
            decision = _nearer(values[name], to=sam, than=sgd)
        if differ != HOLDS:
            decision = UNDECIDED
        found.append(Claim(claim, f"{ends}, this {shown[name]}", decision))
    return found


def _claims_of_lines(lines: list[dict[str, Any]]) -> list[Claim]:
    positions = np.array(lines[0]["positions"])
    losses, curvatures = (np.array([line[name] for line in lines]) for name in ("losses", "second_differences"))
    inside, (first, last) = (positions > 0.01) & (positions < 0.99), (np.argmin(np.abs(positions - x)) for x in (0, 1))
    ends = np.maximum(losses[:, first], losses[:, last])
    between = (positions > -0.01) & (positions < 1.01)
    slopes = np.polyfit(positions[between], curvatures[:, between].T, 1)[0]
    return [
        Claim(
            "Between the ends of late SAM and of SGD there is no barrier of the training loss (P2)",
            f"{len(lines)} seeds: largest loss strictly between {spread(losses[:, inside].max(axis=1).tolist(), 4)}, "
            f"larger one of the ends {spread(ends.tolist(), 4)}",
            paired_verdict((ends - losses[:, inside].max(axis=1)).tolist()),
        ),
        Claim(
            "On that line the second difference of the loss grows towards the end of SGD (P3)",
            f"{len(lines)} seeds: slope {spread(slopes.tolist(), 3)}; late SAM "
            f"{spread(curvatures[:, first].tolist(), 3)}, SGD {spread(curvatures[:, last].tolist(), 3)}",
            paired_verdict(slopes.tolist()),
        ),
    ]


def _claims_of_adversarial(found: dict[str, Any]) -> list[Claim]:
    claims = []
    for epochs, methods in found.items():
        robust, clean = (_values(methods, quantity) for quantity in ("robust_accuracy", "test_accuracy"))
        shown = [
            f"{name} {spread(robust[name].tolist(), 1, 100)} % ({spread(clean[name].tolist(), 1, 100)} % not attacked)"
            for name in methods
        ]
        claims.append(
            Claim(
                f"Digits, {epochs} epochs: adversarial training of the last quarter gives a robust accuracy nearer to "
                "that of adversarial training all along than to that of plain training",
                f"{len(robust['plain'])} seeds: {', '.join(shown)}",
                _nearer(robust["late-adversarial"], to=robust["adversarial"], than=robust["plain"]),
            )
        )
    return claims


def draw(results: dict[str, Any]) -> Figure:
    """What the step of the switch decides, large, and a panel for each of the smaller experiments."""
    layout = "AAABBB\nCCDDEE\nFFGGHH"
    heights = (1.3, 1, 1)
    figure, axes = plt.subplot_mosaic(layout, figsize=(11, 11), layout="constrained", height_ratios=heights)
    _draw_switches(axes["A"], results["network"]["methods"], "test_accuracy")
    _draw_switches(axes["B"], results["network"]["methods"], "eigenvalue")
    _draw_valley(axes["C"], axes["D"], results["valley"])
    _draw_escape(axes["E"], results["escape"])
    _draw_adversarial(axes["F"], results["adversarial"])
    _draw_lines(axes["G"], axes["H"], results["network"]["lines"])
    style.tidy(*axes.values())
    return figure


def _draw_valley(across: Axes, along: Axes, found: dict[str, Any]) -> None:
    switch = found["switch"]
    styles = {"GD": COLORS["sgd"], "late USAM": LATE, "late SAM": COLORS["sam"]}
    for name, color in styles.items():
        path = np.array(found["paths"][name])
        label = name if name == "GD" else f"{name.removeprefix('late ')} from step {switch} on"
        across.semilogy(np.abs(path[:, 1]), color=color, label=label)
        along.plot(path[:, 0], color=color)
    late = np.abs(np.array(found["paths"]["late USAM"])[switch, 1])
    steps = np.arange(26)
    across.semilogy(switch + steps, late * found["exact_growth"] ** steps, "k--", linewidth=0.9, label="exact growth")
    along.axhline(found["exact_limits"]["USAM"], color="0.6", linewidth=0.9)
    along.annotate(
        "USAM's limit of stability", (60, found["exact_limits"]["USAM"]), fontsize=8, ha="right", va="bottom"
    )
    across.set(title="Valley ½u²v²: across, |v|", xlabel="step", ylim=(1e-18, 1e9))
    along.set(title="along, u", xlabel="step", ylim=(0, 2.5))
    across.legend(fontsize=8, loc="upper right")


def _draw_escape(axis: Axes, found: dict[str, Any]) -> None:
    labels = {"sgd": "SGD goes on", "usam": "unnormalized SAM", "sam": "SAM"}
    for name, label in labels.items():
        curves, steps = found[name]["curves"], found[name]["steps"]
        color = COLORS[name]
        axis.semilogy(steps, curves["mean"], color=color, label=label, linestyle="--" if name == "usam" else "-")
        axis.fill_between(steps, curves["low"], curves["high"], color=color, alpha=0.15, linewidth=0)
    axis.axvline(0, color="k", linewidth=0.8)
    number = len(found["sam"]["rate"])
    axis.set(title=f"Digits, {number} seeds, 5 to 95 %", xlabel="steps after the switch", ylabel="training loss")
    axis.legend(fontsize=8)


def _draw_adversarial(axis: Axes, found: dict[str, Any]) -> None:
    colors = {"plain": COLORS["sgd"], "late-adversarial": LATE, "adversarial": COLORS["msam"]}
    for shift, (name, color) in enumerate(colors.items()):
        for quantity, line in (("robust_accuracy", "-"), ("test_accuracy", ":")):
            values = 100 * np.stack([_values(methods, quantity)[name] for methods in found.values()])
            x = np.arange(len(found)) + 0.03 * (shift - 1)
            style = {"fmt": f"o{line}", "color": color, "capsize": 3, "label": name if line == "-" else None}
            axis.errorbar(x, values.mean(axis=1), _deviation(values), **style)
    axis.set_xticks(range(len(found)), list(found))
    axis.set(title="Digits: training on attacked images", xlabel="epochs of a run", ylim=(0, 105))
    axis.set_ylabel("test accuracy (%), attacked; dotted: not", fontsize=8.5)
    axis.legend(fontsize=8)


def _deviation(values: np.ndarray) -> np.ndarray | None:
    """Over seeds, the last axis."""
    return np.std(values, axis=1, ddof=1) if values.shape[1] > 1 else None


def _draw_switches(axis: Axes, methods: dict[str, Any], quantity: str) -> None:
    is_accuracy = quantity == "test_accuracy"
    values = {name: np.array([seed[quantity] for seed in method["seeds"]]) for name, method in methods.items()}
    if is_accuracy:
        values = {name: 100 * value for name, value in values.items()}
    at = {kind: {0.0: values["sam"], 1.0: values["sgd"]} for kind in ("late", "restarted")}
    at["early"] = {0.0: values["sgd"], 1.0: values["sam"]}
    for name, value in values.items():
        kind, _, fraction = name.partition("-")
        if fraction:
            at[kind][float(fraction)] = value
    styles = {"late": ("SGD, then SAM", LATE), "early": ("SAM, then SGD", EARLY)}
    styles["restarted"] = ("SGD, then SAM, momentum restarted", RESTARTED)
    for shift, (kind, (label, color)) in enumerate(styles.items()):
        fractions = np.array(sorted(at[kind]))
        points = np.stack([at[kind][fraction] for fraction in fractions.tolist()])
        x = fractions + 0.012 * (shift - 1)
        axis.errorbar(x, points.mean(axis=1), _deviation(points), color=color, marker="o", capsize=3, label=label)
    number = f"{len(values['sgd'])} seeds, mean ± sd"
    axis.set(title=f"CIFAR-10 subset, {number}", xlabel="step of the switch / T")
    axis.set_ylabel("test accuracy (%)" if is_accuracy else "largest Hessian eigenvalue")
    axis.margins(y=0.4)
    axis.legend(fontsize=8, loc="upper center")


def _draw_lines(losses: Axes, curvatures: Axes, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        losses.plot(line["positions"], line["losses"], color=COLORS["sgd"], marker=".")
        curvatures.plot(line["positions"], line["second_differences"], color=COLORS["sgd"], marker=".")
    for axis in (losses, curvatures):
        axis.set_xticks([0, 0.5, 1], ["late SAM", "½", "SGD"])
    losses.set(title=f"Training loss between them, {len(lines)} seeds")
    curvatures.set(title="its second difference", ylim=(0, None))
