"""Write tests/goldens/real.json: what transformers and PEFT compute in float32 for the default model and its adapters.

    pip install minilora[parity]
    python tools/make_goldens.py

The test suite compares with this file, so that it checks parity without torch.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from minilora.chat import encode_chat
from minilora.checkpoint.resolve import entries, resolve_adapter, resolve_model
from minilora.loading import load_model

MODEL = "smollm2-135m-instruct"
QUESTIONS = ("Name three fruits.", "Why is the sea salty?", "Write a line of Python that sums 1 to 10.")
ROOT = Path(__file__).resolve().parent.parent


def golden(model, prompts) -> list[dict]:
    """For each prompt: the greedy text, and at every position the five best tokens with their log-probabilities."""
    rows = []
    for ids in prompts:
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
            text = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0)[
                0
            ].tolist()
        best = logprobs.topk(5)
        rows.append(
            {
                "text": text[len(ids) :],
                "tokens": best.indices.tolist(),
                "logprobs": [[round(x, 5) for x in row] for row in best.values.tolist()],
            }
        )
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = resolve_model(MODEL, print)
    tokenizer = load_model(path, MODEL).tokenizer
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    prompts.append(tokenizer.encode((ROOT / "tests" / "data" / "prose.txt").read_text())[:120])

    def fresh():
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    results = {"base": golden(fresh(), prompts)}
    for name in entries("adapters"):
        results[name] = golden(PeftModel.from_pretrained(fresh(), resolve_adapter(name, print)).eval(), prompts)
    content = {
        "made_with": {name: version(name) for name in ("torch", "transformers", "peft")},
        "model": MODEL,
        "prompts": prompts,
        "results": results,
    }
    (ROOT / "tests" / "goldens" / "real.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
