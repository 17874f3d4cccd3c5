"""The command line: exit codes, what goes to stdout and stderr, and one golden text through every door."""

import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from types import SimpleNamespace

import click
import pytest

from minilora.cli import cli, main
from minilora.cli.opening import keeping
from minilora.cli.options import engine_options, model_options, sampling_options
from minilora.config import ModelConfig
from minilora.params import DEFAULT_MODEL, EngineConfig

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


# By sampling flag: what SamplingParams is to hold. The others have tests of their own.
SAMPLING = {"top_p": 0.5, "top_k": 3, "min_p": 0.2, "repetition_penalty": 1.5}


def test_what_flags_say_is_what_is_computed(model):
    """Each changes the text, to the one that Python gives for the same parameters."""
    from minilora import LLM, SamplingParams

    hot = {"temperature": 0.9, "seed": 1}
    plain = answer(model, "--temperature", 0.9, "--seed", 1)["text"]
    asked, brief = {"role": "user", "content": "Hello there"}, {"role": "system", "content": "Be brief."}

    def check(flags, output):
        text = answer(model, "--temperature", 0.9, "--seed", 1, *flags)["text"]
        assert text == output.outputs[0].text != plain, flags

    def params(**more):
        return SamplingParams(**hot, max_tokens=12, **more)

    llm = LLM(str(model), threads=1, max_model_len=256)
    for name, value in SAMPLING.items():
        check([f"--{name.replace('_', '-')}", value], *llm.chat([asked], params(**{name: value})))
    check(["--system", "Be brief."], *llm.chat([brief, asked], params()))
    check(["--raw"], *llm.generate("Hello there", params()))
    llm.close()
    llm = LLM(str(model), dtype="int8", threads=1, max_model_len=256)
    check(["--dtype", "int8"], *llm.chat([asked], params()))
    llm.close()


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


def options_of(decorate):
    """The names of what a decorator in options.py adds to a command."""
    return {option.name for option in click.command(decorate(lambda: None)).params}


OPENING_OPTIONS = options_of(model_options) | options_of(engine_options)

# By option: how it is given, and what the engine is to find.
OPENING = {
    "model": ("a/model", "a/model"),
    "dtype": ("int4", "int4"),
    "group_size": ("64", 64),
    "threads": ("3", 3),
    "max_model_len": ("200", 200),
    "max_num_seqs": ("5", 5),
    "max_num_batched_tokens": ("70", 70),
    "max_step_ms": ("11", 11),
    "num_scheduler_steps": ("4", 4),
    "num_speculative_tokens": ("2", 2),
    "kv_cache_dtype": ("int8", "int8"),
    "kv_cache_memory": ("1.5M", 3 << 19),
    "block_size": ("96", 96),
    "enable_prefix_caching": (None, False),
    "max_loras": ("6", 6),
    "max_cpu_loras": ("17", 17),
    "max_lora_rank": ("9", 9),
    "lora_dtype": ("float16", "float16"),
    "lora_memory": ("100k", 100 << 10),
    "numa": ("interleave", "interleave"),
}


class Opened(BaseException):
    """Leaves a command where it opens an engine."""


# What commands do that would change this process for good.
LASTING = (
    "gc.freeze",
    "minilora_kernels.jit.on_compile",
    "minilora.server.run.allow_connections",
    "minilora.server.run.give_back_freed_arrays",
)


@pytest.fixture
def opened(monkeypatch):
    """A function: a command's arguments -> what it opens an engine with, by option. No model is read."""

    def load(path, name, target, report):
        found = {"model": name, "dtype": target.dtype, "group_size": target.group}
        return SimpleNamespace(weights=found, tokenizer=None, eos=())

    def open_engine(weights, config, eos):
        raise Opened(weights | asdict(config))

    monkeypatch.setattr("minilora.llm_engine.resolve_model", lambda name, report: name)
    monkeypatch.setattr("minilora.llm_engine.load_model", load)
    monkeypatch.setattr("minilora.llm_engine.Engine", open_engine)
    for name in LASTING:
        monkeypatch.setattr(name, lambda *_: None)

    def run(*arguments):
        with pytest.raises(Opened) as stop:
            main(arguments)
        return stop.value.args[0]

    return run


# Commands that open an engine, with the sizes that they choose themselves.
OPENERS = {
    ("generate", "Hello"): {},
    ("chat",): {"max_num_seqs": 1},
    ("serve", "--port", "0"): {},
    ("warmup",): {"max_num_seqs": 1},
}


@pytest.mark.parametrize(
    "command, option",
    [
        pytest.param(command, option, id=f"{command[0]}-{option.name}")
        for command in OPENERS
        for option in cli.commands[command[0]].params
        if option.name in OPENING_OPTIONS
    ],
)
def test_the_engine_gets_what_an_option_says(opened, command, option):
    """By each of the option's names; all else is as without it."""
    silent = {"model": DEFAULT_MODEL, "dtype": "auto", "group_size": 32, **asdict(EngineConfig(**OPENERS[command]))}
    assert opened(*command) == silent
    text, value = OPENING[option.name]
    assert value != silent[option.name]
    for name in option.opts:
        given = (name,) if option.is_flag else (name, text)
        assert opened(*command, *given) == {**silent, option.name: not value if option.is_flag else value}
    for name in option.secondary_opts:
        assert opened(*command, name) == {**silent, option.name: value}


def test_no_option_escapes():
    """A new option, or a new field of EngineConfig, is to have a row in a table above."""
    assert OPENING.keys() == OPENING_OPTIONS
    assert options_of(engine_options) == {field.name for field in fields(EngineConfig)} - {"threads", "debug_checks"}
    assert SAMPLING.keys() | {"max_tokens", "temperature", "seed", "stop", "system"} == options_of(sampling_options)
    for command in ("generate", "chat", "serve"):
        assert {option.name for option in cli.commands[command].params} >= OPENING_OPTIONS, command


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
    known = "give org/name, a folder or a file"
    cases = [
        (["generate", "x", "-m", "smollm2-135m"], "no model is called", "'smollm2-135m-instruct'"),
        (["generate", "x", "-m", broken], "broken.gguf", ""),
        (["generate", "x", "-m", model, "--adapter", "pirat"], "no adapter is called", "'pirate'"),
        (["generate", "x", "-m", model, "--lora", f"a={tmp_path}"], "adapter_config.json", ""),
        (["generate", "x", "-m", tmp_path], "config.json", str(broken)),
        (["show", "nothing-here"], "nothing-here", known),
        (["show", "n" * 300], "nnn", known),
        (["pull", "piratt"], "piratt", "'pirate'"),
        (["show", "telegran"], "telegran", "'telegram'"),
        (["quantize", model, broken / "below"], "File exists", ""),
    ]
    for arguments, cause, remedy in cases:
        run = minilora(*arguments)
        assert run.returncode == 1 and "Traceback" not in run.stderr and run.stdout == "", run.stderr
        # One line of each at the end, after what was reported on the way.
        lines = run.stderr.splitlines()
        said, *advice = lines[-2:] if remedy else lines[-1:]
        assert said.startswith("error: ") and cause in said and all(remedy in line for line in advice), run.stderr


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
