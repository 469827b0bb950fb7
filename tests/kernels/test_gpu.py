"""Triton decides at import whether its kernels are interpreted, so their cases run in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU bodies are written in Triton")

CASES = Path(__file__).with_name("gpu_cases.py")


def test_the_gpu_bodies_keep_their_promises():
    env = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    if run.returncode:
        pytest.fail(run.stdout + run.stderr, pytrace=False)


PAIR_LISTS = {"rows": "*i64", "columns": "*i64", "offsets": "*i64", "row_ends": "*i64", "groups": "*i64"}
SUMS = {**PAIR_LISTS, "values": "*fp32", "x": "*bf16", "table": "*bf16", "partial": "*fp32", "d": "i32", "p": "i32"}
SCORES = {**PAIR_LISTS, "scores": "*bf16", "maxima": "*i16", "keys": "*i16", "m": "i32", "n_groups": "i32", "k": "i32"}
SIZES = {"PAIRS": 16, "SEGMENT": 256, "BLOCK": 256, "GROUP": 16, "TOP": 2**15 - 1, "SIGNED": True}


@pytest.mark.parametrize(
    ("kernel", "types"),
    [
        ("_whole_segments", SUMS),
        ("_rows", {**SUMS, "out": "*bf16"}),
        ("_dots", {**SUMS, "out": "*fp32"}),
        ("_group_maxima", SCORES),
        ("_members", SCORES),
    ],
)
def test_kernels_compile_for_a_gpu_that_is_not_here(kernel, types, monkeypatch, tmp_path):
    """The interpreter takes much that the compiler does not."""
    import triton
    from triton.backends.compiler import GPUTarget

    from mmsae.kernels import gpu

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(gpu, kernel)
    sizes = {**SIZES, "ACC": triton.language.float32, "KEY": triton.language.int16}
    constants = {name: sizes[name] for name in function.arg_names if name in sizes}
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    source = triton.compiler.ASTSource(function, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=gpu.LAUNCH)
    assert compiled.asm["cubin"]
