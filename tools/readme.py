"""Write the part of README.md that comes from measurements: between "<!-- speed -->" and "<!-- /speed -->".

python tools/readme.py            # rewrite it
python tools/readme.py --check    # exit code 1 where it differs from bench/results/*.json, one for each machine
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
PART = re.compile(r"(<!-- speed -->\n).*?(<!-- /speed -->)", re.S)


def speed() -> str:
    """The text between the marks: one table of all machines, the fastest first, and how each was measured."""
    documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    documents.sort(key=lambda document: document["about"]["multiply_g_per_s"], reverse=True)
    machines = [{row["case"]: row for row in document["rows"]} for document in documents]
    abouts = [document["about"] for document in documents]
    names = [f"{about['cpu']} ({about['family']})" for about in abouts]
    lines = [
        f"| | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
        *(
            f"| {case} | {' | '.join(cell(rows.get(case)) for rows in machines)} |"
            for case in dict.fromkeys(case for rows in machines for case in rows)
        ),
        "",
        *map(machine, abouts),
    ]
    return "\n".join([*lines, ""])


def cell(row: dict | None) -> str:
    """What one machine's run of bench/compare.py found for a case."""
    if row is None:
        return ""
    spread = f"{row['lowest']:.2f} to {row['highest']:.2f}"
    return f"{row['minilora']:,.0f}; **{row['ratio']:.2f}** ({spread}); {100 * row['of_ceiling']:.0f}%"


def machine(about: dict) -> str:
    """How a machine was measured, and its ceilings."""
    return (
        f"- {about['cpu']}: {about['date']}, {about['threads']} threads, numba {about['numba']}, "
        f"llama.cpp {about['llama.cpp']}, medians of {about['pairs']} pairs; {about['read_gb_per_s']:.0f} GB/s and "
        f"{about['multiply_g_per_s']:,} G int8 multiply-adds/s as the last run ended"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail where README.md is stale")
    options = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    text = speed()
    if not PART.search(old):
        sys.exit("README.md has no <!-- speed --> ... <!-- /speed -->")
    new = PART.sub(lambda match: match[1] + text + match[2], old)
    if new == old:
        return
    if options.check:
        sys.exit("README.md does not show bench/results. Run: python tools/readme.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
