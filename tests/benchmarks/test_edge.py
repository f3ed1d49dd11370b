"""The run at the edge of stability: the program at a smoke size, and what the page says of the long one."""

import json
import pathlib

import numpy as np
import pytest

import optax_sam
from benchmarks import edge

ROOT = pathlib.Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks/results/edge.json").read_text(encoding="utf-8"))


@pytest.mark.heavy
def test_smoke(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(edge, "STEPS", 40)
    monkeypatch.setattr(edge, "CHECKED", 20)
    monkeypatch.setattr(edge, "RESULTS", tmp_path)
    links = {"gradient descent": edge.LINKS["gradient descent"], "late SAM": optax_sam.late(optax_sam.sam(0.1), 20)}
    monkeypatch.setattr(edge, "LINKS", links | {"SAM": edge.LINKS["SAM"]})
    edge.main()
    runs = json.loads((tmp_path / "edge.json").read_text(), parse_constant=pytest.fail)["runs"]
    first, last = runs["gradient descent"], runs["late SAM"]
    assert first["step"] == [0, 20, 40]
    assert first["loss"][:2] == last["loss"][:2]
    assert first["loss"][2] != last["loss"][2]
    np.testing.assert_allclose(first["eigenvalue"], first["lanczos"], rtol=0.05)
    assert (tmp_path / "edge.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("tracked within") == 3


def test_the_page_says_what_was_measured():
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for name, run in RECORD["runs"].items():
        median, low, high = edge.of_edge(name, run)
        assert f"{median:.2f}" in page
        assert f"{low:.2f} to {high:.2f}" in page
    assert max(edge.tracking_error(run) for run in RECORD["runs"].values()) < 0.007


def test_sam_comes_down_to_its_edge_and_gradient_descent_does_not():
    eigenvalues = {name: run["eigenvalue"][-1] for name, run in RECORD["runs"].items()}
    assert eigenvalues["SAM"] < eigenvalues["late SAM"] < 0.3 * eigenvalues["gradient descent"]
