"""Writes the parts of README.md that come from measurements: between "<!-- speed -->" and "<!-- /speed -->".

python tools/readme.py            # rewrite
python tools/readme.py --check    # exit code 1 where README differs from bench/results/*.json, a machine each
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
PART = re.compile(r"(<!-- speed -->\n).*?(<!-- /speed -->)", re.S)


def tables() -> str:
    """The text between the marks: a table for each machine, the last one measured first."""
    documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    documents.sort(key=lambda document: document["about"]["date"], reverse=True)
    return "\n".join(table(document) for document in documents)


def table(document: dict) -> str:
    """What one machine's run of bench/compare.py found."""
    about, rows = document["about"], document["rows"]
    lines = [
        "| tokens/s | minilora | llama.cpp | ratio | of the ceiling |",
        "|---|---|---|---|---|",
        *(
            f"| {row['case']} | {row['minilora']:,.0f} | {row['llama.cpp']:,.0f} | "
            f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f}) | {100 * row['of_ceiling']:.0f}% |"
            for row in rows
        ),
        "",
        f"{about['date']}, {about['cpu']} ({about['family']}), {about['threads']} threads, numba {about['numba']}; llama.cpp",
        f"{about['llama.cpp']}, built for this CPU, with flash attention on or off, whichever is faster (on for int8 pages). Medians of {about['pairs']} pairs run in",
        "turn by `bench/compare.py`. The ceiling is the machine's own, measured beside each pair: "
        f"{about['read_gb_per_s']:.0f} GB/s read for decoding,",
        f"{about['multiply_g_per_s']:,} G int8 multiply-adds/s for prompts (attention's included), as the last run ended.",
    ]
    if any(row["of_ceiling"] > 1 for row in rows):
        lines.append("More than 100%: it drifted between the pairs and its own measurement.")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail where README is stale")
    options = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    text = tables()
    new = PART.sub(lambda match: match[1] + text + match[2], old)
    if new == old:
        return
    if options.check:
        sys.exit("README.md does not show bench/results. Run: python tools/readme.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
