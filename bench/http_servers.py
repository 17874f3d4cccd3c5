"""What HTTP benchmarks put under load: `minilora serve`, and for comparison the engine alone and llama-server."""

import argparse
import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import IO

import psutil
from workload import Arrival, say

from minilora.checkpoint.resolve import resolve_model
from minilora_kernels.limits import usable_cores

# Options that `minilora serve` and bench/serving.py have under the same names.
ENGINE = (
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "kv_cache_dtype",
    "lora_memory",
    "num_speculative_tokens",
    "threads",
)
WORKLOAD = ("requests", "concurrency", "rate", "burstiness", "trace", "adapters", "popularity", "seed")

# A server that still runs so many seconds after SIGTERM is killed, which its exit code shows.
LONGEST_END = 60


class OwnServer:
    """`minilora serve` in a process of its own, ended with the `with` block.

    arguments: more of its command line; log: a file for its stderr.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        adapters: dict[str, Path],
        arguments: Sequence[str] = (),
        log: IO | None = None,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "minilora", "serve", "--model", options.model, "--port", str(self.port)]
        command += [*flags(options, ENGINE), "--max-loras", str(max(options.max_num_seqs, 1))]
        for name, path in adapters.items():
            command += ["--lora", f"{name}={path}"]
        command += [*arguments, *shlex.split(options.serve_arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "OwnServer":
        try:
            wait_until_ready(self.url, 300, self.process)
        except BaseException:
            self.__exit__()
            raise
        return self

    def cpu_seconds(self) -> float:
        """Processor time that it has used."""
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(LONGEST_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def flags(options: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """Those of the options that were given, as a command line."""
    given = [(name, getattr(options, name, None)) for name in names]
    return [part for name, value in given if value is not None for part in (f"--{name.replace('_', '-')}", str(value))]


def wait_until_ready(url: str, seconds: float, process: subprocess.Popen | None = None) -> None:
    """Until a server answers /health with 200. Raises SystemExit."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).read()
            return
        except (urllib.error.URLError, OSError) as error:
            ended = process is not None and process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise SystemExit(f"the server at {url} is not ready: {error}") from None
            time.sleep(0.05)


def on_engine(options: argparse.Namespace) -> dict:
    """The same load without HTTP, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("serving.py")), "--json", "--preload"]
    command += ["--model", options.model, "--folder", str(options.folder)]
    command += flags(options, ENGINE) + flags(options, WORKLOAD)
    command += ["--ranks", ",".join(map(str, options.ranks))]
    command += ["--prompt", "{}-{}".format(*options.prompt), "--generate", "{}-{}".format(*options.generate)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    run = json.loads(done.stdout.splitlines()[-1])["runs"]["asked"][0]
    return {"output_throughput": run["output_tokens_per_s"], **run}


def on_llama_server(options: argparse.Namespace, arrivals: list[Arrival], config, folder: Path) -> dict:
    """The same load on llama.cpp's server, through its own completion route."""
    from llama_server import LlamaServer, write_gguf_adapter

    theirs = argparse.Namespace(
        server=options.llama_server,
        gguf=str(resolve_model(options.gguf or options.model, say)),
        concurrency=options.concurrency,
        max_model_len=options.max_model_len,
        threads=options.threads or usable_cores(),
        server_arguments=options.llama_server_arguments,
    )
    adapters = [
        write_gguf_adapter(folder / f"{i}.gguf", config, options.ranks[i % len(options.ranks)], i)
        for i in range(options.adapters)
    ]
    with closing(LlamaServer(theirs, adapters)) as server:
        return {"output_throughput": server.load(arrivals, options.concurrency)}
