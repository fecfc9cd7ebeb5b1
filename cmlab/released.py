"""The twelve checkpoints of Song et al. (2023): where they are, what they hold, how they are meant to be sampled.

Facts from the README, the model card and the commands of github.com/openai/consistency_models (MIT licence) at e32b69e; FIDs
from the paper's tables 1 and 2. No digests were published: the first download's is recorded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cmlab.checks import known
from cmlab.downloads import download

ADDRESS = "https://openaipublic.blob.core.windows.net/consistency"
LICENCE = "MIT"
HEAD_CHANNELS = 64  # of every released model: the one number that no shape tells
SCALINGS = dict(sigma_data=0.5, sigma_min=0.002, sigma_max=80.0)  # of every released model
SMALLEST = 8  # pixels at the bottom of every released U-Net

_SHARED = dict(in_channels=3, out_channels=3, num_head_channels=HEAD_CHANNELS, resblock_updown=True)
IMAGENET64 = dict(
    image_size=64, model_channels=192, num_res_blocks=3, attention_resolutions=(2, 4, 8), channel_mult=(1, 2, 3, 4),
    num_classes=1000, use_scale_shift_norm=True, **_SHARED,
)  # fmt: skip
LSUN256 = dict(
    image_size=256, model_channels=256, num_res_blocks=2, attention_resolutions=(8, 16, 32),
    channel_mult=(1, 1, 2, 2, 4, 4), **_SHARED,
)  # fmt: skip


@dataclass(frozen=True)
class Released:
    """One released checkpoint.

    kind is "denoiser" (an EDM teacher: Heun, 40 steps) or "consistency"; for the latter ts are the indices, on a grid of
    `steps` levels, of the published two-step command (None: none was published). fid is the published one by network calls.
    """

    name: str
    data: str
    kind: str
    steps: int
    ts: tuple[int, ...] | None
    fid: dict[int, float]

    @property
    def file(self) -> str:
        """The file's name where it was released."""
        return f"{self.name}_ema.pt" if self.kind == "denoiser" else f"{self.name}.pt"

    @property
    def url(self) -> str:
        """Where it is fetched from; CMLAB_RELEASED_URL names a mirror."""
        return f"{os.environ.get('CMLAB_RELEASED_URL', ADDRESS).rstrip('/')}/{self.file}"

    @property
    def architecture(self) -> dict:
        """The arguments of its UNet."""
        return IMAGENET64 if self.data == "imagenet64" else LSUN256

    @property
    def path(self) -> Path:
        """Where the fetched file is."""
        return checkpoints_folder() / self.file


def _of(data: str, ct_ts, ct_steps, l2_ts, lpips_ts, edm_fid, cd_fid, ct_fid) -> list[Released]:
    return [
        Released(f"edm_{data}", data, "denoiser", 40, None, {79: edm_fid}),
        Released(f"cd_{data}_l2", data, "consistency", 40, l2_ts, {}),
        Released(f"cd_{data}_lpips", data, "consistency", 40, lpips_ts, dict(zip((1, 2), cd_fid, strict=True))),
        Released(f"ct_{data}", data, "consistency", ct_steps, ct_ts, dict(zip((1, 2), ct_fid, strict=True))),
    ]


RELEASED = {
    checkpoint.name: checkpoint
    for checkpoint in (
        *_of("imagenet64", (0, 106, 200), 201, (0, 22, 39), (0, 22, 39), 2.44, (6.20, 4.70), (13.0, 11.1)),
        *_of("bedroom256", (0, 67, 150), 151, (0, 18, 39), (0, 17, 39), 3.57, (7.80, 5.22), (16.0, 7.85)),
        *_of("cat256", (0, 62, 150), 151, None, None, 6.69, (11.0, 8.84), (20.7, 11.7)),
    )
}


def get_released(name: str) -> Released:
    """A released checkpoint by name. Raises ValueError for another one, naming the nearest."""
    return RELEASED[known("released checkpoint", name, RELEASED)]


def checkpoints_folder() -> Path:
    """Where fetched checkpoints are kept: CMLAB_CHECKPOINTS, or the repository's checkpoints/, or ~/.cache/cmlab/checkpoints."""
    if "CMLAB_CHECKPOINTS" in os.environ:
        return Path(os.environ["CMLAB_CHECKPOINTS"]).expanduser().absolute()
    beside = Path(__file__).parents[1] / "checkpoints"
    return beside if beside.is_dir() else Path.home() / ".cache" / "cmlab" / "checkpoints"


def fetch(name: str, progress: bool = True) -> Path:
    """Fetches a released checkpoint, or only checks it if it is there, and returns its path. Raises as downloads.download."""
    checkpoint = get_released(name)
    return download(checkpoint.url, checkpoint.path, progress=progress)


def kind_of(path: Path) -> str | None:
    """What the name of a .pt file says about its model: the networks of the two kinds are the same. None: nothing."""
    first = path.name.split("_")[0]
    return {"edm": "denoiser", "cd": "consistency", "ct": "consistency"}.get(first)


def unet_config(weights: dict[str, Tensor]) -> dict:
    """The arguments of the UNet that a state dict in the released form belongs to, read off its keys and shapes.

    Heads of 64 channels and 8 pixels at the bottom are those of every released model, and assumed. Raises ValueError for a
    state dict of another kind of network.
    """
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    try:
        return _read_off(shapes)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"these are no weights of a released U-Net: {error} is missing or has another shape"
        ) from error


def _read_off(shapes: dict[str, tuple[int, ...]]) -> dict:
    width, in_channels = shapes["input_blocks.0.0.weight"][:2]
    grows = {k for k in _numbers(shapes, r"output_blocks\.(\d+)\.[12]\.(in_layers|conv)\.")}
    levels, blocks = len(grows) + 1, len(set(_numbers(shapes, r"output_blocks\.(\d+)\.")))
    each = blocks // levels  # residual blocks a level on the way up, one more than down
    firsts = [1 + level * each for level in range(levels)]
    out = [shapes[f"input_blocks.{k}.0.out_layers.3.weight"][0] for k in firsts]
    return dict(
        image_size=SMALLEST * 2 ** (levels - 1),
        in_channels=in_channels,
        model_channels=width,
        out_channels=shapes["out.2.weight"][0],
        num_res_blocks=each - 1,
        attention_resolutions=[2**i for i, k in enumerate(firsts) if f"input_blocks.{k}.1.qkv.weight" in shapes],
        channel_mult=[channels / width if channels % width else channels // width for channels in out],
        num_classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        num_head_channels=HEAD_CHANNELS,
        use_scale_shift_norm=shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * out[0],
        resblock_updown=not any(".op." in key for key in shapes),
    )


def _numbers(shapes: dict, pattern: str) -> list[int]:
    return [int(found[1]) for key in shapes if (found := re.match(pattern, key))]
