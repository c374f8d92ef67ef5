"""Triton's text: interpreted on the CPU, compiled ahead of time for an absent GPU, and run on a present one."""

import os
import subprocess
import sys

import pytest
import torch

from tests.kernels.formulas import PURE, averaged, hostile, lists
from torch_bp.kernels import use

pytest.importorskip("triton", reason="Triton is published for Linux and Windows only")


def run(mode, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_program", mode],
        capture_output=True,
        text=True,
        env={**clean, **environment},
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_interpreted_kernels_agree_with_torch(tmp_path):
    said = run("interpret", TRITON_INTERPRET="1", TORCH_BP_CACHE=str(tmp_path))
    assert int(said.split("interpreted")[1]) == 184


def test_every_kernel_compiles_for_sm_90(tmp_path):
    said = run("compile", TORCH_BP_CACHE=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "triton"))
    assert int(said.split("compiled")[1]) == 170


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_kernels_on_the_device(dtype):
    for formula in PURE:
        x, y = (t.cuda() for t in hostile((300, 70), dtype))
        with use("torch"):
            expected = formula(x, y)
        with use("triton"):
            assert formula.formula.by_kernel((x, y), {}) is not NotImplemented
            torch.testing.assert_close(formula(x, y), expected, equal_nan=True, rtol=1e-2, atol=1e-3)
    rows = [[t.cuda() for t in row] for row in lists(dtype)]
    expected = [[t.cuda() for t in row] for row in lists(dtype)]
    with use("torch"):
        averaged.foreach_(*expected, rate=0.1, beta=0.9)
    with use("triton"):
        averaged.foreach_(*rows, rate=0.1, beta=0.9)
    torch.testing.assert_close(rows, expected)
