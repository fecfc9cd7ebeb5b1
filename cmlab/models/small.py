"""The CPU network: a fully connected residual net with a gated skip. It trains on 8x8 … 16x16 images in minutes on two cores."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmlab.checks import check_labels, positive, same_shape, whole


class ResidualMLP(nn.Module):
    """F(x, c_noise, labels) = MLP(x) + a(c_noise) x, for images or points of any small shape.

    The gated skip a(c_noise) x carries the noise around the bottleneck: a fully connected net would otherwise have to squeeze
    all of it through its width. Every block is modulated by the noise level and the class (adaptive layer norm, as in DiT:
    Peebles & Xie 2023, sec. 3.2). num_classes=None: unconditional. Weights may be of any floating dtype: x is cast to it on
    the way in, the output back to x's. jumps=True: the network is also told the way (B,) in [0, 1] of a jump, how much of the noise
    it is to take away (scaling.MeanFlow); what it makes of it starts at nothing. highest is the largest frequency of the noise level's
    embedding, in rad a unit of ln(sigma): what is to be differentiated by the noise level wants a small one (lesson 07).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int = 512,
        depth: int = 4,
        num_classes: int | None = None,
        dropout: float = 0.0,
        embedding: int = 128,
        jumps: bool = False,
        highest: float = 10.0,
    ):
        super().__init__()
        whole("width", width)
        whole("depth", depth)
        if num_classes is not None:
            whole("num_classes", num_classes)
        if whole("embedding", embedding, 2) % 2:
            raise ValueError(f"embedding must be even, got {embedding}")
        for size in shape:
            whole("every size in shape", size)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.config = dict(
            name="mlp", shape=list(shape), width=width, depth=depth, num_classes=num_classes, dropout=dropout,
            embedding=embedding, **({"jumps": True} if jumps else {}), **({"highest": highest} if highest != 10.0 else {}),
        )  # fmt: skip
        self.shape, self.num_classes, self.highest = tuple(shape), num_classes, positive("highest", highest)
        size = math.prod(self.shape)
        self.time = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(num_classes, embedding) if num_classes is not None else None
        self.way = None
        if jumps:
            self.way = nn.Sequential(
                nn.Linear(embedding, embedding), nn.SiLU(), zeroed(nn.Linear(embedding, embedding))
            )
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(Block(width, embedding, dropout) for _ in range(depth))
        self.leave = zeroed(nn.Linear(width, size))
        self.gate = zeroed(nn.Linear(embedding, 1))

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, way: Tensor | None = None) -> Tensor:
        """x (B, *shape), c_noise (B,), labels (B,) int64 or None, way (B,) or None -> (B, *shape)."""
        same_shape("x", x, (len(x), *self.shape))
        if (way is None) != (self.way is None):
            raise ValueError(
                f"way {'is missing' if way is None else 'must be left out'}: this network has jumps={self.way is not None}"
            )
        check_labels(labels, len(x), self.num_classes)
        dtype = self.enter.weight.dtype
        emb = self.time(fourier(c_noise / 250, self.config["embedding"], self.highest).to(dtype))  # (B, E) of ln(sigma)
        if self.label is not None:
            emb = emb + self.label(labels)
        if way is not None:
            emb = emb + self.way(fourier(way, self.config["embedding"]).to(dtype))
        emb = F.silu(emb)
        flat = x.flatten(1).to(dtype)
        h = self.enter(flat)  # (B, width)
        for block in self.blocks:
            h = block(h, emb)
        out = self.leave(F.layer_norm(h, h.shape[-1:])) + self.gate(emb) * flat
        return out.reshape(x.shape).to(x.dtype)


class Block(nn.Module):
    """h + W2 dropout(silu(W1 (norm(h) (1 + scale) + shift))), with scale and shift from the embedding."""

    def __init__(self, width: int, embedding: int, dropout: float):
        super().__init__()
        self.modulate = zeroed(nn.Linear(embedding, 2 * width))
        self.first, self.second = nn.Linear(width, width), zeroed(nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """h (B, width), emb (B, embedding) -> (B, width)."""
        scale, shift = self.modulate(emb).chunk(2, dim=1)
        inner = F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift
        return h + self.second(self.dropout(F.silu(self.first(inner))))


def fourier(t: Tensor, size: int, highest: float = 10.0) -> Tensor:
    """cos and sin of t (B,) at size / 2 frequencies, spaced geometrically from 0.1 to highest rad a unit -> (B, size)."""
    frequencies = torch.logspace(-1, math.log10(highest), size // 2, device=t.device)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@torch.no_grad()
def retimed(start: ResidualMLP, highest: float, sigma_min: float, sigma_max: float) -> dict[str, Tensor]:
    """The weights of a network, for one like it whose embedding of the noise level has another highest frequency.

    The first layer after the embedding is fitted to what it gave, by least squares over the levels from sigma_min to sigma_max:
    what was finer than the new frequencies is gone.
    """
    level = torch.linspace(math.log(sigma_min), math.log(sigma_max), 2000)
    size, layer = start.config["embedding"], start.time[0]
    aim = layer(fourier(level, size, start.highest)).double()
    inputs = F.pad(fourier(level, size, highest).double(), (0, 1), value=1.0)  # the last column is the bias
    ridge = 1e-4 * len(level) * torch.eye(size + 1, dtype=torch.float64)  # neighbouring frequencies are nearly the same
    fitted = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ aim).float()
    return start.state_dict() | {"time.0.weight": fitted[:-1].T.contiguous(), "time.0.bias": fitted[-1]}


def taken_over(net: ResidualMLP, start: ResidualMLP, sigma_min: float, sigma_max: float) -> dict[str, Tensor]:
    """The weights with which net begins as start is: refitted to its own embedding, what it knows of jumps left as it is."""
    own = {key: value for key, value in net.state_dict().items() if key.startswith("way.")}
    same = net.highest == start.highest
    return own | (start.state_dict() if same else retimed(start, net.highest, sigma_min, sigma_max))


def zeroed(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The layer with weights and bias at zero: what it adds starts at nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
