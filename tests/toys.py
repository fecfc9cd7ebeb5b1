"""Small deterministic models and draws that several tests share."""

import hashlib
import io
from pathlib import Path

import torch
from torch import nn

from cmlab.models.small import ResidualMLP
from cmlab.scaling import ConsistencyModel, Denoiser


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_net(shape=(1, 8, 8), num_classes=None, dropout=0.0, seed=0, jumps=False) -> ResidualMLP:
    """A small network with every weight random: nothing is zero, so nothing hides."""
    net = ResidualMLP(shape, width=32, depth=2, num_classes=num_classes, dropout=dropout, embedding=16, jumps=jumps)
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return net


def random_model(kind=ConsistencyModel, **options) -> Denoiser:
    """A consistency model (or Denoiser) over a random network, in eval mode."""
    return kind(random_net(**options), sigma_data=0.5).eval().requires_grad_(False)


def saved(what) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(what, file)
    return file.getvalue()


def weights_file(folder: Path, data: bytes) -> Path:
    """Writes data under a name that ends in its hash, as weights are published."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"weights-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    path.write_bytes(data)
    return path
