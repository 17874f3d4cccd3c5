"""Perplexity of a text under several number formats of one model, and their distance from float32.

    python tools/perplexity.py TEXTFILE [--model M] [--dtypes auto,int8,int4] [--context 512] [--chunks 8]
    python tools/perplexity.py TEXTFILE --adapter pirate --lora-dtypes float16,int8

The text is cut into chunks of --context tokens, each read by itself. For every format: perplexity over all tokens but a
chunk's first, or its first --skip + 1; and against float32 of the same file: mean KL divergence and how often the best
token is the same. With an adapter, float32 weights are also read with the adapter in each of --lora-dtypes, to see what
that alone costs. Last line: one JSON document.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np

from minilora.checkpoint.resolve import resolve_adapter, resolve_model
from minilora.engine import Engine
from minilora.loading import load_model
from minilora.params import EngineConfig, SamplingParams
from minilora.plan import Target
from minilora.runner import PROMPT_LOGITS
from minilora.sequence import AdapterUse


class Reader:
    """Reads chunks with one format; gives log-probabilities of the whole vocabulary at every position."""

    def __init__(self, options: argparse.Namespace, dtype: str, kv: str, lora: str = "auto"):
        name = options.model
        self.model = load_model(resolve_model(name, print), name, Target(dtype, options.group_size))
        config = EngineConfig(
            max_model_len=options.context + 2,
            max_num_seqs=1,
            enable_prefix_caching=False,
            kv_cache_dtype=kv,
            lora_dtype=lora,
        )
        self.engine = Engine(self.model.weights, config)
        self.uses = ()
        if options.adapter:
            self.uses = (AdapterUse(self.engine.add_adapter(resolve_adapter(options.adapter, print)), 1.0),)

    def logprobs(self, tokens: list[int]):
        """Yields pieces [rows, vocabulary], in order, until the chunk is read."""
        engine = self.engine
        [sequence] = engine.submit(tokens, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0), self.uses)
        while engine.busy:
            before = sequence.computed
            engine.step()
            if engine.stalled:
                engine.wait()
                continue
            count = min(PROMPT_LOGITS, len(tokens) - before)
            logits = engine.runner.sampler.logits(count).astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            yield logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def measure(reader: Reader, exact: Reader, chunks: list[list[int]], skip: int) -> dict[str, float]:
    """Perplexity, and KL and agreement against the exact reader, of what follows each chunk's token `skip`."""
    loss, divergence, same, places, following = 0.0, 0.0, 0, 0, 0
    for tokens in chunks:
        at = 0
        mine = reader.logprobs(tokens)
        # The exact reader is compared with itself: it can't read a chunk twice at once.
        pairs = ((q, q) for q in mine) if reader is exact else zip(exact.logprobs(tokens), mine, strict=True)
        for p, q in pairs:
            first = min(max(skip - at, 0), len(q))
            targets = np.array(tokens[at + first + 1 : at + len(q) + 1], np.int64)
            at, p, q = at + len(q), p[first:], q[first:]
            divergence += float((np.exp(p) * (p - q)).sum())
            same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            loss -= float(q[np.arange(len(targets)), targets].sum())
            places, following = places + len(q), following + len(targets)
    return {"perplexity": float(np.exp(loss / following)), "kl": divergence / places, "same_best": same / places}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("textfile", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtypes", default="auto,int8,int4", help="number formats of the weights")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--adapter", help="read with this adapter")
    parser.add_argument("--lora-dtypes", default="float16,int8", help="with --adapter: its number formats")
    parser.add_argument("--context", type=int, default=512, help="tokens of a chunk")
    parser.add_argument("--chunks", type=int, default=8, help="chunks that are read at most")
    parser.add_argument(
        "--skip", type=int, default=0, help="further tokens at each chunk's start that are read, but not counted"
    )
    options = parser.parse_args()
    if not 0 <= options.skip < options.context - 1:
        parser.error("--skip leaves nothing of --context tokens to count")
    exact = Reader(options, "float32", "float32")
    tokens = exact.model.tokenizer.encode(options.textfile.read_text(encoding="utf-8"))
    chunks = [tokens[i : i + options.context] for i in range(0, len(tokens), options.context)][: options.chunks]
    chunks = [chunk for chunk in chunks if len(chunk) > options.skip + 1]
    if not chunks:
        parser.error(f"{options.textfile} is too short: it has {len(tokens)} tokens")
    rows = []
    print(
        f"{'format':18} {'perplexity':>11} {'KL':>10} {'same best':>10}   ({len(chunks)} chunks of {options.context})"
    )
    readers = {"float32": lambda: exact}
    for lora in options.lora_dtypes.split(",") if options.adapter else []:
        readers[f"float32 + {lora}"] = partial(Reader, options, "float32", "float32", lora)
    for dtype in options.dtypes.split(","):
        readers[dtype] = partial(Reader, options, dtype, options.kv_cache_dtype)
    for name, make in readers.items():
        found = {"format": name, **measure(make(), exact, chunks, options.skip)}
        rows.append(found)
        print(f"{name:18} {found['perplexity']:11.3f} {found['kl']:10.2e} {100 * found['same_best']:9.2f}%", flush=True)
    print(
        json.dumps(
            {
                "model": options.model,
                "context": options.context,
                "chunks": len(chunks),
                "skip": options.skip,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
