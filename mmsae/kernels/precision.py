"""How matrices are multiplied fastest here: measured once per process, never guessed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)
CROSSOVER = 24  # latents per active one from which pairs are cheaper than dense products on a CPU


def linear(x: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ table.T + bias` without autograd, by the faster of the two libraries that torch brings.

    On CPUs of some makers MKL multiplies float32 at less than half the rate of oneDNN.

    Args:
        x: `[n, d]`.
        table: `[m, d]`, of the same dtype.
        bias: `[m]`, of the same dtype.
    """
    if x.device.type == "cpu" and _prefers_onednn(x.dtype, torch.get_num_threads()):
        return _onednn(x, table, bias)
    return torch.nn.functional.linear(x, table, bias)


def outer(x: Tensor, y: Tensor) -> Tensor:
    """`x.T @ y` without autograd, float32 sums also of low precision: the gradient of a weight.

    Args:
        x: `[n, m]`.
        y: `[n, d]`, of the same dtype.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return x.t() @ y
    total = torch.zeros(x.shape[1], y.shape[1])
    for rows, others in zip(x.split(512), y.split(512), strict=True):  # transposed while they are in the cache
        total += linear(rows.t().contiguous(), others.t().contiguous())
    return total


def selection_dtype(like: Tensor) -> torch.dtype:
    """Precision in which latents are chosen: that of autocast where it is on, else that of the weights `like`."""
    device = like.device.type
    if like.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return like.dtype


@cache
def fast_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where it multiplies matrices at least 1.3 times as fast as float32 on this device, else float32."""
    low, full = (_seconds(linear, dtype, device) for dtype in (torch.bfloat16, torch.float32))
    return torch.bfloat16 if 1.3 * low <= full else torch.float32


def fast_precision(device: str | None = None) -> str:
    """Lightning's name for the faster precision of a device (None: of the one it would take)."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16-mixed" if fast_dtype(device) == torch.bfloat16 else "32-true"


def _onednn(x: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), table.contiguous(), bias, "none", [], "")


@cache
def _prefers_onednn(dtype: torch.dtype, n_threads: int) -> bool:
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return True  # the same library either way, but this way the bias takes no pass of its own
    plain = _seconds(torch.nn.functional.linear, dtype, "cpu")
    # by a margin, so that every run on a machine decides alike
    return _seconds(lambda x, w: _onednn(x, w, None), dtype, "cpu") < plain / 1.3


def _seconds(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, device: str) -> float:
    """Least time of a few products of 256 x 512 by 512 x 2048 (larger on an accelerator)."""
    rows = 256 if device == "cpu" else 4096
    x, table = (torch.full((n, 512), 1.0, dtype=dtype, device=device) for n in (rows, 2048))
    times = []
    with torch.no_grad(), torch.autocast(device, enabled=False):
        for _ in range(5):
            _finish(device)
            begin = time.perf_counter()
            product(x, table)
            _finish(device)
            times.append(time.perf_counter() - begin)
    return min(times[1:])


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
