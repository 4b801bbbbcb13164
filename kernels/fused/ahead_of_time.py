"""Compile every kernel for GPUs that are not here: ``python -m i2am.kernels.fused.ahead_of_time``.

One row per kernel and target, from the machine code itself. The exit status is 1 when a kernel does
not compile, spills registers, needs more shared memory than the target has, reads 16-bit operands
one by one, multiplies them without a matrix instruction, or reads a register that nothing wrote.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from i2am.kernels.fused import forward, short, statistics
from i2am.kernels.fused.configs import LONG_OWNERS, MAX_LOOPED_ROWS, MAX_ROW_BLOCK, fits_short
from i2am.kernels.fused.machine_code import undefined_registers
from i2am.kernels.fused.primitives import INTERPRETED, Launch

KIB = 1024
BATCH, HEADS, KEYS = 2, 8, 1037
SHORT_KEYS = (16, 64, 128)
SHORT, LONG = LONG_OWNERS // 2, LONG_OWNERS
HEAD_DIMS = {
    torch.bfloat16: (40, 64, 80, 128, 160, 256),
    torch.float16: (64,),
    torch.float32: (40, 160),
}
QUICK_HEAD_DIMS = {torch.bfloat16: (40,), torch.float16: (160,), torch.float32: (80,)}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Target(NamedTuple):
    """A GPU to compile for, and how much shared memory one of its programs may have."""

    gpu: GPUTarget
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 * KIB),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


class Report(NamedTuple):
    """What one compiled kernel needs, in registers per thread and bytes."""

    registers: int
    spilled: int
    shared: int
    matrix: str
    narrow: bool = False
    """Whether a load on an NVIDIA GPU reads a single number of 16 bits, and so no pipeline does."""
    undefined: tuple[str, ...] = ()
    """Instructions for compute capability 9.0 that read a register which nothing has written."""

    def problems(self, target: Target, dtype: torch.dtype) -> list[str]:
        """What makes this kernel unfit for ``target``, in words."""
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > target.shared:
            found.append(f"needs {self.shared} of {target.shared} bytes of shared memory")
        if not self.matrix and dtype.itemsize == 2:
            found.append("has no matrix instruction")
        if self.narrow:
            found.append("reads 16-bit operands one by one")
        if self.undefined:
            found.append(f"reads a register that nothing wrote: {self.undefined[0]}")
        return found


class Case(NamedTuple):
    """A kernel call as the launchers would make it, on tensors without storage."""

    name: str
    dtype: torch.dtype
    launch: Launch
    apart: bool = False
    """Whether each feature is read by itself: right is enough there, fast is not asked."""

    def problems(self, needs: Report, target: Target) -> list[str]:
        """What makes the kernel of this call unfit for ``target``, in words."""
        if self.apart:
            needs = needs._replace(spilled=0, narrow=False)
        return needs.problems(target, self.dtype)


def cases(*, quick: bool = False) -> Iterator[Case]:
    """The kernel calls that are checked: every tile shape, with and without its optional parts."""
    for dtype, sizes in (QUICK_HEAD_DIMS if quick else HEAD_DIMS).items():
        for head_dim in sizes:
            for name, plan in VARIANTS.items():
                if (not quick or name in QUICK_VARIANTS) and _is_launched(name, dtype, head_dim):
                    label = f"{TYPES[dtype]} head_dim {head_dim}: {name}"
                    yield Case(label, dtype, plan(dtype, head_dim), name.endswith(", apart"))


def compile_for(launch: Launch, gpu: GPUTarget) -> CompiledKernel:
    """Compile what ``launch`` would run, specialised the way Triton would on that GPU.

    Raises:
        RuntimeError: Triton's interpreter is on, under which nothing is compiled.
    """
    if INTERPRETED:
        raise RuntimeError("nothing is compiled under the interpreter; unset TRITON_INTERPRET")
    arguments = dict(launch.arguments)
    if gpu.backend == "hip":
        # this process knows only its own platform's choices
        arguments.pop("maxnreg", None)
        if "ROW_PRECISION" in arguments:
            arguments["ROW_PRECISION"] = "ieee"
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = arguments.pop(parameter.name)
        count = isinstance(value, int) and not parameter.do_not_specialize
        one = count and value == 1
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = _type_of(value)
        if isinstance(value, Tensor) or (count and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=gpu, options=arguments)


def report(kernel: CompiledKernel) -> Report:
    """Read a compiled kernel's needs out of its machine code."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        # scalar registers spill into lanes of vector registers, which costs no memory
        return Report(
            registers=_number(r"\.vgpr_count:\s*(\d+)", text),
            spilled=_number(r"\.private_segment_fixed_size:\s*(\d+)", text),
            shared=kernel.metadata.shared,
            matrix=_matrix(r"v_(mfma)", text),
        )
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        cuobjdump = triton.knobs.nvidia.cuobjdump.path
        command = [cuobjdump, "-res-usage", str(binary)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        undefined: tuple[str, ...] = ()
        if "wgmma" in kernel.asm["ptx"]:
            command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(binary)]
            sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            undefined = tuple(undefined_registers(sass))
    return Report(
        registers=_number(r"REG:(\d+)", usage),
        spilled=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        shared=kernel.metadata.shared,
        matrix=_matrix(r"\b(wgmma|tcgen05\.mma|mma\.sync)", kernel.asm["ptx"]),
        narrow=re.search(r"\bld\.global\S*\.[bu]16\b", kernel.asm["ptx"]) is not None,
        undefined=undefined,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, return the exit status."""
    parser = argparse.ArgumentParser(prog="i2am.kernels.fused.ahead_of_time", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="fewer kernels")
    options = parser.parse_args(arguments)
    print(f"{'target':8}{'kernel':56}{'registers':>10}{'spilled':>9}{'shared':>9}  matrix")
    failures = count = 0
    for case in cases(quick=options.quick):
        for name in options.target or TARGETS:
            count += 1
            try:
                needs = report(compile_for(case.launch, TARGETS[name].gpu))
            except Exception as error:  # whatever a compiler throws is a row of the table
                failures += 1
                print(f"{name:8}{case.name:56}does not compile: {_reason(error)}", flush=True)
                continue
            problems = case.problems(needs, TARGETS[name])
            failures += bool(problems)
            numbers = f"{needs.registers:10}{needs.spilled:9}{needs.shared:9}"
            remarks = f"  <- {', '.join(problems)}" if problems else ""
            print(f"{name:8}{case.name:56}{numbers}  {needs.matrix or '-'}{remarks}", flush=True)
    print(f"{count} kernels compiled with Triton {triton.__version__}, {failures} unfit")
    return 1 if failures else 0


def _reason(error: BaseException) -> str:
    # the outer ones only point at the call of a helper
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1]


def _is_launched(name: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether so many keys have a schedule of their own beside so many features."""
    keys = re.search(r"(\d+) keys", name)
    return keys is None or fits_short(head_dim, dtype.itemsize, int(keys[1]), MAX_LOOPED_ROWS)


def _statistics(
    dtype: torch.dtype,
    head_dim: int,
    owners: int,
    *,
    rows: int,
    groups: int = 0,
    biased: bool = False,
    apart: bool = False,
) -> Launch:
    with_sums = rows > 0
    return statistics.plan(
        _tokens(owners, head_dim, dtype, apart),
        _tokens(KEYS, head_dim, dtype, apart),
        scale=head_dim**-0.5,
        bias=_bias(owners) if biased else None,
        # many rows come as several blocks, beside which the log-sum-exp has a pass of its own; what
        # shares are normalised by is known
        lse=_fp32(BATCH, HEADS, owners) if rows < MAX_ROW_BLOCK and not groups else None,
        other_lse=_fp32(BATCH, HEADS, KEYS) if with_sums else None,
        weights=_fp32(BATCH, rows, KEYS) if with_sums else None,
        sums=_fp32(BATCH, HEADS, rows, owners) if with_sums else None,
        owner_lse=_fp32(BATCH, HEADS, owners) if groups else None,
        values=_fp32(BATCH, groups, KEYS) if groups else None,
        shares=_fp32(BATCH, HEADS, groups, owners) if groups else None,
    )


def _short(
    dtype: torch.dtype,
    head_dim: int,
    *,
    keys: int,
    kernel: str,
    rows: int = 1,
    groups: int = 0,
    biased: bool = False,
    given: bool = False,
    apart: bool = False,
) -> Launch:
    chunks, queries = short.plan(
        _tokens(LONG, head_dim, dtype, apart),
        _tokens(keys, head_dim, dtype, apart),
        scale=head_dim**-0.5,
        bias=_bias(LONG, keys) if biased else None,
        query_weights=_fp32(BATCH, rows, LONG),
        key_weights=_fp32(BATCH, rows, keys),
        r2g=_fp32(BATCH, HEADS, rows, LONG),
        g2r=_fp32(BATCH, HEADS, rows, keys),
        query_lse=_fp32(BATCH, HEADS, LONG) if given else None,
        row_lse=None if given else _fp32(BATCH, HEADS, LONG),
        key_lse=_fp32(BATCH, HEADS, keys),
        values=_fp32(BATCH, groups, keys) if groups else None,
        group_shares=_fp32(BATCH, HEADS, groups, LONG) if groups else None,
    )
    return chunks if kernel == "chunks" else queries


def _attention(
    dtype: torch.dtype, head_dim: int, *, biased: bool = False, apart: bool = False
) -> Launch:
    query, key = (_tokens(seqlen, head_dim, dtype, apart) for seqlen in (LONG, KEYS))
    return forward.plan(
        query,
        key,
        key,
        scale=head_dim**-0.5,
        bias=_bias(LONG) if biased else None,
        output=torch.empty(query.shape, dtype=dtype, device="meta"),
        lse=_fp32(BATCH, HEADS, LONG),
    )


def _tokens(seqlen: int, head_dim: int, dtype: torch.dtype, apart: bool = False) -> Tensor:
    wide = torch.empty(BATCH, seqlen, HEADS, head_dim + apart, dtype=dtype, device="meta")
    return wide[..., :head_dim].transpose(1, 2)


def _bias(owners: int, others: int = KEYS) -> Tensor:
    return _fp32(BATCH, 1, owners, others).expand(BATCH, HEADS, owners, others)


def _fp32(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _type_of(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if value < 2**31 else "i64"


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has nothing like {pattern!r}")
    return int(found[1])


def _matrix(pattern: str, text: str) -> str:
    return ", ".join(sorted(set(re.findall(pattern, text))))


VARIANTS: dict[str, Callable[[torch.dtype, int], Launch]] = {
    "lse": partial(_statistics, owners=LONG, rows=0),
    "lse, 1 row, short": partial(_statistics, owners=SHORT, rows=1),
    "lse, 1 row, long": partial(_statistics, owners=LONG, rows=1),
    f"lse, {MAX_LOOPED_ROWS} rows, short": partial(_statistics, owners=SHORT, rows=MAX_LOOPED_ROWS),
    f"lse, {MAX_LOOPED_ROWS} rows": partial(_statistics, owners=LONG, rows=MAX_LOOPED_ROWS),
    f"{MAX_ROW_BLOCK} rows": partial(_statistics, owners=LONG, rows=MAX_ROW_BLOCK),
    "lse, 1 row, bias": partial(_statistics, owners=LONG, rows=1, biased=True),
    "1 row, 1 share, short": partial(_statistics, owners=SHORT, rows=1, groups=1),
    "1 row, 1 share, long": partial(_statistics, owners=LONG, rows=1, groups=1),
    f"1 row, {MAX_LOOPED_ROWS} shares, bias": partial(
        _statistics, owners=LONG, rows=1, groups=MAX_LOOPED_ROWS, biased=True
    ),
    f"{MAX_LOOPED_ROWS} rows, {MAX_ROW_BLOCK} shares": partial(
        _statistics, owners=LONG, rows=MAX_LOOPED_ROWS, groups=MAX_ROW_BLOCK
    ),
    f"{MAX_ROW_BLOCK} shares": partial(_statistics, owners=LONG, rows=0, groups=MAX_ROW_BLOCK),
    **{
        f"{kernel}, {keys} keys": partial(_short, keys=keys, kernel=kernel)
        for keys in SHORT_KEYS
        for kernel in ("chunks", "queries")
    },
    **{
        f"queries, {keys} keys, 1 share": partial(_short, keys=keys, kernel="queries", groups=1)
        for keys in SHORT_KEYS
    },
    **{
        f"{kernel}, {keys} keys, bias, {MAX_LOOPED_ROWS} rows and shares": partial(
            _short,
            keys=keys,
            kernel=kernel,
            rows=MAX_LOOPED_ROWS,
            groups=MAX_LOOPED_ROWS,
            biased=True,
        )
        for keys in SHORT_KEYS
        for kernel in ("chunks", "queries")
    },
    "chunks, 64 keys, given lse": partial(_short, keys=64, kernel="chunks", given=True),
    "lse, 1 row, apart": partial(_statistics, owners=LONG, rows=1, apart=True),
    f"{MAX_ROW_BLOCK} rows, apart": partial(
        _statistics, owners=LONG, rows=MAX_ROW_BLOCK, apart=True
    ),
    "chunks, 64 keys, apart": partial(_short, keys=64, kernel="chunks", apart=True),
    "attention": _attention,
    "attention, apart": partial(_attention, apart=True),
    "attention, bias": partial(_attention, biased=True),
}
QUICK_VARIANTS = (
    "lse, 1 row, long",
    f"{MAX_ROW_BLOCK} rows",
    "lse, 1 row, bias",
    "1 row, 1 share, long",
    f"{MAX_ROW_BLOCK} shares",
    "chunks, 16 keys",
    "chunks, 128 keys",
    "queries, 128 keys",
    "queries, 128 keys, 1 share",
    f"{MAX_ROW_BLOCK} rows, apart",
    "attention",
    "attention, apart",
)


if __name__ == "__main__":
    sys.exit(main())
