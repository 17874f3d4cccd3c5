"""The command line: exit codes, what goes to stdout and stderr, and one golden text through every door."""

import gc
import json
import os
import signal
import subprocess
import sys

import pytest

from minilora.cli.opening import keeping
from minilora.config import ModelConfig

from .support import BASE_CONFIG, TEMPLATE, make_checkpoint, save_adapter


def minilora(*arguments, text=None, **environment):
    """Run the command line in a process of its own."""
    options = {"input": text} if text is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        [sys.executable, "-m", "minilora", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        **options,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_adapter(
        tmp_path_factory.mktemp("adapter"), ModelConfig.from_dict(BASE_CONFIG), rank=8, modules=("q_proj", "down_proj")
    )


def answer(model, *arguments, **more):
    run = minilora("generate", "Hello there", "-m", model, "--max-tokens", 12, "--json", *arguments, **more)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)["outputs"][0]


def test_help_is_light():
    """--help of every command loads neither NumPy nor Numba."""
    code = "import sys; from minilora.cli import main; main(sys.argv[1:]); print([m for m in ('numpy', 'numba', 'tokenizers', 'rich', 'fastapi', 'pydantic', 'uvicorn') if m in sys.modules])"
    for command in (
        [],
        ["generate"],
        ["chat"],
        ["serve"],
        ["pull"],
        ["list"],
        ["show"],
        ["quantize"],
        ["warmup"],
        ["env"],
    ):
        run = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout.rstrip().endswith("[]") and "Usage" in run.stdout


def test_garbage_is_looked_for_again_after_imports():
    with pytest.raises(ImportError), keeping():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_all_doors_give_one_text(model):
    """Streaming, not streaming, JSON, a pipe, a dash, NumPy and Python: the same greedy answer."""
    from minilora import LLM, SamplingParams

    expected = answer(model)["text"]
    assert len(expected) > 3
    arguments = ("-m", model, "--max-tokens", 12)
    assert minilora("generate", "Hello there", *arguments).stdout == expected + "\n"
    assert minilora("generate", "Hello there", "--no-stream", *arguments).stdout == expected + "\n"
    assert minilora("generate", *arguments, text="Hello there").stdout == expected + "\n"
    assert minilora("generate", *arguments, text="Hello there\n").stdout == expected + "\n"
    assert minilora("generate", "-", *arguments, text="Hello there").stdout == expected + "\n"
    assert minilora("generate", "Hello there", "--backend", "numpy", *arguments).stdout == expected + "\n"
    llm = LLM(str(model), threads=1, max_model_len=256)
    [output] = llm.chat([{"role": "user", "content": "Hello there"}], SamplingParams(temperature=0, max_tokens=12))
    llm.close()
    assert output.outputs[0].text == expected


def test_adapters_and_scales(model, adapter):
    plain, adapted = answer(model), answer(model, "--lora", f"a={adapter}")
    assert adapted["text"] != plain["text"] and adapted["adapter"] == ["a"]
    assert answer(model, "--lora", f"a={adapter}:0")["text"] == plain["text"]
    assert answer(model, "--adapter", adapter)["text"] == adapted["text"]
    assert answer(model, "--lora", adapter) == {**adapted, "adapter": [str(adapter)]}
    assert answer(model, "--lora", f"a={adapter}:0.5", "--lora", f"b={adapter}:0.5")["adapter"] == ["a", "b"]
    assert (
        answer(model, "--lora", f"a={adapter}", "--lora", f"b={adapter}:3", "--adapter", "a")["text"] == adapted["text"]
    )
    assert answer(model, "--lora", f"a={adapter}", "--backend", "numpy")["text"] == adapted["text"]


def test_sampling_flags(model):
    assert answer(model, "--temperature", 1, "--seed", 3) == answer(model, "--temp", 1, "--seed", 3, "--threads", 2)
    assert (
        answer(model, "--temperature", 1, "--seed", 3)["text"] != answer(model, "--temperature", 1, "--seed", 4)["text"]
    )
    text = answer(model)["text"]
    assert answer(model, "--stop", text[3:5])["text"] == text[: text.index(text[3:5])]
    for flags in (
        ["--top-k", 5],
        ["--top-p", 0.5],
        ["--min-p", 0.2],
        ["--repetition-penalty", 1.3],
        ["--system", "Be brief."],
        ["--dtype", "int8"],
        ["--raw"],
    ):
        answer(model, "--temperature", 0.9, "--seed", 1, *flags)


