"""Distances d(a, b) between two batches of images: (B, …), (B, …) -> (B,)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmlab.checks import known, positive, same_shape
from cmlab.weights import weights_at


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference over all elements of an image: (B,)."""
    same_shape("b", b, a.shape)
    return (a - b).abs().flatten(1).mean(1)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over all elements of an image: (B,). What the papers and the released code call l2."""
    same_shape("b", b, a.shape)
    return (a - b).square().flatten(1).mean(1)


@dataclass(frozen=True)
class PseudoHuber:
    """sqrt(|a - b|^2 + c^2) - c over the *whole vector*: Song & Dhariwal (2023, iCT), sec. 3.3.

    c=None takes their c = 0.00054 sqrt(d), d the number of elements. Taken per element with that c, as some
    implementations do, it would be plain L2 for all but the largest errors.
    """

    c: float | None = None

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        same_shape("b", b, a.shape)
        c = 0.00054 * a[0].numel() ** 0.5 if self.c is None else positive("c", self.c)
        return ((a - b).flatten(1).square().sum(1) + c**2).sqrt() - c


@dataclass(frozen=True)
class LPIPS:
    """Learned perceptual distance (Zhang et al. 2018) with the resizing rule of the released code.

    Images below 256 pixels are enlarged to 224 (bilinear), then mapped from [-1, 1] to [0, 1]. net is "vgg" (as in the
    paper), "alex" or "squeeze"; metric replaces the network by any function of two such batches, (B, 3, H, W) -> (B,).
    The first call loads the backbone's weights and raises as load_lpips does.
    The released models were trained with piq's LPIPS with average pooling; this is the authors' own, with max pooling.
    """

    net: str = "vgg"
    metric: object = None

    def __post_init__(self):
        known("LPIPS network", self.net, ["vgg", "alex", "squeeze"])

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        same_shape("b", b, a.shape)
        if a.ndim != 4 or a.shape[1] not in (1, 3):
            raise ValueError(f"LPIPS takes images (B, 3, H, W) or (B, 1, H, W), got shape {tuple(a.shape)}")
        if a.shape[-1] < 256:
            a, b = (F.interpolate(v, size=224, mode="bilinear", align_corners=False) for v in (a, b))
        return (self.metric or self._network)((a + 1) / 2, (b + 1) / 2)

    @cached_property
    def _network(self):
        network = load_lpips(self.net)

        def distance(a: Tensor, b: Tensor) -> Tensor:
            a, b = (v.expand(-1, 3, -1, -1) for v in (a, b))
            return network.to(a.device)(a, b, normalize=True).flatten()

        return distance


MODELS = "https://download.pytorch.org/models"
BACKBONES = {
    "vgg": f"{MODELS}/vgg16-397923af.pth",
    "alex": f"{MODELS}/alexnet-owt-7be5be79.pth",
    "squeeze": f"{MODELS}/squeezenet1_1-b8a52dc0.pth",
}


def load_lpips(net: str = "vgg") -> nn.Module:
    """The lpips network on its ImageNet backbone, frozen: "vgg", "alex" or "squeeze".

    Raises ValueError for another name, and as weights_at does where the backbone's file is missing or damaged.
    """
    import lpips

    address = BACKBONES[known("LPIPS network", net, BACKBONES)]
    weights = weights_at(address, f"LPIPS needs the {net} backbone's weights")
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then overwritten
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    own = network.net.state_dict()  # "slice2.3.weight" is torchvision's "features.3.weight"
    network.net.load_state_dict({key: weights[f"features.{key.partition('.')[2]}"] for key in own})
    return network.eval().requires_grad_(False)
