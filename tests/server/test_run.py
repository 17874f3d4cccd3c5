"""`python -m minilora serve` in a process of its own: the start page, options, signals, exit codes."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

from minilora.cli import serve
from minilora.server import shutdown

from .raw import connect, read_all

# A process may first compile, beside all other tests.
TIMEOUT = 300


class Process:
    """A server in a process. lines: of its stderr so far."""

    def __init__(self, *arguments, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minilora", "serve", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, pattern):
        """The match of a pattern in a line of stderr."""
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            for line in list(self.lines):
                if match := re.search(pattern, line):
                    return match
            assert self.process.poll() is None or self._reader.is_alive(), self.lines
            time.sleep(0.02)
        raise AssertionError(f"no {pattern} in {self.lines}")

    @property
    def url(self):
        return self.wait_for(r"^address +(\S+)")[1]

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def end(self):
        """(exit code, stdout)."""
        self.process.wait(TIMEOUT)
        out = self.process.stdout.read()
        self.close()
        return self.process.returncode, out

    def close(self):
        self.process.kill()
        self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def start(model):
    """A function: arguments -> a Process with the tiny model, killed after the test."""
    with contextlib.ExitStack() as stack:

        def run(*arguments, **environment):
            process = Process(
                "-m", model, "--port", 0, "--threads", 1, "--max-model-len", 256, *arguments, **environment
            )
            stack.callback(process.close)
            return process

        yield run


def failing(*arguments, **environment):
    """(exit code, stderr) of a server that does not get far."""
    process = Process(*arguments, **environment)
    code, out = process.end()
    assert out == ""
    return code, "\n".join(process.lines)


def test_start_page_and_its_curl(start, shelf):
    process = start("--served-model-name", "small", "--lora", f"mine={shelf / 'a0'}", "--lora-dir", shelf)
    url = process.url
    command = process.wait_for(r"^try +(curl .*)")[1]
    text = "\n".join(process.lines)
    assert re.search(r"^model +small, float32, \d+ MB", text, re.M), text
    assert re.search(r"^KV cache +\d+ tokens", text, re.M) and "mine, a0, a1, a2, a3" in text
    body = json.loads(re.search("-d '(.*)'", command)[1])
    assert f"{url}/v1/chat/completions" in command
    answer = httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 3}, timeout=30)
    assert answer.status_code == 200, answer.text
    metrics = httpx.get(f"{url}/metrics").text
    assert 'vllm:prompt_tokens_total{engine="0",model_name="small"} ' in metrics
    assert re.search(r"^minilora:requests_total\S* 1\.0$", metrics, re.M), "warming up does not count"
    process.signal()
    assert process.end() == (0, "")


def stream(url, tokens, started):
    """The text of a stream; sets `started` with its first event."""
    body = {"prompt": "Hi", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = []
        for line in answer.iter_lines():
            started.set()
            lines.append(line)
    return lines


def in_thread(function, *arguments):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    thread.start()
    return thread, results


def test_sigterm_lets_requests_finish(start):
    process = start("--max-model-len", 40_000)
    url, started = process.url, threading.Event()
    assert httpx.get(f"{url}/ready").status_code == 200
    thread, results = in_thread(stream, url, 6000, started)
    assert started.wait(30)
    process.signal()
    process.wait_for("running texts")
    assert httpx.get(f"{url}/ready").status_code == 503
    assert httpx.get(f"{url}/health").status_code == 200
    refused = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"})
    assert (
        refused.status_code == 503 and refused.headers["Retry-After"] and refused.json()["error"]["code"] == "draining"
    )
    thread.join(60)
    assert results[0][-2] == "data: [DONE]" and '"finish_reason":"length"' in results[0][-4]
    assert process.end() == (0, "")


@pytest.mark.parametrize("flags, lines", [((), 0), (("--log-requests",), 3)])
def test_the_log_has_a_line_for_each_request_where_it_is_wanted(start, flags, lines):
    process = start(*flags)
    for _ in range(3):
        assert httpx.post(f"{process.url}/v1/completions", json={"prompt": "Hi", "max_tokens": 1}).status_code == 200
    process.signal()
    assert process.end() == (0, "")
    assert sum("POST /v1/completions" in line for line in process.lines) == lines, process.lines


def test_who_still_sends_a_body_is_told(start):
    process = start()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with connect(int(process.url.rpartition(":")[2])) as half:
        half.sendall(head + b"{")
        time.sleep(0.3)
        process.signal()
        answer = read_all(half)
    assert answer.startswith(b"HTTP/1.1 503 ") and b'"code":"draining"' in answer
    assert process.end() == (0, "") and not any("Traceback" in line for line in process.lines)


@pytest.mark.parametrize("second", [True, False], ids=["a second signal", "the timeout"])
def test_what_does_not_finish_is_told(start, second):
    process = start("--max-model-len", 40_000, "--shutdown-timeout", 60 if second else 0.1)
    url, started = process.url, threading.Event()
    thread, results = in_thread(stream, url, 39_000, started)
    assert started.wait(30)
    process.signal()
    if second:
        process.wait_for("running texts")
        process.signal(signal.SIGINT)
    thread.join(60)
    assert results[0][-2] == "data: [DONE]" and '"code":"draining"' in results[0][-4]
    assert process.end() == (1, "")


def test_s17_a_dead_engine_ends_the_process(serve, monkeypatch):
    """/health tells it for a moment, then the process ends with 1, so that a supervisor starts another."""
    monkeypatch.setattr(shutdown, "LAST_WORDS", 0.3)
    running = serve()
    said, web = [], SimpleNamespace(should_exit=False)
    ending = shutdown.Shutdown(web, running.app.state.server, said.append)

    async def watch():
        task = asyncio.ensure_future(ending.watch())
        await asyncio.sleep(0.3)
        assert not task.done()
        monkeypatch.setattr(running.engine._llm.engine.scheduler, "schedule", lambda: 1 / 0)
        answer = asyncio.ensure_future(asyncio.to_thread(running.client.post, "/v1/completions", json={"prompt": "x"}))
        assert (await answer).status_code == 503
        assert (await asyncio.to_thread(running.client.get, "/health")).status_code == 503 and not web.should_exit
        await asyncio.wait_for(task, 10)

    asyncio.run(watch())
    assert web.should_exit and ending.exit_code == 1 and "division by zero" in said[0]


def test_s17_an_engine_that_dies_while_the_server_drains_is_told(serve, monkeypatch):
    running = serve()
    said, web = [], SimpleNamespace(should_exit=False)
    ending = shutdown.Shutdown(web, running.app.state.server, said.append)
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}

    async def main():
        request = asyncio.ensure_future(asyncio.to_thread(running.client.post, "/v1/completions", json=body))
        while not running.app.state.server.gate.active:
            await asyncio.sleep(0.01)
        ending.signal()
        monkeypatch.setattr(running.engine._llm.engine.scheduler, "schedule", lambda: 1 / 0)
        assert (await request).status_code == 503
        while not web.should_exit:
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert ending.exit_code == 1 and "division by zero" in said[-1]


@pytest.mark.parametrize("value, port", [("tcp://10.0.0.1:9000", 8000), ("9000", 9000)])
def test_a_service_of_this_name_sets_no_port(monkeypatch, value, port):
    """Kubernetes tells every pod the addresses of services, in variables such as ours."""
    monkeypatch.setenv("MINILORA_PORT", value)
    assert serve.make_context("serve", []).params["port"] == port


def test_configuration_goes_before_by_rank(start, tmp_path):
    """The command line before the environment before the file before the default."""
    config = tmp_path / "server.toml"
    config.write_text(
        'served-model-name = ["from-file"]\nhost = "localhost"\nmax_num_seqs = 3\napi-key = ["k1", "k2"]\nenable-page = false\n'
    )
    process = start("--config", config, "--host", "127.0.0.1", MINILORA_HOST="0.0.0.0", MINILORA_MAX_NUM_SEQS="5")
    url = process.url
    assert url.startswith("http://127.0.0.1:")
    headers = {"Authorization": "Bearer k2"}
    assert httpx.get(f"{url}/v1/models").status_code == 401
    [card] = httpx.get(f"{url}/v1/models", headers=headers).json()["data"]
    assert card["id"] == "from-file"
    body = {"prompt": "Hi", "max_tokens": 1, "n": 5}
    assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).status_code == 200
    body["n"] = 6
    assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).status_code == 400
    assert httpx.get(url, headers=headers).status_code == 404, "enable-page is false in the file"
    process.signal()
    assert process.end()[0] == 0
    assert all("k1" not in line and "k2" not in line for line in process.lines)


def test_the_address_of_a_server_behind_a_prefix(start):
    """It is the one that works here; the proxy's is told beside it."""
    process = start("--root-path", "/llm")
    command = process.wait_for(r"^try +(curl .*)")[1]
    assert httpx.get(f"{process.url}/v1/models").status_code == 200
    assert f"{process.url}/v1/chat/completions" in command and "under /llm" in "\n".join(process.lines)
    process.signal()
    assert process.end()[0] == 0


