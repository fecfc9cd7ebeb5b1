"""The form in which diffusers keeps a consistency model (ConsistencyModelPipeline): read and written without diffusers itself.

A folder with model_index.json, unet/ (UNet2DModel: config.json and weights) and scheduler/ (CMStochasticIterativeScheduler).
The networks are the same; diffusers numbers blocks by level and keeps q, k and v as three linear layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmlab.weights import read_json, read_pt, read_safetensors

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = (WEIGHTS, "diffusion_pytorch_model.bin")
PIPELINE, SCHEDULER, NETWORK = "ConsistencyModelPipeline", "CMStochasticIterativeScheduler", "UNet2DModel"
VERSION = "0.18.0"  # of diffusers: the first with this pipeline

RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
ATTENTION = {"norm": ["group_norm"], "qkv": ["to_q", "to_k", "to_v"], "proj_out": ["to_out.0"]}
OUTER = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
SCALINGS = dict(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)  # of the scheduler, where its config leaves them out
DEFAULTS = dict(
    dropout=0.0, num_class_embeds=None, attn_norm_num_groups=None, downsample_type="conv", upsample_type="conv",
)  # fmt: skip  # of UNet2DModel, where its config leaves them out


def describe(network: dict[str, Any], scalings: dict[str, float]) -> dict[str, dict]:
    """The JSON files of a pipeline with this network and these sigma_min, sigma_max and sigma_data, by their paths in its folder."""
    scheduler = dict(
        _class_name=SCHEDULER, _diffusers_version=VERSION, num_train_timesteps=40, **scalings, s_noise=1.0, rho=7.0,
        clip_denoised=True,
    )  # fmt: skip
    index = dict(_class_name=PIPELINE, _diffusers_version=VERSION)
    index |= {"scheduler": ["diffusers", SCHEDULER], "unet": ["diffusers", NETWORK]}
    return {INDEX: index, "scheduler/scheduler_config.json": scheduler, "unet/config.json": unet_to_diffusers(network)}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, float], dict[str, Tensor], Path]:
    """The network's config, the scalings, the weights under our names, and their file, of a pipeline's folder.

    Raises ValueError for another pipeline, a missing or damaged file, or a network that ours cannot equal.
    """
    found = read_json(folder / INDEX).get("_class_name")
    if found != PIPELINE:
        raise ValueError(f"{folder} holds a {found}; of diffusers' pipelines only {PIPELINE} can be loaded")
    for part in ("unet/config.json", "scheduler/scheduler_config.json"):
        if not (folder / part).is_file():
            raise ValueError(f"{folder} is not whole: {part} is missing")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    network = unet_from_diffusers(read_json(folder / "unet" / "config.json"))
    scalings = {key: scheduler.get(key, default) for key, default in SCALINGS.items()}
    path = next((p for name in FILES if (p := folder / "unet" / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} is not whole: unet/{WEIGHTS} is missing")
    weights = read_safetensors(path) if path.suffix == ".safetensors" else read_pt(path)
    return network, scalings, weights_from_diffusers(network, weights), path


def fetch_from_hub(name: str) -> Path:
    """Fetches what read needs of a pipeline on the Hugging Face hub into its cache and returns the folder there.

    Raises ValueError if there is no such pipeline or it cannot be had.
    """
    from huggingface_hub import snapshot_download

    wanted = ["*.json", *(f"unet/{name}" for name in FILES)]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # of the network, of the hub, of the cache
        raise ValueError(
            f"{name!r} is neither a model or folder here, nor could it be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        ) from error


def unet_to_diffusers(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the UNet2DModel that equals our UNet. Raises ValueError where diffusers has none that does."""
    if config.get("name") != "unet" or not config["resblock_updown"]:
        raise ValueError("diffusers knows only a UNet with resblock_updown=True; this network has no counterpart there")
    if config["num_head_channels"] is None:
        raise ValueError("diffusers counts channels a head: the network needs num_head_channels, not num_heads")
    attends = [2**level in config["attention_resolutions"] for level in range(len(config["channel_mult"]))]
    return dict(
        _class_name=NETWORK, _diffusers_version=VERSION, sample_size=config["image_size"],
        in_channels=config["in_channels"], out_channels=config["out_channels"],
        block_out_channels=[int(mult * config["model_channels"]) for mult in config["channel_mult"]],
        layers_per_block=config["num_res_blocks"], attention_head_dim=config["num_head_channels"],
        down_block_types=["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)],
        resnet_time_scale_shift="scale_shift" if config["use_scale_shift_norm"] else "default",
        downsample_type="resnet", upsample_type="resnet", attn_norm_num_groups=32, dropout=config["dropout"],
        num_class_embeds=config["num_classes"],
    )  # fmt: skip


def unet_from_diffusers(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of our UNet for a UNet2DModel's config, with "name". Raises ValueError for one that it cannot equal."""
    down, widths = config["down_block_types"], config["block_out_channels"]
    ours = dict(
        name="unet", image_size=config["sample_size"], in_channels=config["in_channels"],
        model_channels=widths[0], out_channels=config["out_channels"], num_res_blocks=config["layers_per_block"],
        attention_resolutions=[2**level for level, kind in enumerate(down) if kind == "AttnDownBlock2D"],
        dropout=config.get("dropout", 0.0), channel_mult=[width / widths[0] for width in widths],
        num_classes=config.get("num_class_embeds"), num_heads=1, num_head_channels=config["attention_head_dim"],
        num_heads_upsample=None, use_scale_shift_norm=config["resnet_time_scale_shift"] == "scale_shift",
        resblock_updown=True,
    )  # fmt: skip
    ours["channel_mult"] = [int(mult) if mult == int(mult) else mult for mult in ours["channel_mult"]]
    expected = unet_to_diffusers(ours)
    differs = [key for key, value in expected.items() if key[0] != "_" and config.get(key, DEFAULTS.get(key)) != value]
    if differs:
        raise ValueError(f"this UNet2DModel is built otherwise than the released ones: {', '.join(differs)}")
    return ours


def parameters(config: dict[str, Any]) -> Iterator[tuple[str, list[str], bool]]:
    """(our key, diffusers' keys, is a convolution here and linear there) for every parameter; some a given network lacks."""
    yield from _both_parts(OUTER.items())
    for ours, theirs, attends in _blocks(config):
        if attends:
            for layer, others in ATTENTION.items():
                for part in ("weight", "bias"):
                    keys = [f"{theirs}.{other}.{part}" for other in others]
                    yield f"{ours}.{layer}.{part}", keys, part == "weight" and layer != "norm"
        else:
            yield from _both_parts((f"{ours}.{layer}", f"{theirs}.{other}") for layer, other in RESIDUAL.items())


def _both_parts(layers: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str], bool]]:
    for ours, theirs in layers:
        for part in ("weight", "bias"):
            yield f"{ours}.{part}", [f"{theirs}.{part}"], False