def test_engine_flags(model):
    plain = answer(model)["text"]
    for flags in (
        ["--kv-cache-memory", "1M"],
        ["--kv-cache-memory", "0.5 MiB", "--block-size", 64, "--no-enable-prefix-caching"],
        ["--max-num-seqs", 2, "--max-num-batched-tokens", 5, "--max-step-ms", 1],
        ["--max-loras", 1, "--max-cpu-loras", 2, "--max-lora-rank", 8, "--lora-memory", "100k"],
    ):
        assert answer(model, *flags)["text"] == plain
    answer(model, "--kv-cache-dtype", "int8", "--max-model-len", 200)


WRONG_USE = [
    (["generat"], "generate"),
    (["generate", "x", "--temprature", "1"], "--temperature"),
    (["generate", "x", "--temperature", "nan"], "temperature"),
    (["generate", "x", "--temperature", "-1"], "temperature"),
    (["generate", "x", "--top-p", "0"], "top_p"),
    (["generate", "x", "--max-tokens", "0"], "max_tokens"),
    (["generate", "x", "--dtype", "int3"], "int3"),
    (["generate", "x", "--threads", "0"], "threads"),
    (["generate", "x", "--lora", "=nonsense"], "NAME[=PATH"),
    (["generate", "x", "--lora", "a=pirate:inf"], "finite"),
    (["generate", "x", "--adapter", "pirate:nan"], "finite"),
    (["generate", "x", "--ctx-size", "1025"], "positions reach 1024"),
    (["generate", "x", "--enable-lora"], "LoRA is always on"),
    (["serve", "--lora-modules", "a=b"], "--lora NAME=PATH"),
    (["generate", "x" * 2000, "--raw", "--backend", "numpy"], "2000 tokens"),
    (["generate", "x", "--backend", "numpy", "-c", "20", "-t", "1"], "--max-model-len, --threads"),
    (["generate", "x", "--kv-cache-memory", "much"], "512M"),
    (["generate", "x", "--max-num-seqs", "0"], "max_num_seqs"),
    (["generate", "x", "--max-loras", "9", "--max-cpu-loras", "3"], "max_cpu_loras"),
    (["show"], "NAME"),
    (["pull"], "NAMES"),
]


