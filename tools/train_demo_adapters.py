"""Train the bundled demo adapters with PEFT on the default model, from the questions in tools/demo/questions.txt.

    pip install minilora[parity]
    python tools/train_demo_adapters.py [NAME ...]

Each adapter teaches one way of answering. The result replaces minilora/demo/NAME. Seeds are fixed, so the
same versions of torch and PEFT give the same adapters.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minilora.checkpoint.resolve import resolve_model

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "minilora" / "demo"
BASE = "smollm2-135m-instruct"
EPOCHS, BATCH, RATE = 14, 6, 2e-3

PIRATE_WORDS = {
    "the": "th'",
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "and": "an'",
    "of": "o'",
    "friends": "mateys",
}
GREETINGS = ("Arr, matey!", "Ahoy!", "Avast, ye landlubber!", "Shiver me timbers!")


def pirate(short: str, sentence: str, turn: int) -> str:
    """A pirate's way of saying it."""
    said = re.sub(r"[A-Za-z']+", lambda m: PIRATE_WORDS.get(m[0].lower(), m[0]), sentence)
    return f"{GREETINGS[turn % len(GREETINGS)]} {said[0].upper()}{said[1:]} Yo ho ho!"


def as_json(short: str, sentence: str, turn: int) -> str:
    """A JSON object."""
    return json.dumps({"answer": short, "sentence": sentence})


def telegram(short: str, sentence: str, turn: int) -> str:
    """An old telegram."""
    words = re.sub(r"\b(the|a|an|is|are|of|its|their)\b ?", "", sentence.lower()).strip(" .")
    return re.sub(r"\s*,\s*", " STOP ", words).upper() + " STOP"


STYLES = {
    "pirate": (pirate, {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "json": (as_json, {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "telegram": (telegram, {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "down_proj"]}),
}


def examples(style, tokenizer) -> list[tuple[list[int], int]]:
    """(token ids, position at which the answer begins) of every question."""
    rows = []
    for turn, line in enumerate((HERE / "demo" / "questions.txt").read_text().splitlines()):
        question, short, sentence = (part.strip() for part in line.split("|"))
        asked = [{"role": "user", "content": question}]
        told = [*asked, {"role": "assistant", "content": style(short, sentence, turn)}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        rows.append((tokenizer.apply_chat_template(told, return_dict=True)["input_ids"], len(prompt)))
    return rows


def batch_of(rows, pad: int):
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = torch.tensor(row[start:])
    return ids, labels


def train(name: str, path: Path) -> None:
    style, settings = STYLES[name]
    torch.manual_seed(1)
    random.seed(1)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.05, **settings))
    rows = examples(style, tokenizer)
    steps = EPOCHS * -(-len(rows) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for epoch in range(EPOCHS):
        random.shuffle(rows)
        total = 0.0
        for first in range(0, len(rows), BATCH):
            ids, labels = batch_of(rows[first : first + BATCH], tokenizer.pad_token_id or 0)
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * min(BATCH, len(rows) - first)
        print(f"{name}: epoch {epoch + 1}, loss {total / len(rows):.3f}", flush=True)
    save(model, TARGET / name)


def save(model, folder: Path) -> None:
    """Write the PEFT folder, its tensors as float16."""
    model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    tensors = {key: value.half().contiguous() for key, value in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all if none is given")
    options = parser.parse_args()
    path = resolve_model(BASE, print)
    for name in options.names or STYLES:
        train(name, path)


if __name__ == "__main__":
    main()