def _blocks(config: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """(our block, diffusers' block, is it attention), from the input to the output."""
    each, levels = config["num_res_blocks"], len(config["channel_mult"])
    for level in range(levels):
        first = 1 + level * (each + 1)
        for k in range(each):
            yield f"input_blocks.{first + k}.0", f"down_blocks.{level}.resnets.{k}", False
            yield f"input_blocks.{first + k}.1", f"down_blocks.{level}.attentions.{k}", True
        yield f"input_blocks.{first + each}.0", f"down_blocks.{level}.downsamplers.0", False
    yield "middle_block.0", "mid_block.resnets.0", False
    yield "middle_block.1", "mid_block.attentions.0", True
    yield "middle_block.2", "mid_block.resnets.1", False
    for up in range(levels):
        attends = 2 ** (levels - 1 - up) in config["attention_resolutions"]
        for k in range(each + 1):
            block = f"output_blocks.{up * (each + 1) + k}"
            yield f"{block}.0", f"up_blocks.{up}.resnets.{k}", False
            if attends:
                yield f"{block}.1", f"up_blocks.{up}.attentions.{k}", True
        yield f"{block}.{1 + attends}", f"up_blocks.{up}.upsamplers.0", False


def weights_to_diffusers(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under diffusers' names and in its shapes."""
    result = {}
    for ours, theirs, linear in parameters(config):
        for key, value in zip(theirs, weights[ours].chunk(len(theirs)) if ours in weights else (), strict=False):
            result[key] = (value[..., 0, 0] if linear else value).contiguous()
    return result


def weights_from_diffusers(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' state dict under our names and in our shapes; what has no counterpart keeps its name, to be refused."""
    left, result = dict(weights), {}
    for ours, theirs, linear in parameters(config):
        if all(key in left for key in theirs):
            value = torch.cat([left.pop(key) for key in theirs])
            result[ours] = value[..., None, None] if linear else value
    return result | left