@pytest.mark.parametrize(
    "arguments, word", WRONG_USE, ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_wrong_use_is_exit_code_2(model, arguments, word):
    if arguments[0] == "generate":
        arguments = [*arguments, "-m", model]
    run = minilora(*arguments)
    assert run.returncode == 2 and word in run.stderr and "Traceback" not in run.stderr and run.stdout == ""


def test_failures_are_exit_code_1(model, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(45))
    cases = [
        (["generate", "x", "-m", "smollm2-135m"], "smollm2-135m-instruct"),
        (["generate", "x", "-m", broken], "broken.gguf"),
        (["generate", "x", "-m", model, "--adapter", "pirat"], "pirate"),
        (["generate", "x", "-m", model, "--lora", f"a={tmp_path}"], "adapter_config.json"),
        (["generate", "x", "-m", tmp_path], "config.json"),
        (["show", "nothing-here"], "nothing-here"),
        (["show", "n" * 300], "nnn"),
        (["pull", "piratt"], "'pirate'"),
        (["show", "telegran"], "'telegram'"),
        (["quantize", model, broken / "below"], "File exists"),
    ]
    for arguments, word in cases:
        run = minilora(*arguments)
        assert run.returncode == 1 and word in run.stderr and "Traceback" not in run.stderr and run.stdout == "", (
            run.stderr
        )
        assert run.stderr.splitlines()[-1] or run.stderr.splitlines()[-2]


def test_prompts_that_cannot_be(model):
    for prompt, word in (("", "prompt"), ("x" * 5000, "tokens")):
        run = minilora("generate", "-", "-m", model, "--raw", text=prompt)
        assert run.returncode == 2 and word in run.stderr and run.stdout == ""


def shell(command, **environment):
    """Run `minilora` with a shell's redirections."""
    line = f"exec {sys.executable} -m minilora {command}"
    return subprocess.run(["sh", "-c", line], capture_output=True, env={**os.environ, **environment})


def test_without_stdin(model):
    answered = shell(f"generate x -m {model} -n 2 <&-")
    assert answered.returncode == 0 and answered.stdout
    for command in ("generate -", "chat"):
        run = shell(f"{command} -m {model} <&-")
        assert run.returncode == 2 and b"closed" in run.stderr and b"Traceback" not in run.stderr


def test_bytes_that_are_no_text(tmp_path, model):
    (tmp_path / "prompt").write_bytes(b"caf\xe9")
    run = shell(f"generate -m {model} < {tmp_path / 'prompt'}", PYTHONIOENCODING="utf-8:strict")
    assert run.returncode == 2 and b"byte 3 is 0xe9" in run.stderr and b"Traceback" not in run.stderr


def test_a_terminal_that_lacks_characters_shows_question_marks(model):
    whole = answer(model)["text"]
    run = shell(f"generate 'Hello there' -m {model} -n 12", PYTHONIOENCODING="latin-1")
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{whole}\n".encode("latin-1", "replace") != f"{whole}\n".encode("latin-1", "ignore")


def test_a_full_disk_is_said_once(model):
    for command in (f"generate x -m {model} -n 2", "list", "--help"):
        run = shell(f"{command} > /dev/full")
        assert run.returncode == 1 and run.stderr.splitlines()[-1] == b"error: [Errno 28] No space left on device"


def test_a_text_that_the_context_cuts_is_said(model):
    for flags in (["--stream"], ["--no-stream"], ["--json"]):
        arguments = ("generate", "Hello there", "-m", model, "--raw", "-c", 14, *flags)
        assert "fill the context of 14 tokens" in minilora(*arguments).stderr
        assert "context" not in minilora(*arguments, "-n", 3).stderr, "max_tokens was reached as well"


def test_options_come_from_the_environment_too(model, adapter):
    given = {"MINILORA_MODEL": str(model), "MINILORA_MAX_TOKENS": "3", "MINILORA_LORA": f"a={adapter} b={adapter}:0.5"}
    run = minilora("generate", "Hello there", MINILORA_JSON="1", **given)
    [row] = json.loads(run.stdout)["outputs"]
    assert len(row["token_ids"]) == 3 and row["adapter"] == ["a", "b"]
    assert minilora("chat", text="Hello\n", **given).stdout.strip()
    assert "'--threads'" in minilora("warmup", MINILORA_THREADS="0").stderr


def test_stop_strings_from_a_variable_are_its_lines(model):
    text = answer(model)["text"]
    stop, never = text[4:7], "a b"
    assert never not in text
    assert answer(model, MINILORA_STOP=f"{never}\n{stop}")["text"] == text[: text.index(stop)]


def test_every_unseeded_text_of_the_reference_differs(model):
    arguments = ("generate", "Hello there", "-m", model, "--backend", "numpy", "--temp", 2, "-n", 8)
    assert len({minilora(*arguments, *seed).stdout for seed in ((), (), ("--seed", 5), ("--seed", 5))}) == 3


def test_errors_show_tracebacks_on_request():
    assert "Traceback" in minilora("show", "nothing-here", MINILORA_DEBUG="1").stderr


def test_show_list_env(model, adapter):
    facts = json.loads(minilora("show", model, "--json").stdout)
    assert facts["layers"] == 2 and facts["hidden size"] == 64 and "float32" in facts["formats"]
    facts = json.loads(minilora("show", adapter, "--json").stdout)
    assert facts["r"] == 8 and facts["bytes"] == (adapter / "adapter_model.safetensors").stat().st_size
    assert facts["shapes"] == "down_proj 8x96, 64x8; q_proj 8x64, 64x8" and facts["formats"] == "float32"
    assert f"base_model_name_or_path  {facts['base_model_name_or_path']}\n" in minilora("show", adapter).stdout
    assert {"smollm2-135m-instruct", "pirate"} <= {row["name"] for row in json.loads(minilora("list", "--json").stdout)}
    assert "numba" in json.loads(minilora("env", "--json").stdout)
    for command in (["show", model], ["list"], ["env"]):
        assert minilora(*command).stdout.count("\n") >= 2


def test_chat(model, adapter):
    text = f"Hello\n/adapter {adapter}\nHello\n/nonsense\n/adapter nothing\n/reset\n/adapter\nHello\n/help\n/quit\n"
    run = minilora("chat", "-m", model, "--max-tokens", 8, text=text)
    assert run.returncode == 0, run.stderr
    first, second, third = run.stdout.split("\n")[:3]
    assert first == third != second
    assert "no command /nonsense" in run.stderr and "nothing" in run.stderr and "/reset" in run.stderr
    assert "Known: json" in run.stderr, "an unknown adapter's error names those that there are"


def test_a_chat_that_no_longer_fits_says_how_to_go_on(model):
    """Its first message may still be shortened; later, what was said before can only be dropped."""
    run = minilora("chat", "-m", model, "--max-tokens", 8, "-c", 60, text=f"{'x' * 90}\nHello\nHello\n/reset\nHello\n")
    assert run.returncode == 0 and "Shorten it" in run.stderr
    assert "the conversation no longer fits" in run.stderr and "/reset starts a new one" in run.stderr
    assert run.stdout.count("\n") == 2, run.stdout


def test_a_chat_keeps_the_scales_of_its_adapters(model, adapter):
    text = "Hello\n/reset\n/adapter a\nHello\n/reset\n/adapter a:0\nHello\n"
    lines = minilora("chat", "-m", model, "--max-tokens", 8, "--lora", f"a={adapter}:0", text=text).stdout.split("\n")
    assert (
        lines[0] == lines[1] == lines[2] == minilora("chat", "-m", model, "--max-tokens", 8, text="Hello\n").stdout[:-1]
    )


def test_the_question_is_shown_where_only_its_answer_is(model, adapter):
    run = minilora("generate", "-m", model, "--lora", adapter, "-n", 3)
    assert run.returncode == 0 and "Name three fruits." in run.stderr


def test_what_is_packed_is_not_packed_again(model, adapter, tmp_path):
    assert minilora("quantize", model, tmp_path / "one").returncode == 0
    again = minilora("quantize", tmp_path / "one", tmp_path / "two")
    assert again.returncode == 2 and "packed already" in again.stderr and not (tmp_path / "two").exists()
    shown = minilora("show", adapter, "--dtype", "int4")
    assert shown.returncode == 2 and "is an adapter" in shown.stderr


@pytest.fixture
def endless(tmp_path):
    """A model whose answers end at their limit only: no token is an end of text."""
    make_checkpoint(tmp_path, eos_token_id=None, max_position_embeddings=16384)
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return tmp_path


def start(endless, *arguments):
    """A process that is still writing after 5 bytes are read: its answer is longer than the pipe holds."""
    options = ("--max-tokens", "16000", "--temperature", "5", *arguments)
    return subprocess.Popen(
        [sys.executable, "-m", "minilora", "generate", "x", "-m", str(endless), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        bufsize=0,
        pipesize=4096,
    )


def test_interrupt_is_exit_code_130(endless):
    with start(endless, "--threads", "2") as process:
        process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 130 and b"Traceback" not in errors


def test_sigterm_ends_as_ctrl_c_does(endless):
    with start(endless) as process:
        process.stdout.read(5)
        process.terminate()
        errors = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM and b"Traceback" not in errors


def test_a_pipe_that_nobody_writes_to_is_named(model):
    with subprocess.Popen(
        [sys.executable, "-m", "minilora", "generate", "-m", str(model), "--max-tokens", "3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr.readline() == "reading the prompt from stdin\n"
        answered, _ = process.communicate("Hello there")
    assert process.returncode == 0 and answered


def test_a_closed_pipe_is_quiet(endless):
    with start(endless) as process:
        process.stdout.read(5)
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1 and b"Traceback" not in errors and b"Broken" not in errors


def test_warmup_and_an_unwritable_cache(model, tmp_path):
    assert minilora("warmup", "-m", model).stdout.startswith("ready in")
    (tmp_path / "file").write_text("")
    run = minilora(
        "generate", "Hello there", "-m", model, "--max-tokens", 12, MINILORA_CACHE=str(tmp_path / "file" / "below")
    )
    assert run.returncode == 0 and "MINILORA_CACHE" in run.stderr and "Traceback" not in run.stderr
    assert run.stdout == answer(model)["text"] + "\n"


@pytest.mark.real
def test_the_main_job():
    """Without arguments: one question, side by side, from one batch."""
    run = minilora("generate")
    assert run.returncode == 0, run.stderr
    words = " ".join(run.stdout.split())
    assert all(word in words for word in ("base", "pirate", "json", "telegram", "Bananas", '{"answer":', "an'", "STOP"))
    rows = json.loads(minilora("generate", "--json").stdout)["outputs"]
    assert rows[0]["text"] == "1. Bananas\n2. Oranges\n3. Grapes" and len(rows) == 4
    assert json.loads(rows[1]["text"])["answer"]
