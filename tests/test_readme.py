"""The README files: links and pictures lead somewhere, figures stand where they belong, and the first one stays short.

Their snippets are run by pytest as doctests.
"""

import json
import pathlib
import re
from collections import Counter

import pytest

from benchmarks.papers.__main__ import PAPERS, tables

ROOT = pathlib.Path(__file__).parents[1]
README, MEASURED, CLAIMS = ROOT / "README.md", ROOT / "benchmarks/README.md", ROOT / "benchmarks/papers/README.md"
FOLDERS = "benchmarks", "examples", "optax_sam", "tests"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted(page for name in FOLDERS for page in (ROOT / name).rglob("README.md"))]
LINK = re.compile(r'(?:\]\(|^\[[^\]]+\]: *|\b(?:src|href)=")([^)\s"]+)', re.MULTILINE)
PICTURE = re.compile(r'(?:!\[[^\[\]]*\]\(|<img [^>]*src=")([^)\s"]+)')
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:")


def prose(page: pathlib.Path) -> str:
    """Its text without blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def targets(page: pathlib.Path, kind: re.Pattern[str] = LINK) -> list[str]:
    """Where its links, or its pictures alone, point to in this project."""
    found = kind.findall(re.sub(r"`[^`\n]*`", "code", prose(page)))
    return [target for target in found if not ELSEWHERE.match(target)]


def anchors(page: pathlib.Path) -> set[str]:
    """Of the headings, by GitHub's rule: lower case, no punctuation, hyphens for spaces, and a number if it repeats."""
    found, seen = set(), Counter()
    for heading in re.findall(r"^#{1,6} +(.*?)[ #]*$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(page: pathlib.Path) -> list[str]:
    """Its targets without a file, or without such a heading in it."""
    found = []
    for target in targets(page):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and (path.suffix != ".md" or anchor not in anchors(path))):
            found.append(target)
    return found


def pages_that_show(figure: pathlib.Path) -> list[pathlib.Path]:
    return [
        page
        for page in PAGES
        for target in targets(page, PICTURE)
        if (page.parent / target).resolve() == figure.resolve()
    ]


def rows_under(page: pathlib.Path, heading: str) -> list[str]:
    """The rows of the first table of a section, without its numbers of notes."""
    section = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    return re.sub(r" \(\d\) \|", " |", re.search(r"(^\|.*\n)+", section, re.MULTILINE)[0]).splitlines()


def test_all_pages_are_known():
    assert {README, MEASURED, CLAIMS, ROOT / "examples/README.md", ROOT / "CHANGELOG.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "README.md"
    (tmp_path / "there.png").touch()
    (tmp_path / "other.md").write_text("# Where `a.b` breaks, and why\n## Twice\n## Twice\n```sh\n# a comment\n```\n")
    right = ["there.png", "other.md", "other.md#where-ab-breaks-and-why", "other.md#twice-1", "#is-it-on", "../"]
    wrong = ["gone.png", "gone.md#twice", "other.md#twice-2", "other.md#a-comment", "other.md#Twice", "#gone"]
    forms = "![a picture]({})", 'and [`a` link]({} "title"), at', "[1]: {}", '<img width="9" src="{}">'
    for form in forms:
        lines = ["# Is it on?", "[not here](https://example.org/gone)", "`[code](gone.py)`"]
        lines += ["```", "[code](gone.py)", "```", *map(form.format, [*right, *wrong, "there.png#a"])]
        page.write_text("\n".join(lines))
        assert broken(page) == [*wrong, "there.png#a"]
        assert targets(page, PICTURE) == ([*right, *wrong, "there.png#a"] if form[:2] in ("![", "<i") else [])
    page.write_text("[![nested](there.png)](gone.md)")
    assert targets(page) == ["there.png", "gone.md"]
    assert targets(page, PICTURE) == ["there.png"]
    assert broken(page) == ["gone.md"]


def test_every_figure_is_shown_where_it_belongs():
    figures = sorted((ROOT / "benchmarks/results").glob("*.png"))
    assert figures
    for figure in figures:
        pages = [page for page in pages_that_show(figure) if page != README]
        assert pages == [CLAIMS if figure.stem in PAPERS else MEASURED], figure.name


def test_the_first_page_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180


@pytest.mark.parametrize(("heading", "page"), [("Devices", ROOT / "examples/README.md"), ("Cost", MEASURED)])
def test_rows_of_the_first_page_are_those_of_the_whole_table(heading, page):
    some, whole = rows_under(README, heading), rows_under(page, heading)
    assert some[:2] == whole[:2]
    assert 5 <= len(some[2:]) < len(whole[2:])
    assert set(some) <= set(whole)


def test_the_first_page_counts_claims_and_faults():
    text = " ".join(README.read_text(encoding="utf-8").split())
    rows = [row for table in tables().values() for row in table.splitlines()[2:]]
    verdicts = Counter(row.split("**")[-2] for row in rows)
    counts = "{holds} hold, {does not hold} do not hold, and {undecided} are undecided".format_map(verdicts)
    assert f"of {verdicts.total()} that we tried {counts}" in text
    faults = json.loads((ROOT / "benchmarks/results/faults.json").read_text(encoding="utf-8"))
    rows, release = faults["rows"], faults["versions"]["optax"]
    right = sum(row["contrib_is_right"] for row in rows)
    assert all(row["ours_is_right"] for row in rows)
    assert (
        f"Of [{len(rows)} things](benchmarks/README.md#where-optaxcontribsam-breaks) that users asked of SAM in JAX"
        in text
    )
    assert f"`optax.contrib.sam` (Optax {release}) does {right} as asked, this library all {len(rows)}" in text
