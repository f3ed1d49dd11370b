"""The reproductions of the papers: every script at its smoke size, and the table of claims of their README."""

import importlib
import json
import pathlib

import pytest

from benchmarks.papers.__main__ import PAPERS, tables
from benchmarks.papers.reproduction import Reproduction, joint_verdict, paired_verdict, spread
from examples.training.report import finite, interval

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "benchmarks/papers/README.md"


@pytest.mark.parametrize("name", PAPERS)
def test_smoke(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    importlib.import_module(f"benchmarks.papers.{name}").main(["--smoke"])
    folder = tmp_path / "runs" / "papers" / f"{name}-smoke"
    record = json.loads((folder / f"{name}.json").read_text(), parse_constant=pytest.fail)
    assert record["command"] == f"python -m benchmarks.papers.{name} --smoke"
    assert len(record["claims"]) >= 3
    printed = capsys.readouterr().out
    for claim in record["claims"]:
        assert claim["verdict"] in ("holds", "does not hold", "undecided")
        assert claim["verdict"].upper() in printed
    assert (folder / f"{name}.png").stat().st_size > 10_000


def test_readme_shows_the_claims_as_they_were_measured():
    page = PAGE.read_text(encoding="utf-8")
    assert len(tables()) == len(PAPERS) + 1
    for paper, table in tables().items():
        assert table in page.partition(f"\n## {paper}\n")[2].partition("\n## ")[0]


def test_figures_of_the_readme_are_there():
    readme = PAGE.read_text(encoding="utf-8")
    for name in PAPERS:
        figure = ROOT / f"benchmarks/results/{name}.png"
        assert (f"](../results/{name}.png)" in readme) == figure.exists() == figure.with_suffix(".json").exists()


def test_verdicts_follow_the_interval_over_seeds():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4842, 2 + 2.4842), abs=1e-4)  # 4.3027 / √3
    assert paired_verdict([1.0, 1.1, 0.9]) == "holds"
    assert paired_verdict([-1.0, -1.1, -0.9]) == "does not hold"
    assert paired_verdict([1.0, 2.0, 3.0]) == "undecided"
    assert paired_verdict([1.0]) == "undecided"
    assert paired_verdict([1.0, float("nan"), 1.0]) == "undecided"
    assert joint_verdict(["holds", "holds"]) == "holds"
    assert joint_verdict(["undecided", "holds"]) == "undecided"
    assert joint_verdict(["holds", "undecided", "does not hold"]) == "does not hold"
    assert spread([1.0, 2.0, 3.0], digits=1, scale=10) == "20.0 ± 10.0"


def test_what_is_not_finite_is_none_in_json():
    tree = {"a": [1.0, float("nan"), {"b": (float("inf"), 2)}], "c": "text"}
    assert finite(tree) == {"a": [1.0, None, {"b": [None, 2]}], "c": "text"}


def test_parts_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []
    for arguments in ([], ["--resume"]):
        reproduction = Reproduction("name", None, arguments)
        assert reproduction.part("a", {"rho": (0.1,)}, lambda: calls.append(1) or {"x": 2}) == {"x": 2}
    assert calls == [1]
    with pytest.raises(ValueError, match=r"other settings \(rho \[0.1\] → \[0.2\]\)"):
        Reproduction("name", None, ["--resume"]).part("a", {"rho": (0.2,)}, dict)
    with pytest.raises(SystemExit, match="pass --resume"):
        Reproduction("name", None, [])
