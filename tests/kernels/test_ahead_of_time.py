"""Every kernel compiles for GPUs that are not here, each time in a process without interpreter."""

import os
import subprocess
import sys

import pytest
import torch


def run(*command, **environment):
    """A fresh Python without Triton's interpreter: its completed process."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], env=clean | environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_kernels_fit_all_targets():
    done = run("-m", "i2am.kernels.fused.ahead_of_time", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows, summary = done.stdout.splitlines()
    assert header.split() == ["target", "kernel", "registers", "spilled", "shared", "matrix"]
    targets = [row.split()[0] for row in rows]
    assert {name: targets.count(name) for name in targets} == dict.fromkeys(
        ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"), len(rows) // 7
    )
    # which matrix instruction each architecture multiplies bf16 with
    expected = dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), "mma.sync")
    expected |= {"sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "mfma"}
    for row in rows:
        target, dtype, *_, matrix = row.split()
        registers, spilled, shared = (int(number) for number in row.split()[-4:-1])
        assert 16 < registers <= 512
        # features that are read one by one need not be fast
        assert spilled == 0 or ", apart" in row
        assert 0 < shared < 227 * 1024
        assert dtype == "fp32" or matrix == expected[target]
    assert summary.startswith(f"{len(rows)} kernels compiled with Triton ")
    assert summary.endswith(" 0 unfit")


@pytest.mark.slow
def test_what_does_not_fit_is_named_and_fails():
    """The same command on a tile shape that is too large, and on a kernel that cannot compile."""
    code = """
import sys, torch
from i2am.kernels.fused import ahead_of_time, configs
from i2am.kernels.fused.configs import Tile
configs.TILES["forward, long"] = Tile(256, 256, num_warps=4, num_stages=3)
configs.TILES["statistics, long"] = Tile(128, 48, num_warps=4, num_stages=1)
ahead_of_time.HEAD_DIMS = {torch.float16: (128,)}
for name in list(ahead_of_time.VARIANTS):
    if name not in ("attention", "lse"):
        del ahead_of_time.VARIANTS[name]
sys.exit(ahead_of_time.main(["--target", "sm_80"]))
"""
    done = run("-c", code)
    assert done.returncode == 1, done.stdout + done.stderr
    _, invalid, large, summary = done.stdout.splitlines()
    assert "lse" in invalid
    assert "does not compile: " in invalid
    assert "power of 2" in invalid
    assert "bytes of shared memory" in large
    assert "spills" in large
    assert summary.endswith(" 2 unfit")


@pytest.mark.slow
def test_edges_compile():
    """Sizes of 1 become constants, strides beyond 32 bits become int64: other code than usual."""
    code = """
