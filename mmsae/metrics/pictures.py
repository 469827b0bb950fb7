"""Distances of pictures and of sets of pictures, through torchmetrics, where the weights that they need are at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mmsae.errors import MmsaeError

Net = Literal["alex", "vgg", "squeeze"]


def lpips(first: Tensor, second: Tensor, net: Net = "alex") -> Tensor:
    """Perceptual distance of pairs of pictures, `[n]` (arXiv 1801.03924); 0 for equal ones.

    Args:
        first: `[n, 3, H, W]` in 0..1; sides below 64 pixels are enlarged, the network halves them five times.
        second: Of the same shape.
        net: Whose features are compared; torchvision's weights, fetched once into torch's cache.

    Raises:
        MmsaeError: The weights are neither in the cache nor to be fetched.
    """
    if first.shape != second.shape:
        raise MmsaeError(f"pictures of shapes {tuple(first.shape)} and {tuple(second.shape)} cannot be compared.")
    network = _lpips_network(net)
    side = min(first.shape[-2:])
    if side < 64:
        first, second = (nn.functional.interpolate(x, scale_factor=64 / side, mode="bilinear") for x in (first, second))
    with torch.no_grad():
        return network(first, second, normalize=True).flatten()


def _lpips_network(net: Net) -> Any:
    try:
        from torchmetrics.functional.image.lpips import _LPIPS

        return _LPIPS(pretrained=True, net=cast(Any, net), eval_mode=True).eval()
    except Exception as error:
        raise MmsaeError(
            f"LPIPS needs the weights of torchvision's {net}, which are not in torch's cache and cannot be fetched "
            f"({type(error).__name__}); put them into {torch.hub.get_dir()}/checkpoints."
        ) from error


def frechet_distance(real: Tensor, drawn: Tensor, features: Callable[[Tensor], Tensor] | None = None) -> float:
    """FID of two sets of pictures (arXiv 1706.08500), biased upwards for few pictures: compare equal numbers only.

    Args:
        real: `[n, 3, H, W]` in 0..1.
        drawn: `[m, 3, H, W]` in 0..1.
        features: From pictures to `[n, f]`, such as a CLIP's image tower; None is Inception, which needs
            torch-fidelity and its weights.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    return _distance(FrechetInceptionDistance, real, drawn, features)


def kernel_distance(
    real: Tensor, drawn: Tensor, features: Callable[[Tensor], Tensor] | None = None, subset_size: int = 50
) -> float:
    """KID of two sets of pictures (arXiv 1801.01401), unbiased for few pictures; mean over 100 subsets.

    Args:
        real: As for `frechet_distance`, as for the next two.
        drawn: See there.
        features: See there.
        subset_size: Pictures of each subset, at most as many as there are.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(real), len(drawn))
    return _distance(KernelInceptionDistance, real, drawn, features, subset_size=size)


def _distance(
    metric: Any, real: Tensor, drawn: Tensor, features: Callable[[Tensor], Tensor] | None, **arguments: Any
) -> float:
    if min(len(real), len(drawn)) < 2:
        raise MmsaeError("a distance of sets needs at least two pictures on each side.")
    try:
        # Inception reads bytes, and torchmetrics makes them of 0..1; features of one's own get the pictures as they are
        own = metric(feature=2048 if features is None else _Features(features), normalize=features is None, **arguments)
    except ModuleNotFoundError as error:
        raise MmsaeError(
            "FID and KID of Inception need torch-fidelity and its weights (pip install torch-fidelity, with a "
            "connection); give features of your own, such as those of a CLIP, instead."
        ) from error
    except Exception as error:
        raise MmsaeError(
            f"the weights of Inception are not at hand ({type(error).__name__}); give features of your own instead."
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the subsets of KID
        own.update(real, real=True)
        own.update(drawn, real=False)
        found = own.compute()
    return float(found[0] if isinstance(found, tuple) else found)


class _Features(nn.Module):
    """A function as the module that torchmetrics wants."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.num_features = int(function(torch.zeros(2, 3, 32, 32)).shape[-1])

    def forward(self, pictures: Tensor) -> Tensor:
        return self.function(pictures).to(pictures.device)
