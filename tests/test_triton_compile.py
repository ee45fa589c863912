"""Every Triton kernel compiles for the GPUs people have, without one at hand, and spills no registers on Hopper."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs triton: pip install triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pact_fast.kernels import fingerprint_triton  # noqa: E402
from pact_fast.kernels.head import softmax_triton  # noqa: E402
from pact_fast.model.attention import merge_triton  # noqa: E402

pytestmark = pytest.mark.slow

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def variants(module=softmax_triton):
    found = []
    for kernel, signature, constexprs, num_warps in module.specialisations():
        if isinstance(kernel, triton.JITFunction):  # not so under TRITON_INTERPRET
            known = "-".join(f"{name}={value}" for name, value in constexprs.items() if name != "VOCAB")
            label = f"{kernel.__name__}-{signature.get('out', signature.get('part', ''))}-{known}".replace("*", "")
            found.append(pytest.param(kernel, signature, constexprs, num_warps, id=label))
    return found


def compiled(capability, kernel, signature, constexprs, num_warps):
    names = list(signature)
    # As a launch finds them: pointers aligned to 16 bytes and strides that are multiples of 16
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] != "constexpr"}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constexprs.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})


def resources(binary, folder: Path) -> dict[str, int]:
    """Registers and memory of a cubin; registers that spill go to the stack frame, and there are none."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    print(usage, f"shared memory {binary.metadata.shared}")
    assert usage["STACK"] == usage["LOCAL"] == 0
    return usage


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("kernel", "signature", "constexprs", "num_warps"), variants(merge_triton))
def test_merge_of_partial_attention(kernel, signature, constexprs, num_warps, capability, tmp_path):
    binary = compiled(capability, kernel, signature, constexprs, num_warps)
    assert resources(binary, tmp_path)["REG"] <= 64


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("kernel", "signature", "constexprs", "num_warps"), variants(fingerprint_triton))
def test_fingerprints(kernel, signature, constexprs, num_warps, capability, tmp_path):
    binary = compiled(capability, kernel, signature, constexprs, num_warps)
    assert resources(binary, tmp_path)["REG"] <= 128  # 2 programs of 8 warps on a multiprocessor


@pytest.mark.parametrize(("kernel", "signature", "constexprs", "num_warps"), variants())
def test_hopper_without_spills(kernel, signature, constexprs, num_warps, tmp_path):
    binary = compiled(90, kernel, signature, constexprs, num_warps)
    usage = resources(binary, tmp_path)
    # 4 programs of 8 warps fit on a multiprocessor, enough to keep its memory busy; 3 for a Jensen–Shannon divergence,
    # which computes more than it reads
    assert usage["REG"] <= (80 if constexprs.get("KIND") == "jsd" else 64)
    # 16 bytes per thread and access, in whole tiles and in the rest
    tiles = 2 * softmax_triton.DEPTH.value
    assert binary.asm["ptx"].count("ld.global.v4.b32") >= tiles


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize(("kernel", "signature", "constexprs", "num_warps"), variants())
def test_other_architectures(kernel, signature, constexprs, num_warps, capability):
    assert compiled(capability, kernel, signature, constexprs, num_warps).asm["cubin"]
