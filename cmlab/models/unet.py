"""The U-Net of the released checkpoints (ADM: Dhariwal & Nichol 2021), with their parameter names and shapes.

A released state dict loads as it is. Where a name below looks odd (in_layers, out_layers, op), it is the checkpoints'.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmlab.checks import check_labels, same_shape, whole
from cmlab.kernels import attention, group_norm_silu
from cmlab.models.small import zeroed

GROUPS = 32  # of every group norm in the released checkpoints


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """cos, then sin, of timesteps (B,) at dim // 2 frequencies: (B, dim) float32.

    The frequencies fall geometrically from 1 to nearly 1/10000 rad a unit (Vaswani et al. 2017, sec. 3.5); an odd dim
    ends in a column of zeros. timesteps may be any real numbers. Raises ValueError for dim < 2.
    """
    half = whole("dim", dim, 2) // 2
    ramp = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * ramp)  # (B, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def qkv_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Softmax attention over L positions, qkv (B, 3 C, L) -> (B, C, L), with the scale 1 / sqrt(C / num_heads).

    The 3 C channels are ordered (three, head, channel), as in the released models: all of q, then of k, then of v.
    """
    batch, width, length = qkv.shape
    tokens = qkv.transpose(1, 2).contiguous()  # channels innermost: the fused kernels take nothing else
    q, k, v = tokens.reshape(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, L, C / heads)
    return attention(q, k, v).transpose(2, 3).reshape(batch, width // 3, length)


class UNet(nn.Module):
    """F(x, c_noise, labels): the network of the 12 released models and of the EDM teachers among them.

    image_size              height and width that the network is meant for; any multiple of 2^(levels - 1) works
    in_channels             of the images
    model_channels          width at the top; level i has channel_mult[i] times as many channels, a multiple of 32
    out_channels            of the output
    num_res_blocks          residual blocks a level on the way down; one more on the way up
    attention_resolutions   where attention follows each residual block, as *downsampling factors*, like the released
                            UNetModel's: 1 is the full picture, 2 its half … A released command line's "32,16,8" are
                            pixels: at image size 64 they become (2, 4, 8). The middle always has attention
    dropout                 inside every residual block, in training mode
    channel_mult            one factor a level, from the top down
    num_classes             None: unconditional; else labels are required
    num_heads               attention heads; ignored where num_head_channels is given
    num_head_channels       channels of a head; None (-1 in released configs) leaves num_heads in charge
    num_heads_upsample      heads on the way up; None (-1 in released configs) means num_heads there too
    use_scale_shift_norm    the noise level scales and shifts a normalised layer (ImageNet); else it is added (LSUN)
    resblock_updown         residual blocks change the resolution (all released models); else convolutions do

    checkpointing = True makes a training step keep only the activations between blocks, and compute those inside again.
    Weights may be of any floating dtype: x is cast to it on the way in, the output back to x's. config holds the
    arguments, ready for json, with "name": "unet".
    Raises ValueError or TypeError for arguments that do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        num_classes: int | None = None,
        num_heads: int = 1,
        num_head_channels: int | None = None,
        num_heads_upsample: int | None = None,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
    ):
        super().__init__()
        self.config = dict(
            name="unet", image_size=image_size, in_channels=in_channels, model_channels=model_channels,
            out_channels=out_channels, num_res_blocks=num_res_blocks, attention_resolutions=list(attention_resolutions),
            dropout=dropout, channel_mult=list(channel_mult), num_classes=num_classes, num_heads=num_heads,
            num_head_channels=_given(num_head_channels), num_heads_upsample=_given(num_heads_upsample),
            use_scale_shift_norm=use_scale_shift_norm, resblock_updown=resblock_updown,
        )  # fmt: skip
        self.checkpointing = False
        widths = _check_config(**self.config)
        emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)
        parts = _Parts(self.config, emb_channels)
        self.input_blocks, skips = parts.way_down(widths)
        self.middle_block = parts.middle(widths[-1])
        self.output_blocks = parts.way_up(widths, skips)
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, widths[0]), nn.SiLU(), zeroed(nn.Conv2d(widths[0], out_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """x (B, in_channels, H, W), c_noise (B,) = 250 ln(sigma), labels (B,) int64 or None -> (B, out_channels, H, W).

        Raises ValueError for shapes or labels that do not fit.
        """
        self._check_input(x, c_noise, labels)
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(c_noise, self.config["model_channels"]).to(dtype))  # (B, E)
        if labels is not None:
            emb = emb + self.label_emb(labels)
        h, skips = x.to(dtype), []
        for block in self.input_blocks:
            h = self._pass(block, h, emb)
            skips.append(h)
        h = self._pass(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = self._pass(block, torch.cat([h, skips.pop()], dim=1), emb)
        norm, _, conv = self.out
        return conv(normalized(norm, h)).to(x.dtype)

    def _pass(self, block: nn.ModuleList, h: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(_run, block, h, emb, use_reentrant=False)  # with the same dropout mask the second time
        return _run(block, h, emb)

    def _check_input(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> None:
        channels, multiple = self.config["in_channels"], 2 ** (len(self.config["channel_mult"]) - 1)
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(
                f"x must have shape (B, {channels}, H, W) with H and W multiples of {multiple}, got {tuple(x.shape)}"
            )
        same_shape("c_noise", c_noise, (x.shape[0],))
        check_labels(labels, x.shape[0], self.config["num_classes"])


def normalized(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """SiLU((1 + scale) norm(x) + shift), by a kernel where there is one: x (B, C, …), scale and shift (B, C)."""
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, scale, shift)


class ResBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x)))))), told the noise level and class by emb, on x resampled or not.

    resample, a layer without parameters, acts on x and on its normalised branch. With scale_shift emb gives
    (1 + scale) norm(h) + shift, else it is added to h. The last convolution starts at zero: a fresh block is its skip.
    """

    def __init__(
        self, channels: int, out_channels: int, emb_channels: int, dropout: float, scale_shift: bool,
        resample: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, (1 + scale_shift) * out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out_channels), nn.SiLU(), nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )  # fmt: skip
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, channels, H, W), emb (B, emb_channels) -> (B, out_channels, H', W')."""
        norm, _, conv = self.in_layers
        h = conv(self.resample(normalized(norm, x)))
        norm, _, dropout, conv = self.out_layers
        change = self.emb_layers(emb)
        h = (
            normalized(norm, h, *change.chunk(2, dim=1))
            if self.scale_shift
            else normalized(norm, h + change[..., None, None])
        )
        return self.skip_connection(self.resample(x)) + conv(dropout(h))


class AttentionBlock(nn.Module):
    """x + proj_out(attention(qkv(norm(x)))) over all positions of the picture. proj_out starts at zero."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W) -> the same shape."""
        qkv = self.qkv(self.norm(x)).flatten(2)  # (B, 3 C, H W)
        return x + self.proj_out(qkv_attention(qkv, self.num_heads).reshape(x.shape))