import torch
from i2am.kernels.fused import ahead_of_time as aot, forward, short, statistics
one = torch.empty(1, 1, 1, 40, dtype=torch.bfloat16, device="meta")
far = one.as_strided((1, 1, 1, 40), (2**40, 2**36, 2**33, 1))
lse, sums = torch.empty(1, 1, 1, device="meta"), torch.empty(1, 1, 1, 1, device="meta")
shared = {"scale": 1.0, "bias": torch.empty(1, 1, 1, 1, device="meta")}
both = {"query_weights": lse, "key_weights": lse, "r2g": sums, "g2r": sums, "key_lse": lse}
weights = {"other_lse": lse, "weights": lse, "sums": sums}
for x in (one, far):
    for launch in (
        statistics.plan(x, x, lse=lse, **weights, **shared),
        statistics.plan(x, x, **weights, **shared),
        forward.plan(x, x, x, output=one, lse=lse, **shared),
        *short.plan(x, x, query_lse=None, row_lse=lse, **both, **shared),
        *short.plan(x, x, query_lse=lse, row_lse=None, **both, **shared),
    ):
        for name in ("sm_90", "gfx942"):
            compiled = aot.compile_for(launch, aot.TARGETS[name].gpu)
            assert not aot.report(compiled).problems(aot.TARGETS[name], torch.bfloat16)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_any_number_of_features_is_read_ahead_16_bytes_at_a_time():
    """A multiple of 8 is enough: 40 and 72 leave strides that 16 does not divide."""
    code = """
import torch
from i2am.kernels.fused import ahead_of_time as aot, statistics
def loads(head_dim, layout, offset=0):
    def tokens(seqlen):
        sizes = (2, seqlen, 8, head_dim + offset) if layout == "bshd" else (2, 8, seqlen, head_dim)
        x = torch.empty(sizes, dtype=torch.bfloat16, device="meta")[..., :head_dim]
        return x.transpose(1, 2) if layout == "bshd" else x
    weights = {"other_lse": torch.empty(2, 8, 3072, device="meta"),
               "weights": torch.empty(2, 1, 3072, device="meta"),
               "sums": torch.empty(2, 8, 1, 1037, device="meta")}
    launch = statistics.plan(tokens(1037), tokens(3072), scale=1.0, bias=None, **weights)
    kernel = aot.compile_for(launch, aot.TARGETS["sm_90"].gpu)
    return aot.report(kernel).narrow, kernel.asm["ptx"].count("cp.async.cg.shared.global")
for head_dim, layout in ((40, "bshd"), (40, "bhsd"), (72, "bshd"), (72, "bhsd")):
    narrow, ahead = loads(head_dim, layout)
    assert not narrow, (head_dim, layout)
    assert ahead, (head_dim, layout)
assert loads(40, "bshd", offset=1) == (True, 0)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_what_is_launched_is_compiled():
    """Beyond 192 features in 16 bits one tile holds 64 keys: more of them go another way."""
    from i2am.kernels.fused import ahead_of_time

    names = [case.name for case in ahead_of_time.cases()]
    assert "bf16 head_dim 160: chunks, 128 keys, bias, 4 rows and shares" in names
    assert "bf16 head_dim 256: chunks, 64 keys, bias, 4 rows and shares" in names
    assert not [name for name in names if "head_dim 256" in name and "128 keys" in name]


def test_nothing_is_compiled_under_the_interpreter():
    code = """
from i2am.kernels.fused import ahead_of_time as aot
case = next(aot.cases())
try:
    aot.compile_for(case.launch, aot.TARGETS["sm_90"].gpu)
except RuntimeError as error:
    print(error)
"""
    done = run("-c", code, TRITON_INTERPRET="1")
    expected = "nothing is compiled under the interpreter; unset TRITON_INTERPRET\n"
    assert done.stdout == expected, done.stderr


@pytest.mark.parametrize(
    ("needs", "dtype", "problems"),
    [
        ((128, 0, 65536, "mfma"), torch.float16, []),
        ((128, 0, 65536, ""), torch.float32, []),
        ((128, 8, 0, "mfma"), torch.float16, ["spills 8 bytes"]),
        (
            (128, 0, 65537, "mfma"),
            torch.bfloat16,
            ["needs 65537 of 65536 bytes of shared memory"],
        ),
        ((128, 0, 0, ""), torch.bfloat16, ["has no matrix instruction"]),
        ((128, 0, 0, "mfma", True), torch.float16, ["reads 16-bit operands one by one"]),
        (
            (128, 0, 0, "mfma", False, ("UMOV UR4, UR6",)),
            torch.float16,
            ["reads a register that nothing wrote: UMOV UR4, UR6"],
        ),
    ],
    ids=["fits", "fp32", "spill", "shared memory", "matrix", "narrow loads", "undefined"],
)
def test_problems_are_found(needs, dtype, problems):
    from i2am.kernels.fused.ahead_of_time import TARGETS, Report

    assert Report(*needs).problems(TARGETS["gfx942"], dtype) == problems


def test_features_read_apart_need_not_be_fast():
    from i2am.kernels.fused.ahead_of_time import TARGETS, Case, Report

    needs = Report(128, 8, 65537, "mfma", True, ("UMOV UR4, UR6",))
    case = Case("attention, apart", torch.float16, None, apart=True)
    assert case.problems(needs, TARGETS["gfx942"]) == [
        "needs 65537 of 65536 bytes of shared memory",
        "reads a register that nothing wrote: UMOV UR4, UR6",
    ]


def test_numbers_that_the_compiler_no_longer_prints_are_missed():
    from i2am.kernels.fused import ahead_of_time

    with pytest.raises(ValueError, match="the compiler's output has nothing like 'REG"):
        ahead_of_time._number(r"REG:(\d+)", "no such line")
