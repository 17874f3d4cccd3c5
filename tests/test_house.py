"""House rules: layers, twins, what may be imported, public names, and that README tells the truth."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minilora
from minilora_kernels import attention, cases, convert, linear, lora, pages, pointwise, quantize_rows, reference, sample
from minilora_kernels.jit import Kernel

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "minilora_kernels"

# A module imports from its own row and lower ones only.
LAYERS = [
    {"minilora_kernels"},
    {
        "errors",
        "files",
        "memory",
        "patterns",
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
    {"plan", "weights", "packer", "packed", "numa", "tables"},
    {"adapters", "peft", "adapter_pool", "registry", "cache", "batch", "sequence"},
    {"model", "reference", "sampler", "runner", "crew", "pace", "stats"},
    {"fairness", "scheduler", "asked", "bounds", "step_guard", "engine"},
    {"outputs", "llm_engine", "llm", "async_engine", "plain", "inspect"},
    {"server"},
    {"cli", "__main__"},
]


def row_of(name):
    return next(i for i, row in enumerate(LAYERS) if name in row)


def imported(path, package):
    """(module of minilora or of its kernels) for every import at the top of a file."""
    depth = len(path.relative_to(ROOT / "minilora").parts)
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            above = depth - node.level
            parts = (node.module or "").split(".") if node.module else [alias.name for alias in node.names]
            if above <= 0:
                yield parts[0]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minilora"):
            yield (node.module or "").split(".")[0] if "kernels" in (node.module or "") else node.module.split(".")[1]


@pytest.mark.parametrize("path", sorted((ROOT / "minilora").rglob("*.py")), ids=lambda path: path.stem)
def test_layers(path):
    module = path.relative_to(ROOT / "minilora").parts[0].removesuffix(".py")
    if module == "__init__":
        return
    for name in imported(path, module):
        if name != "__version__":
            assert row_of(name) <= row_of(module), f"{module} imports {name}"


def test_kernels_import_nothing_else():
    allowed = {"numpy", "numba", "llvmlite", *sys.stdlib_module_names}
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert all(name.split(".")[0] in allowed for name in names), (path.name, names)


def test_the_scheduler_has_no_arrays():
    assert "numpy" not in (ROOT / "minilora" / "scheduler.py").read_text()


FORBIDDEN = {"pickle", "marshal", "shelve", "cloudpickle", "dill", "yaml", "joblib"}


def test_s4_no_pickle_nothing_runs_code_from_files():
    """No pickle but Numba's own machine code, which lies in a private folder; no eval, no exec."""
    for path in [*(ROOT / "minilora").rglob("*.py"), *KERNELS.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                {alias.name.split(".")[0] for alias in node.names}
                if isinstance(node, ast.Import | ast.ImportFrom)
                else set()
            )
            names |= {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
            assert not names & FORBIDDEN or path.name == "jit.py", path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), path


def test_s9_no_check_depends_on_assert():
    """python -O drops asserts: none stands for a check of input."""
    for path in [*(ROOT / "minilora").rglob("*.py"), *KERNELS.rglob("*.py")]:
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


def test_functions_stay_short():
    """Nobody has to hold more than a screen in mind."""
    for path in [*(ROOT / "minilora").rglob("*.py"), *KERNELS.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not any(isinstance(n, ast.FunctionDef) for n in node.body):
                assert node.end_lineno - node.lineno < 75, f"{path.name}: {node.name}"


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