class Downsample(nn.Module):
    """Half the resolution by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W) -> (B, channels, H / 2, W / 2)."""
        return self.op(x)


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W) -> (B, channels, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class _Parts:
    """Makes the layers of one U-Net, all from its config. factor is how much a level is downsampled: 1, 2, 4 …"""

    def __init__(self, config: dict, emb_channels: int):
        self.config, self.emb_channels = config, emb_channels

    def residual(self, channels: int, out_channels: int, resample: nn.Module | None = None) -> ResBlock:
        dropout, scale_shift = self.config["dropout"], self.config["use_scale_shift_norm"]
        return ResBlock(channels, out_channels, self.emb_channels, dropout, scale_shift, resample)

    def attention(self, channels: int, upwards: bool = False) -> AttentionBlock:
        heads = (upwards and self.config["num_heads_upsample"]) or self.config["num_heads"]
        if self.config["num_head_channels"] is not None:
            heads = _divided("num_head_channels", channels, self.config["num_head_channels"])
        _divided("num_heads", channels, heads)
        return AttentionBlock(channels, heads)

    def block(self, channels: int, out_channels: int, level: int, upwards: bool = False) -> nn.ModuleList:
        """A residual block, and attention where the level has it."""
        layers = nn.ModuleList([self.residual(channels, out_channels)])
        if 2**level in self.config["attention_resolutions"]:
            layers.append(self.attention(out_channels, upwards))
        return layers

    def down(self, width: int) -> nn.Module:
        return self.residual(width, width, nn.AvgPool2d(2)) if self.config["resblock_updown"] else Downsample(width)

    def up(self, width: int) -> nn.Module:
        enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        return self.residual(width, width, enlarge) if self.config["resblock_updown"] else Upsample(width)

    def way_down(self, widths: list[int]) -> tuple[nn.ModuleList, list[int]]:
        """The input blocks, and the channels of each one's output: those of the skip connections."""
        first = nn.Conv2d(self.config["in_channels"], widths[0], 3, padding=1)
        blocks, skips = nn.ModuleList([nn.ModuleList([first])]), [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(self.config["num_res_blocks"]):
                blocks.append(self.block(skips[-1], width, level))
                skips.append(width)
            if level + 1 < len(widths):
                blocks.append(nn.ModuleList([self.down(width)]))
                skips.append(width)
        return blocks, skips

    def middle(self, width: int) -> nn.ModuleList:
        return nn.ModuleList([self.residual(width, width), self.attention(width), self.residual(width, width)])

    def way_up(self, widths: list[int], skips: list[int]) -> nn.ModuleList:
        """The output blocks: each takes what comes from below, joined with the matching skip connection."""
        blocks, channels, skips = nn.ModuleList(), widths[-1], list(skips)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(self.config["num_res_blocks"] + 1):
                blocks.append(self.block(channels + skips.pop(), width, level, upwards=True))
                channels = width
            if level > 0:
                blocks[-1].append(self.up(width))
        return blocks


def _run(layers: Iterable[nn.Module], h: Tensor, emb: Tensor) -> Tensor:
    for layer in layers:
        h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
    return h


def _given(value: int | None) -> int | None:
    return None if value == -1 else value


def _divided(argument: str, channels: int, parts: int) -> int:
    if channels % parts:
        raise ValueError(f"{argument} must divide the {channels} channels of every attention layer, got {parts}")
    return channels // parts


def _check_config(**config) -> list[int]:
    """The width of every level. Raises ValueError or TypeError where the arguments of UNet do not fit together."""
    for name in ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "num_heads"):
        whole(name, config[name])
    for name in ("num_classes", "num_head_channels", "num_heads_upsample"):
        if config[name] is not None:
            whole(name, config[name])
    if not 0 <= config["dropout"] < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {config['dropout']}")
    widths = [int(mult * config["model_channels"]) for mult in config["channel_mult"]]
    if not widths or any(width < GROUPS or width % GROUPS for width in widths):
        raise ValueError(
            f"every level's width, channel_mult x model_channels, must be a multiple of {GROUPS}, got {widths}"
        )
    factors = [2**level for level in range(len(widths))]
    if config["image_size"] % factors[-1]:
        raise ValueError(f"image_size must be a multiple of 2^(levels - 1) = {factors[-1]}, got {config['image_size']}")
    if not set(config["attention_resolutions"]) <= set(factors):
        raise ValueError(
            f"attention_resolutions are downsampling factors (image_size // pixels), here some of {factors}, "
            f"got {config['attention_resolutions']}"
        )
    return widths
