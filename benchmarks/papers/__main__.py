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


def table() -> str:
    """One row for each claim of the results that are there."""
    rows = ["| paper | claim | what we measured | verdict |", "|---|---|---|---|"]
    for name in [*PAPERS, STUDY]:
        path = RESULTS / f"{name}.json"
        if path.exists():
            for claim in json.loads(path.read_text(encoding="utf-8"))["claims"]:
                paper = claim.get("paper") or PAPERS[name]
                columns = (paper, claim["claim"], claim["measured"], f"**{claim['verdict']}**")
                rows.append("| " + " | ".join(column.replace("|", "\\|") for column in columns) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
