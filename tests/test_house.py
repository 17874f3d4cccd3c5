"""House rules: layers, twins, what may be imported, public names, and that README tells the truth."""

import ast
import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import minilora
from minilora_kernels import attention, cases, convert, linear, lora, pages, pointwise, quantize_rows, reference, sample
from minilora_kernels.jit import Kernel

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
KERNELS = ROOT / "kernels" / "minilora_kernels"

# A module imports from its own row and lower ones only.
LAYERS = [
    {"minilora_kernels"},
    {
        "errors",
        "files",
        "memory",
        "patterns",
        "progress",
        "rope",
        "config",
        "config_keys",
        "lookup",
        "interrupts",
        "params",
        "tokenizer",
        "tokenizer_gguf",
        "sandbox",
        "chat",
        "checkpoint",
    },
    {"plan", "weights", "packer", "packed", "loading", "numa", "tables"},
    {"adapters", "peft", "adapter_pool", "registry", "cache", "batch", "sequence"},
    {"model", "reference", "sampler", "runner", "thread_count", "pace", "stats"},
    {"fairness", "scheduler", "step_inputs", "step_results", "bounds", "step_guard", "engine"},
    {"outputs", "llm_engine", "llm", "async_engine", "plain", "describing"},
    {"server"},
    {"cli", "__main__"},
]


def row_of(name):
    return next(i for i, row in enumerate(LAYERS) if name in row)


PATHS = [*(ROOT / "minilora").rglob("*.py"), *KERNELS.rglob("*.py")]


def dotted(path):
    source = KERNELS.parent if KERNELS in path.parents else ROOT
    return ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in PATHS}


def imported(name):
    """The full names of what a module imports: at its top, in functions, or for types only."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{source}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("minilora.")))
def test_layers(name):
    module = name.split(".")[1]
    for other in imported(name):
        top, *below = other.split(".")
        if top in ("minilora", "minilora_kernels") and other != "minilora.__version__":
            assert row_of(below[0] if top == "minilora" else top) <= row_of(module), f"{name} imports {other}"


def test_layers_name_what_there_is():
    tops = {name.split(".")[1] for name in MODULES if name.startswith("minilora.")}
    assert sorted(name for row in LAYERS for name in row) == sorted({"minilora_kernels", *tops})


def test_no_imports_in_circles():
    """Not even late ones. The CycleError names the modules."""
    graph = {name: set(imported(name)) for name in MODULES}
    for others in graph.values():
        # What is no module is a name in one.
        others |= {other.rpartition(".")[0] for other in others - MODULES.keys()}
        others &= MODULES.keys()
    assert graph["minilora.cli.generate"] >= {"minilora.errors", "minilora.llm"}
    TopologicalSorter(graph).prepare()


def test_kernels_import_nothing_else():
    allowed = {"minilora_kernels", "numpy", "numba", "llvmlite", *sys.stdlib_module_names}
    for name in MODULES:
        if name.startswith("minilora_kernels"):
            assert {other.split(".")[0] for other in imported(name)} <= allowed, name


def test_the_scheduler_has_no_arrays_and_no_clock():
    assert not {"numpy", "time", "datetime"} & {name.split(".")[0] for name in imported("minilora.scheduler")}


FORBIDDEN = {"pickle", "marshal", "shelve", "cloudpickle", "dill", "yaml", "joblib"}


def test_s4_no_pickle_nothing_runs_code_from_files():
    """No pickle but Numba's own machine code, which lies in a private folder; no eval, no exec."""
    for name, path in MODULES.items():
        assert name == "minilora_kernels.jit" or not {other.split(".")[0] for other in imported(name)} & FORBIDDEN, name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), path


def test_s9_no_check_depends_on_assert():
    """python -O drops asserts: none stands for a check of input."""
    for path in PATHS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                assert ast.unparse(node.test).startswith("isinstance("), f"{path.name}:{node.lineno}"


def public_kernels():
    for module in (linear, lora, pointwise, quantize_rows, attention, sample, convert):
        for name, value in vars(module).items():
            if isinstance(value, Kernel) and not name.startswith("_") and value.py_func.__module__ == module.__name__:
                yield name, value


def test_every_kernel_has_a_twin_of_the_same_signature():
    kernels = dict(public_kernels())
    kernels["linear"] = linear.make_linear((0,))
    kernels |= zip(("write_key", "write_value"), pages.make_write(0), strict=True)
    kernels |= zip(("attend", "attend_part"), attention.make_attention(0), strict=True)
    twins = vars(reference)
    pairs = [(kernels[name], twins[name]) for name in kernels]
    pairs += list(zip(lora.make_lora(0), reference.make_lora("float32"), strict=True))
    for mine, theirs in pairs:
        assert list(inspect.signature(mine.py_func).parameters) == list(inspect.signature(theirs).parameters), (
            theirs.__name__
        )
        assert (mine.py_func.__doc__ and theirs.__doc__) or theirs.__qualname__.startswith("make_lora"), theirs.__name__
    tested = {case.name.split()[0] for case in cases.CASES}
    assert set(kernels) <= tested, set(kernels) - tested


def test_public_names():
    assert all(getattr(minilora, name) for name in minilora.__all__)
    with pytest.raises(AttributeError):
        _ = minilora.nothing


def test_the_package_does_not_shadow_kernels():
    """The folder kernels is a source root, never a package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def lines_of(function):
    return function.end_lineno - min(node.lineno for node in (function, *function.decorator_list)) + 1


def functions_in(node):
    """The functions within a node, those within them left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTION):
            yield child
        else:
            yield from functions_in(child)


def test_functions_stay_short():
    """Nobody has to hold more than a screen in mind: what functions within a function do counts as theirs."""
    for path in PATHS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, FUNCTION):
                own = lines_of(node) - sum(map(lines_of, functions_in(node)))
                assert own <= 75, f"{path.name}: {node.name} has {own} lines"


def test_known_failures_have_tests():
    """The codes in names of tests are those in the list, whose tests there are."""
    covering = {
        f"{path.relative_to(TESTS).as_posix()}::{node.name}": set(match[1].upper().split("_"))
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, FUNCTION) and (match := re.match(r"test_((?:[sl]\d+_)*[sl]\d+)_", node.name))
    }
    rows = re.findall(r"^\| (\w\d+) \|.*\| (.+) \|$", (TESTS / "KNOWN_FAILURES.md").read_text(), re.MULTILINE)
    codes = [code for code, _ in rows]
    assert len(codes) == len(set(codes)) and set(codes) == set.union(*covering.values())
    for code, tests in rows:
        assert re.fullmatch(r"`[^`]+`(, `[^`]+`)*", tests)
        for test in re.findall("`([^`]+)`", tests):
            assert code in covering.get(test, ()), f"{code}: {test}"


def test_readme_architectures_and_endpoints():
    from minilora.config import ARCHITECTURES

    text = (ROOT / "README.md").read_text()
    assert all(name in text for name in ARCHITECTURES)
    for path in (ROOT / "minilora" / "server").glob("*.py"):
        for method, route in re.findall(r'@router\.(get|post)\("([^"]+)"', path.read_text()):
            route = re.sub("{([a-z]+):path}", r"{\1}", route)
            assert f"`{method.upper()} {route}`" in text or route.startswith("/page/"), f"README has no {route}"


def test_importing_is_quick_to_start():
    """`import minilora` loads nothing heavy."""
    code = "import sys, minilora; print([m for m in ('numpy', 'numba', 'tokenizers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_readme_shows_the_last_results():
    subprocess.run([sys.executable, ROOT / "tools" / "readme.py", "--check"], check=True)