def test_adapters_of_the_environment(start, shelf):
    process = start(MINILORA_LORA=f"x={shelf / 'a0'} y={shelf / 'a1'}:0.5")
    assert [card["id"] for card in httpx.get(f"{process.url}/v1/models").json()["data"]][1:] == ["x", "y"]
    process.signal()
    assert process.end()[0] == 0


def test_a_json_file_and_a_unix_socket(start, tmp_path):
    path, config = tmp_path / "socket", tmp_path / "server.json"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    config.write_text(json.dumps({"uds": str(path), "api-key": "secret"}))
    process = start("--config", config)
    process.wait_for("^address")
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    process.signal()
    assert process.end()[0] == 0 and not path.exists()


def test_tls(start, certificate):
    process = start("--ssl-certfile", certificate[0], "--ssl-keyfile", certificate[1])
    url = process.url
    assert url.startswith("https://")
    context = ssl.create_default_context(cafile=certificate[0])
    assert httpx.get(f"{url}/v1/models", verify=context).status_code == 200
    with pytest.raises(httpx.HTTPError):
        httpx.get(url.replace("https", "http"))
    process.signal()
    assert process.end()[0] == 0


def test_what_is_wrong_is_said_before_loading(tmp_path, shelf):
    """No model of this name exists: a message about anything else came first."""
    empty, keys, unknown = tmp_path / "empty", tmp_path / "keys", tmp_path / "unknown.toml"
    empty.write_text("# no key\n\n")
    keys.write_text("same\n")
    unknown.write_text("prot = 80\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message, code in (
            (["--port", port], f"127.0.0.1:{port} is in use", 1),
            (["--host", "no.such.host.invalid"], "has no address", 2),
            (["--api-key-file", tmp_path / "none"], "none: No such file", 2),
            (["--api-key-file", empty], "holds no key", 2),
            (["--api-key", "same", "--admin-key-file", keys], "both an API key and an admin key", 2),
            (["--api-key", "with space"], "printable ASCII", 2),
            (["--lora", f"x={tmp_path / 'none'}"], "no adapter is called", 1),
            (["--lora", f"x={broken}"], "adapter_config.json", 1),
            (["--lora", f"../x={shelf / 'a0'}"], "letters, digits", 2),
            (["--lora", "x="], "NAME[=PATH", 2),
            (["--lora-dir", tmp_path / "none"], "not a folder", 2),
            (["--enable-runtime-lora"], "admin key and a folder", 2),
            (["--ssl-certfile", keys], "both ssl_certfile and ssl_keyfile", 2),
            (["--ssl-certfile", keys, "--ssl-keyfile", keys], "can't be used", 2),
            (["--config", unknown], "Did you mean 'port'", 2),
            (["--config", tmp_path / "none.toml"], "none.toml: No such file", 2),
            (["--config", keys], "keys: ", 2),
            (["--lora", f"x={shelf / 'a0'}", "--lora", f"x={shelf / 'a1'}"], "two adapters are called 'x'", 2),
            (["--isolate-cache-per-key"], "need API keys", 2),
            (["--max-queued-per-key", "2"], "need API keys", 2),
            (["--served-model-name", ""], "not empty", 2),
            (["--served-model-name", "a", "--served-model-name", "a"], "each once", 2),
            (["--allowed-origins", "example.org"], "https://host:port", 2),
            (["--root-path", "api"], "begin with a slash", 2),
            (["--request-timeout", "nan"], "request_timeout", 2),
            (["--port", "70000"], "65535", 2),
        ):
            found, text = failing("-m", "no-such-model", "--port", 0, *arguments)
            assert message in text and found == code, (arguments, found, text)
            assert "Traceback" not in text and "no-such-model" not in text


def test_the_model_last():
    code, text = failing("-m", "no-such-model", "--port", 0)
    assert code == 1 and "no model is called 'no-such-model'" in text
