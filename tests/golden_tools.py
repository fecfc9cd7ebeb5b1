"""Numbers that the released code (openai/consistency_models) computed, and the tiny networks that it used.

tests/golden/*.npz and *.json hold data only. What the reference rounds in float32 differs from ours by about 1e-5;
a wrong layout, time scale or label order moves the outputs by 0.6 and more. So 1e-4 separates right from wrong.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cmlab.models.unet import UNet
from cmlab.scaling import ConsistencyModel, Denoiser

FOLDER = Path(__file__).parent / "golden"
TINY = ["no_updown", "num_heads", "plain_uncond", "ssn_class", "three_level"]
FIXED = {"conv_resample", "dims"}  # arguments of the reference's class that are the same in every released model


@cache
def arrays(name: str) -> dict[str, Tensor]:
    """The arrays of golden/<name>.npz as tensors."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@cache
def facts(name: str):
    """What golden/<name>.json says."""
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def tiny_unet(name: str, scale: float = 1.0) -> UNet:
    """One of the tiny U-Nets with the reference's weights, times scale, frozen and in eval mode."""
    arguments = {key: value for key, value in facts(f"unet_{name}")["unet_model"].items() if key not in FIXED}
    net = UNet(**arguments)
    net.load_state_dict({key: scale * value for key, value in arrays(f"unet_{name}_state").items()})
    return net.eval().requires_grad_(False)


def tiny_denoiser(name: str = "ssn_class", scale: float = 1.0) -> Denoiser:
    """The reference's KarrasDenoiser(distillation=False) over a tiny U-Net."""
    return Denoiser(tiny_unet(name, scale))


def tiny_consistency_model(name: str = "ssn_class", scale: float = 1.0) -> ConsistencyModel:
    """The reference's KarrasDenoiser(distillation=True) over a tiny U-Net."""
    return ConsistencyModel(tiny_unet(name, scale))


class SigmasSeen(nn.Module):
    """A model that notes the noise level of every call."""

    def __init__(self, model: Denoiser):
        super().__init__()
        self.model, self.sigma_min, self.sigma_max, self.seen = model, model.sigma_min, model.sigma_max, []

    def forward(self, x: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
        self.seen.append(float(sigma))
        return self.model(x, sigma, labels)


def assert_close(ours, golden: Tensor, tolerance: float = 1e-4) -> None:
    """ours equals the reference's numbers, in shape too, within tolerance (absolute and relative)."""
    ours = torch.as_tensor(ours, dtype=golden.dtype)
    torch.testing.assert_close(ours, golden, atol=tolerance, rtol=tolerance)


def assert_same_direction(ours: Tensor, golden: Tensor, tolerance: float = 1e-4) -> None:
    """ours equals the reference's gradient up to a relative L2 error, for numbers of any size."""
    assert ours.shape == golden.shape
    assert (ours - golden).norm() <= tolerance * golden.norm()
