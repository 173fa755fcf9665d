"""Every kernel compiles for the GPUs it is meant for, on a machine that has none.

Each compile_cases_<op>.py names its kernels and how they are called: CASES, a list of (kernel, types of the
arguments, constants, warps), with the least compute capability at the end where it is more than 8.0. Among
the constants may be the option num_stages. They are compiled in a process of their own, as TRITON_INTERPRET
changes what a kernel is:

    python tests/kernels/test_compile_gpu_targets.py CASES_FILE CAPABILITY
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

FILES = sorted(Path(__file__).parent.glob("compile_cases_*.py"))
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes that one program can have
REGISTERS = 1 << 16  # of a multiprocessor
# Bytes a thread that registers may spill into: a few values, kept for after the loop.
STACK = 256


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("compile_cases_"))
def test_kernels_compile_within_limits(file: Path, capability: int) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-P", __file__, str(file), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert results
    for result in results:
        assert result["shared"] <= SHARED_MEMORY[capability], result
        assert result["registers"] * 32 * result["warps"] <= REGISTERS, result
        assert result["stack"] <= STACK, result


def compile_case(
    capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int
) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    stages = constants.pop("num_stages", None)
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    # PyTorch's allocations begin at multiples of 16 bytes, and strides are multiples of 16 for the usual
    # widths; a call tells the compiler so.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (parameter, kind) in enumerate(zip(kernel.params, signature.values(), strict=True))
        if kind.startswith("*")
        or (kind.startswith("i") and parameter.name.startswith("stride_") and not parameter.do_not_specialize)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps}
    if stages is not None:
        options["num_stages"] = stages
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout)[-1]
    return {
        "kernel": kernel.__name__,
        "constants": {name: str(value) for name, value in constants.items()},
        "warps": warps,
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
    }


def main() -> None:
    file, capability = Path(sys.argv[1]), int(sys.argv[2])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for kernel, types, constants, warps, *least in module.CASES:
        if capability >= max(least, default=0):
            print(json.dumps(compile_case(capability, kernel, types, constants, warps)))


if __name__ == "__main__":
    main()
