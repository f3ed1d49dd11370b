"""The claims of papers with what we measured, as the README of this folder shows them: in scripts of their own first.

python -m benchmarks.papers
"""

import json

from benchmarks.papers.reproduction import RESULTS

STUDY = "where_sam_pays"
PAPERS = {
    "stability": "Kim et al. 2023",
    "understanding": "Andriushchenko and Flammarion 2022",
    "msam": "Behdin et al. 2023",
    "stablesam": "Tan et al. 2024",
    "late_phase": "Zhou et al. 2025",
}


OTHERS = "Other papers"


def tables() -> dict[str, str]:
    """The claims of the results that are there, a table for each paper that has a script, and one for all others."""
    rows: dict[str, list[str]] = {paper: [] for paper in (*PAPERS.values(), OTHERS)}
    for name in [*PAPERS, STUDY]:
        path = RESULTS / f"{name}.json"
        if path.exists():
            for claim in json.loads(path.read_text(encoding="utf-8"))["claims"]:
                paper = claim.get("paper") or PAPERS[name]
                columns = claim["claim"], claim["measured"], f"**{claim['verdict']}**"
                if paper not in PAPERS.values():
                    paper, columns = OTHERS, (paper, *columns)
                rows[paper].append("| " + " | ".join(column.replace("|", "\\|") for column in columns) + " |")
    heads = dict.fromkeys(rows, "| claim | what we measured | verdict |\n|---|---|---|")
    heads[OTHERS] = "| paper | claim | what we measured | verdict |\n|---|---|---|---|"
    return {paper: "\n".join([heads[paper], *found]) for paper, found in rows.items() if found}


if __name__ == "__main__":
    print("\n\n".join(f"## {paper}\n\n{table}" for paper, table in tables().items()))
