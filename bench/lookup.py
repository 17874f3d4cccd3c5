"""Draft tokens by prompt lookup: tokens per second with and without them, in turn, for real prompts.

    python bench/lookup.py questions.jsonl [--model M] [--dtype float32] [--batch 1,8] [--temperature 0]
    python bench/lookup.py article.txt --ask "Sum up this text in three sentences:"

Prompts: from each line of a .jsonl file what is under "prompt", "question" or "turns" (a text, or the first of a list);
of any other file each line of at least 600 characters. The answers must be the same both ways. Tokens per second are
those of answers, over all the time, prefill included. Last line: one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import islice
from pathlib import Path

from workload import numbers

from minilora import LLM, SamplingParams

NAMES = ("prompt", "question", "turns")
LONG = 600


def prompts(path: Path):
    for line in path.read_text(encoding="utf-8").splitlines():
        if path.suffix != ".jsonl":
            if len(line) >= LONG:
                yield line.strip()
        elif line.strip():
            row = json.loads(line)
            text = next((row[name] for name in NAMES if name in row), None)
            if not text:
                sys.exit(f"{path}: a line has no text under {', '.join(NAMES)}")
            yield text if isinstance(text, str) else text[0]


def run(llm: LLM, texts: list[str], options: argparse.Namespace, batch: int) -> tuple[list[list[int]], float]:
    """(the answers' tokens, how many of them per second), `batch` prompts at once."""
    params = SamplingParams(temperature=options.temperature, seed=1, max_tokens=options.generate)
    answers, seconds = [], 0.0
    for i in range(0, len(texts), batch):
        chats = [[{"role": "user", "content": f"{options.ask}\n\n{text}".strip()}] for text in texts[i : i + batch]]
        started = time.perf_counter()
        found = llm.chat(chats, params)
        seconds += time.perf_counter() - started
        answers += [list(answer.outputs[0].token_ids) for answer in found]
    return answers, sum(map(len, answers)) / seconds


def compare(plain: LLM, drafting: LLM, texts: list[str], options: argparse.Namespace, batch: int) -> dict:
    """Both ways in turn, after one batch to warm up. Raises SystemExit where their answers differ."""
    for llm in (plain, drafting):
        run(llm, texts[:batch], options, batch)
    before, pairs = drafting.stats(), []
    for _ in range(options.pairs):
        (expected, one), (found, other) = (run(llm, texts, options, batch) for llm in (plain, drafting))
        if found != expected:
            sys.exit("draft tokens changed an answer")
        pairs.append((one, other))
    after = drafting.stats()
    return {
        "batch": batch,
        "plain": statistics.median(one for one, _ in pairs),
        "drafting": statistics.median(other for _, other in pairs),
        "ratios": sorted(other / one for one, other in pairs),
        "draft_tokens": after.draft_tokens - before.draft_tokens,
        "accepted_tokens": after.accepted_tokens - before.accepted_tokens,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="prompts, see above")
    parser.add_argument("--ask", default="", help="text that is put before each prompt")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=numbers, default=[1], help="prompts at once, e.g. 1,8")
    parser.add_argument("--prompts", type=int, default=8, help="how many of the file's")
    parser.add_argument("--generate", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--num-speculative-tokens", type=int, default=8)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    return parser.parse_args()


def main() -> None:
    options = parse()
    texts = list(islice(prompts(options.file), options.prompts))
    if not texts:
        sys.exit(f"{options.file} holds no prompt")
    common = {"dtype": options.dtype, "max_num_seqs": max(options.batch), "enable_prefix_caching": False}
    plain, drafting = (
        LLM(options.model, threads=options.threads, num_speculative_tokens=count, **common)
        for count in (0, options.num_speculative_tokens)
    )
    rows = []
    for batch in options.batch:
        row = compare(plain, drafting, texts, options, batch)
        rows.append(row)
        if not options.json:
            print(
                f"batch {batch:3}: {row['plain']:8.1f} tokens/s without draft tokens, {row['drafting']:8.1f} with them,"
                f" ratio {statistics.median(row['ratios']):5.2f} ({row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f});"
                f" {row['accepted_tokens']} of {row['draft_tokens']} draft tokens accepted",
                flush=True,
            )
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    print(json.dumps({"settings": settings, "rows": rows}))


if __name__ == "__main__":
    main()
