"""Fixtures of the server's tests: the application on a tiny random model, in process and behind a real socket."""

import asyncio
import contextlib
import dataclasses
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from minilora import LLM, AsyncEngine, LoRARequest, SamplingParams
from minilora.config import ModelConfig
from minilora.server import ServerConfig, create_app
from minilora.server.run import Lora, bound, listen, uvicorn_config

from ..support import BASE_CONFIG, LINEAR, make_checkpoint, save_adapter

CONFIG = ModelConfig.from_dict(BASE_CONFIG)
SIZES = {"max_model_len": 512, "max_num_seqs": 8, "debug_checks": True, "threads": 2, "dtype": "int8"}
MODEL = "tiny"
NAMES = (MODEL, "a0", "a1", "a2", "a3")
PROMPT = "The quick brown fox jumps over the lazy dog and then "


@dataclass
class Running:
    """A server behind a socket. client: an httpx.Client with its URL and, if there is one, its first API key."""

    app: FastAPI
    engine: AsyncEngine
    url: str
    port: int
    client: httpx.Client
    web: uvicorn.Server = field(repr=False)

    def stats(self):
        """The engine's Stats, from any thread."""
        return asyncio.run(self.engine.stats())

    def openai(self, **options):
        """The official client for it."""
        import openai

        key = (*self.app.state.server.config.api_keys, "none")[0]
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": key, "max_retries": 0, **options})


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """(certificate, its key) of 127.0.0.1, as PEM files."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    made, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    extension = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(made)]
    subprocess.run([*command, *extension], check=True, capture_output=True)
    return made, key


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The path of a tiny model for long texts; its name in requests is MODEL."""
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=1 << 16))


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """A folder of four adapters for the tiny model: a0 to a3, of rank 4 to 7."""
    root = tmp_path_factory.mktemp("adapters")
    for i in range(4):
        save_adapter(root / f"a{i}", CONFIG, 4 + i, LINEAR[:7], seed=i)
    return root


@pytest.fixture(scope="session")
def llm(model, shelf):
    """The same model and adapters without a server: what it says is right."""
    llm = LLM(model, lora={f"a{i}": str(shelf / f"a{i}") for i in range(4)}, **SIZES)
    yield llm
    llm.close()


@pytest.fixture(scope="session")
def expected(llm):
    """name -> greedy text, from LLM, one by one."""
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    found = {
        name: llm.generate(PROMPT, params, None if name == MODEL else LoRARequest(name))[0].outputs[0].text
        for name in NAMES
    }
    assert len(set(found.values())) == len(NAMES)
    return found


@contextlib.contextmanager
def served(engine: AsyncEngine, config: ServerConfig, loras: Sequence[Lora] = ()) -> Iterator[Running]:
    """A real server in a thread, on a free port of 127.0.0.1 whatever port `config` names."""
    config = dataclasses.replace(config, port=0)
    app = create_app(engine, config)
    for lora in loras:
        asyncio.run(app.state.server.names.register(*lora))
    web = uvicorn.Server(uvicorn_config(app, config))
    with bound(config) as listener:
        listen(listener, config)
        port = listener.getsockname()[1]
        thread = threading.Thread(target=web.run, args=([listener],), name="web")
        thread.start()
        headers = {"Authorization": f"Bearer {config.api_keys[0]}"} if config.api_keys else {}
        url = f"http://127.0.0.1:{port}"
        try:
            with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
                yield Running(app, engine, url, port, client, web)
        finally:
            web.should_exit = True
            thread.join(30)
    assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="module")
def serve(model):
    """A function: options of the engine (`engine={...}`) and of the server -> a Running, ended after the module."""
    with contextlib.ExitStack() as stack:

        def start(engine=None, **options) -> Running:
            options = {"served_model_name": (MODEL,), "enable_page": True, **options}
            made = AsyncEngine(model, **{**SIZES, **(engine or {})})
            stack.callback(made.close)
            return stack.enter_context(served(made, ServerConfig(**options)))

        yield start


@pytest.fixture
def shop(serve, shelf, tmp_path):
    """A server that may load at run time from a folder of its own, with a0 and a1 in it."""
    folder = tmp_path / "adapters"
    for name in ("a0", "a1"):
        shutil.copytree(shelf / name, folder / name)
    running = serve(
        lora_dir=folder,
        enable_runtime_lora=True,
        api_keys=("user",),
        admin_keys=("admin",),
        engine={"max_cpu_loras": 16, "max_model_len": 4096},
    )
    running.folder = folder
    yield running
    assert_idle(running)


@pytest.fixture(scope="module")
def server(serve, shelf):
    """A server with the tiny model and the four adapters of the shelf, found on first use."""
    running = serve(lora_dir=shelf)
    yield running
    assert_idle(running)


def assert_idle(running: Running, seconds: float = 10.0) -> None:
    """Soon nothing is left in the engine: no request, page or adapter held."""
    end = time.monotonic() + seconds
    while (stats := running.stats()).running + stats.waiting and time.monotonic() < end:
        time.sleep(0.01)
    assert running.app.state.server.gate.active == 0
    assert (stats.running, stats.waiting, stats.pages_held, stats.adapters.in_use) == (0, 0, 0, 0)
    asyncio.run(running.engine.check_integrity())
