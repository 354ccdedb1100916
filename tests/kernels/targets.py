"""Compiles the plain Triton kernels for GPUs that are not at hand.

    PYTHONPATH=. python tests/kernels/targets.py    # JSON lines: target, case, kernel, problem

The first argument takes only the cases whose name holds it, further ones only these targets. Must run without
TRITON_INTERPRET: interpreted kernels cannot be compiled.
"""

import json
import os
import sys
from collections.abc import Iterator

from triton.backends.compiler import GPUTarget

from dynconv_hf.kernels import launch
from tests.kernels import artefacts

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm89": GPUTarget("cuda", 89, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a program may have; AMD: of local data share.
SHARED_MEMORY = {"sm80": 166912, "sm89": 101376, "sm90": 232448, "gfx942": 65536}


def report(wanted: str = "", *targets: str) -> Iterator[dict]:
    """One row for each kernel of each case whose name holds `wanted`; `problem` is None where it compiles and fits."""
    for case, launcher, args in artefacts.recordable(wanted):
        for kernel, kernel_args, kwargs in artefacts.record(launcher, *args):
            for target in targets or TARGETS:
                found = problem(target, kernel, kernel_args, kwargs)
                yield {"target": target, "case": case, "kernel": kernel.fn.__name__, "problem": found}


def problem(target: str, kernel, args: tuple, kwargs: dict) -> str | None:
    try:
        compiled = artefacts.compile_for(TARGETS[target], kernel, args, kwargs)
    # Whatever a compiler raises is what this is to find.
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    if compiled.metadata.shared > SHARED_MEMORY[target]:
        return f"{compiled.metadata.shared} bytes of shared memory"
    return None


if __name__ == "__main__":
    if launch.INTERPRETED:
        raise SystemExit(f"TRITON_INTERPRET is {os.environ['TRITON_INTERPRET']!r}: unset it")
    for row in report(*sys.argv[1:]):
        print(json.dumps(row), flush=True)
