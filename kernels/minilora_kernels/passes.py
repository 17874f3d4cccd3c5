"""The passes of Numba's compiler that kernels need, and a memory for the one that takes longest.

Kernels are plain loops over numbers, tuples and arrays. What Numba does for closures, `with`, list comprehensions,
whole-array expressions and inlined overloads would find nothing in them; looking for it takes nearly a tenth of the
compile time.
"""

from typing import Any

from numba.core import types
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.typed_passes import (
    IRLegalization,
    NativeLowering,
    NoPythonBackend,
    NoPythonSupportedFeatureValidation,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.typing import Signature
from numba.core.untyped_passes import (
    DeadBranchPrune,
    FixupArgs,
    GenericRewrites,
    IRProcessing,
    ReconstructSSA,
    RewriteSemanticConstants,
    TranslateByteCode,
)


class _Remembering:
    """A typing context that remembers what it found for calls of operators, built-in functions and intrinsics.

    To find it, Numba tries one overload after the other, each time anew: a sixth of the time to compile a step.
    """

    _found: dict[tuple, Signature] = {}

    def __init__(self, context: Any):
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def resolve_function_type(self, function: Any, args: tuple, kws: dict) -> Signature | None:
        """The signature of a call, None where there is none. Raises Numba's TypingError."""
        # Others, kernels above all, are compiled by being looked up: Numba remembers these itself.
        if isinstance(function, types.Type) and not isinstance(function, types.Function):
            return self._context.resolve_function_type(function, args, kws)
        call = function, args, *sorted(kws.items())
        if call not in self._found:
            found = self._context.resolve_function_type(function, args, kws)
            if found is None:
                return None
            self._found[call] = found
        return self._found[call]


@register_pass(mutates_CFG=True, analysis_only=False)
class _Inference(NopythonTypeInference):
    def run_pass(self, state):
        context = state.typingctx
        state.typingctx = _Remembering(context)
        try:
            return super().run_pass(state)
        finally:
            state.typingctx = context


# In Numba's order.
_PASSES = (
    TranslateByteCode,
    FixupArgs,
    IRProcessing,
    RewriteSemanticConstants,
    DeadBranchPrune,
    GenericRewrites,
    ReconstructSSA,
    _Inference,
    PreLowerStripPhis,
    NoPythonSupportedFeatureValidation,
    IRLegalization,
    NativeLowering,
    NoPythonBackend,
)


class KernelCompiler(CompilerBase):
    """Numba's compiler with these passes only."""

    def define_pipelines(self):
        """The passes, as Numba asks for them."""
        manager = PassManager("kernel")
        for each in _PASSES:
            manager.add_pass(each, each.__name__)
        manager.finalize()
        return [manager]
