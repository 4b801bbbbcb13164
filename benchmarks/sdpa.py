"""What a GPU can do at most, and which attention PyTorch takes on it for a shape.

The recorder wants the log-sum-exp of the very call that the model makes. Each backend has an
operator that returns it; whether that operator gives PyTorch's own output to the bit is measured.
"""

import csv
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import LeftOut, Settings, seconds
from shapes import AttentionShape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from i2am.kernels import attention
from i2am.testing import make_qkv

COUNTERS = {
    "issue_active_pct": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "exponential_unit_pct": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "tensor_pct": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "l2_bytes_per_s": "lts__t_bytes.sum.per_second",
    "warps_active_pct": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "nanoseconds": "gpu__time_duration.sum",
}
OPERATORS: dict[SDPBackend, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    SDPBackend.FLASH_ATTENTION: lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, False
    ),
    SDPBackend.CUDNN_ATTENTION: lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True
    ),
    SDPBackend.EFFICIENT_ATTENTION: lambda q, k, v: (
        torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    ),
}


def ceilings(settings: Settings) -> dict[str, Any]:
    """Bytes per second of a copy, read and written, and operations per second of a product.

    Raises:
        LeftOut: There is no GPU.
    """
    if not settings.on_gpu:
        raise LeftOut("only those of a GPU are measured")
    device = settings.device
    large = torch.empty(2**31, dtype=torch.uint8, device=device)
    other = torch.empty_like(large)
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)

    def copy() -> Any:
        return other.copy_(large)

    def multiply() -> Any:
        return matrix @ matrix

    for call in (copy, multiply):
        seconds(call, 3, device)
    return {
        "copy_bytes_per_s": float(f"{2 * large.nbytes / seconds(copy, 20, device):.4g}"),
        "bf16_operations_per_s": float(f"{2 * 8192**3 / seconds(multiply, 20, device):.4g}"),
    }


def backends(shape: AttentionShape, settings: Settings) -> dict[str, Any]:
    """Which backend PyTorch takes for a shape, and what each one's operator gives beside it."""
    size = (settings.batch, shape.heads, shape.seqlen_q, shape.seqlen_k, shape.head_dim)
    qkv = make_qkv(*size, dtype=settings.dtype, device=settings.device)
    mask = torch.zeros(shape.seqlen_k, dtype=settings.dtype, device=settings.device)
    plain = F.scaled_dot_product_attention(*qkv)
    found: dict[str, Any] = {
        "chosen": _name(torch._fused_sdp_choice(*qkv)),
        "chosen_with_mask": _name(torch._fused_sdp_choice(*qkv, mask.expand(1, 1, *size[2:4]))),
    }
    if settings.on_gpu:
        for backend, operator in OPERATORS.items():
            found[backend.name.lower()] = _compare(qkv, plain, backend, operator)
    return found


def _compare(
    qkv: tuple[Tensor, Tensor, Tensor],
    plain: Tensor,
    backend: SDPBackend,
    operator: Callable[..., tuple[Tensor, ...]],
) -> dict[str, Any]:
    """An operator beside PyTorch's own choice and beside the same backend asked for by name."""
    try:
        with sdpa_kernel(backend):
            own = F.scaled_dot_product_attention(*qkv)
        output, lse = operator(*qkv)[:2]
        again = operator(*qkv)[0]
    except RuntimeError as error:
        return {"error": str(error)[:300]}
    seqlen_q = qkv[0].shape[2]
    cut = lse.reshape(*plain.shape[:2], -1)[:, :, :seqlen_q]
    # one head is enough: the exact scores of all would take gigabytes
    query, key = (tokens[:1, :1].double() for tokens in qkv[:2])
    exact = (query @ key.mT * query.shape[-1] ** -0.5).logsumexp(-1)
    return {
        "equal_to_choice": torch.equal(output, plain),
        "equal_to_backend": torch.equal(output, own),
        "repeatable": torch.equal(output, again),
        "lse_shape": list(lse.shape),
        "lse_dtype": str(lse.dtype),
        "lse_error": float(f"{(cut[:1, :1] - exact).abs().max().item():.3g}"),
    }


def profile(shape: AttentionShape, settings: Settings) -> dict[str, Any]:
    """Counters of the kernels of one recorded call, as ``ncu`` reads them.

    Raises:
        LeftOut: There is no ``ncu`` here.
        RuntimeError: It failed.
    """
    if shutil.which("ncu") is None or not settings.on_gpu:
        raise LeftOut("NVIDIA's profiler ncu is not here")
    command = [
        "ncu",
        "--clock-control",
        "none",
        "--csv",
        "-k",
        "regex:pass|over_queries|over_chunks",
    ]
    command += ["--launch-skip", "3", "-c", "3", "--metrics", ",".join(COUNTERS.values())]
    command += [sys.executable, __file__, str(settings.batch), *map(str, _size(shape))]
    ran = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    lines = [line for line in ran.stdout.splitlines() if line.startswith('"')]
    if ran.returncode or not lines:
        raise RuntimeError((ran.stdout + ran.stderr)[-1000:])
    kernels: dict[str, dict[str, Any]] = {}
    names = {metric: name for name, metric in COUNTERS.items()}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        kernel[names[row["Metric Name"]]] = f"{row['Metric Value']} {row['Metric Unit']}"
    return {"batch": settings.batch, "kernels": list(kernels.values())}


def _size(shape: AttentionShape) -> tuple[int, ...]:
    return shape.heads, shape.seqlen_q, shape.seqlen_k, shape.head_dim


def _name(number: int) -> str:
    return next(b.name.lower() for b in SDPBackend.__members__.values() if b.value == number)


if __name__ == "__main__":
    # what ncu watches: a call, so that all is compiled, and the same again
    from operators import uniform_probes

    from i2am.kernels import accumulate

    size = tuple(map(int, sys.argv[1:]))
    query, key, value = make_qkv(*size, dtype=torch.bfloat16, device="cuda")
    lse = attention(query, key, value)[1]
    r2g, g2r = (
        tokens.new_zeros(*tokens.shape[:2], 1, tokens.shape[2], dtype=torch.float32)
        for tokens in (query, key)
    )
    for _ in range(3):
        accumulate(query, key, uniform_probes(r2g, g2r), normaliser=lse)
    torch.cuda.synchronize()
