"""Compile every kernel for another CPU and count instructions, to see that it lowers and uses the dot product there.

    python tools/cross.py aarch64-unknown-linux-gnu neoverse-n1 +neon,+dotprod,+fullfp16 [--assembly FOLDER]

Prints one JSON document: the CPU's family, and for each case how often instructions that begin with these names occur.
Nothing is run.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from llvmlite import binding
from llvmlite.binding.newpassmanagers import create_pass_builder, create_pipeline_tuning_options
from numba import typeof

from minilora_kernels import cpu

COUNTED = ("sdot", "usdot", "fmla", "smlal", "vpdpbusd", "vdpbf16ps", "vpmaddubsw", "vfmadd")


def pretend(triple: str, name: str, features: str) -> None:
    """Make kernels lower for this CPU."""
    known = frozenset(feature[1:] for feature in features.split(",") if feature.startswith("+"))
    cpu.target = lambda: (triple, name, known)  # type: ignore[assignment]
    for answer in vars(cpu).values():
        if hasattr(answer, "cache_clear"):
            answer.cache_clear()


def target_machine(triple: str, name: str, features: str):
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    return binding.Target.from_triple(triple).create_target_machine(cpu=name, features=features, opt=3)


def whole_module(kernel, arguments, triple: str, machine):
    """The kernel and all that it calls as one optimised module for the target."""
    from minilora_kernels.jit import _closure

    signature = tuple(typeof(argument) for argument in arguments)
    kernel.compile(signature)
    [result] = [r for args, r in kernel.overloads.items()][-1:]
    own, *others = [result.library, *_closure(result.library._linking_libraries)]
    module = own._final_module.clone()
    for library in others:
        module.link_in(library._final_module, preserve=True)
    module.triple, module.data_layout = triple, str(machine.target_data)
    for function in module.functions:
        if not function.is_declaration and function.name != result.fndesc.mangled_name:
            function.linkage = "internal"
    builder = create_pass_builder(machine, create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("triple", help="LLVM's target triple")
    parser.add_argument("cpu", help="LLVM's name of the CPU")
    parser.add_argument("features", help="LLVM's features, comma-separated, each with + or -")
    parser.add_argument("--assembly", type=Path, metavar="FOLDER", help="write each case's assembly there")
    options = parser.parse_args()
    pretend(options.triple, options.cpu, options.features)
    from minilora_kernels.cases import CASES

    machine = target_machine(options.triple, options.cpu, options.features)
    found = {}
    for case in CASES:
        arguments = case.make(np.random.default_rng(0), case.small[0])
        text = machine.emit_assembly(whole_module(case.kernel, arguments, options.triple, machine))
        words = Counter(re.findall(r"^\s+([a-z0-9.]+)\s", text, re.MULTILINE))
        found[case.name] = {word: sum(n for w, n in words.items() if w.startswith(word)) for word in COUNTED}
        if options.assembly:
            options.assembly.mkdir(parents=True, exist_ok=True)
            (options.assembly / f"{case.name}.s").write_text(text)
    print(json.dumps({"family": cpu.family(), "cases": found}))


if __name__ == "__main__":
    main()
