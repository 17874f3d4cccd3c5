"""The same mixed-adapter load on minilora and on llama.cpp's llama-server, in turn.

    python bench/llama_server.py --server llama-server --gguf model-q4_0.gguf --repeats 3

Both serve the same GGUF file and the same random adapters (PEFT folders here, GGUF adapters there), one for each
request, in a closed loop; output tokens per second. minilora runs in a process of its own through bench/serving.py's
code, without HTTP; llama-server is asked over HTTP on this machine. --decode measures llama-server alone: --concurrency
texts that decode side by side, their prompts not timed. Last line: one JSON document, with the median of the ratios.
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from serving import measure
from workload import adapter_tensors, add_arguments, make_arrivals, say

from minilora.checkpoint.resolve import resolve_model
from minilora.loading import load_model
from minilora_kernels.limits import usable_cores

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf_adapter(path: Path, config, rank: int, seed: int) -> Path:
    """The adapter of workload.save_random_adapter as GGUF, for models of the architecture `llama`."""
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for name, tensor in adapter_tensors(config, rank, seed).items():
        module, half = name.removeprefix("base_model.model.model.layers.").split(".lora_")
        layer, _, kind = module.partition(".")
        if half[0] == "B" and kind.endswith(("q_proj", "k_proj")):
            heads = config.heads if kind.endswith("q_proj") else config.kv_heads
            tensor = tensor.reshape(heads, 2, -1, rank).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"blk.{layer}.{NAMES[kind]}.weight.lora_{half[0].lower()}", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class LlamaServer:
    """A running llama-server."""

    def __init__(self, options: argparse.Namespace, adapters: list[Path]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [options.server, "-m", options.gguf, "--port", str(self.port), "-np", str(options.concurrency)]
        command += ["-c", str(options.max_model_len * options.concurrency), "--cache-ram", "0"]
        command += ["-t", str(options.threads)]
        for path in adapters:
            command += ["--lora", str(path)]
        if adapters:
            command.append("--lora-init-without-apply")
        command += options.server_arguments.split()
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).read()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    raise SystemExit(
                        "llama-server does not start; try its command by hand: " + " ".join(command)
                    ) from None
                time.sleep(0.1)

    def complete(self, arrival, slot: int = -1, generate: int | None = None) -> int:
        """The number of tokens generated. slot: which one computes them, -1 any; generate: not the arrival's."""
        body = {
            "prompt": list(arrival.prompt),
            "id_slot": slot,
            "n_predict": arrival.generate if generate is None else generate,
            "temperature": 0,
            "ignore_eos": True,
            "lora": [] if arrival.adapter is None else [{"id": arrival.adapter, "scale": 1.0}],
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)["tokens_predicted"]

    def load(self, arrivals, concurrency: int) -> float:
        """Output tokens per second in a closed loop."""
        waiting, lock, tokens = iter(arrivals), threading.Lock(), []

        def client():
            while True:
                with lock:
                    arrival = next(waiting, None)
                if arrival is None:
                    return
                tokens.append(self.complete(arrival))

        # Not one of the load's prompts: its slot would keep it.
        self.complete(replace(arrivals[0], prompt=(3,) * 40), generate=4)
        clients = [threading.Thread(target=client) for _ in range(concurrency)]
        started = time.perf_counter()
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        return sum(tokens) / (time.perf_counter() - started)

    def decode(self, arrivals) -> float:
        """New tokens per second of texts side by side, each in a slot that has its prompt in the cache."""
        slots = range(len(arrivals))
        for slot in slots:
            self.complete(arrivals[slot], slot, 1)
        with ThreadPoolExecutor(len(arrivals)) as pool:
            started = time.perf_counter()
            tokens = sum(pool.map(self.complete, arrivals, slots))
            return tokens / (time.perf_counter() - started)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def ours(options: argparse.Namespace) -> float:
    """The load on minilora, in a fresh process."""
    settings = json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()})
    done = subprocess.run(
        [sys.executable, __file__, "--inner", settings], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])["output_tokens_per_s"]


def inner(settings: str) -> None:
    options = argparse.Namespace(**json.loads(settings))
    options.folder, options.preload = Path(options.folder), True
    print(json.dumps(asyncio.run(measure(options))))


def main() -> None:
    if sys.argv[1:2] == ["--inner"]:
        inner(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--server", required=True, help="llama.cpp's llama-server")
    parser.add_argument("--gguf", required=True, help="the model that both serve")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--server-arguments", default="", help="more of llama-server's own arguments")
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode", action="store_true", help="llama-server alone, prompts not timed")
    options = parser.parse_args()
    if options.rate or options.trace:
        parser.error("the load is a closed loop here: leave out --rate and --trace")
    if options.decode and options.requests < options.concurrency:
        parser.error("--decode needs as many --requests as --concurrency")
    defaults = {
        "model": options.gguf,
        "dtype": "auto",
        "max_num_seqs": options.concurrency,
        "max_step_ms": 100,
        "num_speculative_tokens": 0,
        "kv_cache_dtype": "auto",
    }
    options = argparse.Namespace(**defaults, **vars(options), lora_memory=None)
    config = load_model(resolve_model(options.gguf, say), options.gguf).weights.config
    arrivals = make_arrivals(options, config.vocab_size, options.max_model_len)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder) / "peft"
        adapters = [
            write_gguf_adapter(Path(folder) / f"{i}.gguf", config, options.ranks[i % len(options.ranks)], i)
            for i in range(options.adapters)
        ]
        rows = []
        for _ in range(options.repeats):
            mine = None if options.decode else ours(options)
            count = options.concurrency
            with closing(LlamaServer(options, adapters)) as server:
                theirs = server.decode(arrivals[:count]) if options.decode else server.load(arrivals, count)
            rows.append({"llama_server": round(theirs, 1)})
            line = f"llama-server {theirs:8.1f} tokens/s"
            if mine is not None:
                rows[-1] |= {"minilora": mine, "ratio": round(mine / theirs, 2)}
                line += f", minilora {mine:8.1f} tokens/s, ratio {mine / theirs:5.2f}"
            print(line, flush=True)
    ratio = None if options.decode else statistics.median(row["ratio"] for row in rows)
    print(json.dumps({"rows": rows, "ratio": ratio}))


if __name__ == "__main__":
    main()
