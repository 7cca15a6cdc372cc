"""The Triton kernels: in the interpreter against the plain path, and compiled for the GPUs they are for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: kernels are not tested (requirements-dev.txt)")
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_kernels_compute_what_the_plain_path_computes():
    """tests/interpreted_kernels.py in a process of its own: Triton is told when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/interpreted_kernels.py"],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets here and does not compile")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from lota.optim import kernels

    return kernels


def assembly(kernel, constants, **types):
    """Assembly for an H100 or H200. It needs no GPU: ptxas comes with Triton."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types if name != "tokens"},
    )
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, long", [(torch.float32, True), (torch.bfloat16, False)])
def test_updates_compile_for_hopper(kernels, dtype, long):
    dtype = kernels.DTYPES[dtype]
    for mode in (kernels.ALL, kernels.ENTRIES, kernels.TILES):
        common = {"DTYPE": dtype, "MODE": mode.value, "LONG": long, "BLOCK": kernels.BLOCK}
        tables = {"table": "*i64", "partials": "*fp32", "slots": "i32"}
        assert "ld.global" in assembly(kernels._gather_kernel, common | {"STORE": True}, **tables)
    for rule in ("RMSPROP", "RMSPROP_MOMENTUM", "ADAMW", "SGD", "SGD_MOMENTUM"):
        tables = {"table": "*i64", "numbers": "*fp32", "squares": "*fp32", "square_stride": "i32"}
        constants = common | {"RULE": getattr(kernels, rule).value}
        assert "st.global" in assembly(kernels._update_kernel, constants, **tables)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_products_of_blocks_compile_for_hopper(kernels, dtype):
    """In bf16 they use the tensor cores of that generation, and load ahead."""
    types = {"a": "*" + dtype, "b": "*" + dtype, "blocks": "*i64", "out": "*fp32", "tokens": "i32"}
    strides = {"a_token": "i64", "b_token": "i64"}
    constants = {
        "TALL": 64, "WIDE": 64, "ACROSS": 1, "TOKENS": 32 if dtype == "fp32" else 64, "ALIGN": 16,
        "PRECISION": "ieee", "a_column": 1, "b_column": 1,
    }  # fmt: skip
    ptx = assembly(kernels._blocks_kernel, constants, **types, **strides)
    assert "cp.async" in ptx
    assert ("wgmma.mma_async" in ptx) == (dtype != "fp32")


def test_triton_beside_a_cpu_build_changes_nothing_for_torch_compile():
    from torch.utils._triton import has_triton

    assert has_triton() == torch.cuda.is_available()
