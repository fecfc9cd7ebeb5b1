"""Models on disk: our own folders (config.json and model.safetensors, the files of huggingface_hub's PyTorchModelHubMixin),
the released checkpoints, and the folders of diffusers.

Nothing is unpickled: a file from a stranger can hold wrong numbers, but no code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from cmlab import interop
from cmlab.checks import known
from cmlab.models import build
from cmlab.models.classifier import DigitsClassifier
from cmlab.released import RELEASED, kind_of, unet_config
from cmlab.released import SCALINGS as RELEASED_SCALINGS
from cmlab.scaling import ConsistencyModel, Denoiser, MeanFlow, TrigFlow
from cmlab.sources import HUB_ID
from cmlab.weights import read_json, read_pt, read_safetensors

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
KINDS = {kind.kind: kind for kind in (Denoiser, ConsistencyModel, TrigFlow, MeanFlow, DigitsClassifier)}
SCALINGS = ["sigma_data", "sigma_min", "sigma_max"]
PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
EMBEDDED = tuple(sorted(path.parent.name for path in EMBEDDED_FOLDER.glob(f"*/{CONFIG}")))


def save(
    model: Denoiser | DigitsClassifier,
    folder: str | Path,
    data: str | None = None,
    dtype: torch.dtype | None = None,
    **facts: Any,
) -> Path:
    """Writes a model as a folder (config.json, model.safetensors) and returns the folder's absolute path.

    data names the data set it was trained on; facts (recipe, seconds, figures: what JSON holds) are kept in the config.
    dtype=torch.float16 halves the file. Atomic: the folder holds the previous model or the new one, each whole.
    Raises OSError if the folder cannot be written or holds anything but a saved model (it stays as it is), ValueError
    for a weight that is not finite in the dtype, TypeError for a model or a fact that cannot be saved.
    """
    config = describe(model) | {"data": data, "facts": facts}
    return _write(Path(folder).absolute(), {CONFIG: config, WEIGHTS: _weights_of(model, dtype)})


def export(model: ConsistencyModel, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Writes a consistency model as diffusers keeps it (ConsistencyModelPipeline.from_pretrained reads it); returns the path.

    Atomic, as save. Raises ValueError for a model that the pipeline cannot hold: a diffusion model, a network
    other than a UNet with resblock_updown and num_head_channels; OSError as save.
    """
    if type(model) is not ConsistencyModel:
        raise ValueError(f"the pipeline holds consistency models, got a {type(model).__name__}")
    network = model.net.config
    files = interop.describe(network, {name: getattr(model, name) for name in SCALINGS})
    weights = interop.weights_to_diffusers(network, _weights_of(model, dtype))
    return _write(Path(folder).absolute(), files | {f"unet/{interop.WEIGHTS}": weights})


def load(
    name_or_path: str | Path, device: str | None = None, dtype: torch.dtype | None = None, kind: str | None = None
) -> Denoiser:
    """A Denoiser or ConsistencyModel, ready to use: in eval mode, without gradients; model.info is its config.

    name_or_path is the name of an embedded model ("digits-cd") or of a released one that has been fetched
    ("cd_imagenet64_lpips"), or the path of a saved model's folder, of a .pt file in the released form, of diffusers' folder of a
    ConsistencyModelPipeline, or the id of such a one on the Hugging Face hub ("openai/diffusers-cd_imagenet64_l2"). A name comes
    first: a folder that is called like an embedded model is "./digits-cd".
    dtype is that of the weights, float32 without it. kind ("denoiser" or "consistency") is needed only for a .pt file whose name does
    not begin with edm_, cd_ or ct_: the networks are the same. No random numbers are drawn. Raises ValueError for an unknown name
    or kind (naming the nearest) and for a file that is cut off, foreign or does not fit its config.
    """
    if kind is not None:
        known("kind", kind, [Denoiser.kind, ConsistencyModel.kind])
    place = _find(name_or_path)
    config, weights, path = _read(place, kind)
    if config["kind"] == DigitsClassifier.kind:
        raise ValueError(f"{place} holds a classifier; load it with load_classifier")
    model = KINDS[config["kind"]](_assemble(config, weights, path), **{key: config[key] for key in SCALINGS})
    return _ready(model, config, device, dtype)


def load_classifier(name_or_path: str | Path, device: str | None = None) -> DigitsClassifier:
    """A saved classifier ("digits-classifier", "tinted-digits-classifier" or a folder), ready to use."""
    place = _find(name_or_path)
    config, weights, path = _read(place, None)
    if config["kind"] != DigitsClassifier.kind:
        raise ValueError(f"{place} holds a {KINDS[config['kind']].__name__}, no classifier; load it with load")
    return _ready(_assemble(config, weights, path), config, device, None)


def _network(model: Denoiser | DigitsClassifier) -> nn.Module:
    return model if isinstance(model, DigitsClassifier) else model.net


def describe(model: Denoiser | DigitsClassifier) -> dict[str, Any]:
    """The config that rebuilds the model."""
    if type(model) not in KINDS.values():
        raise TypeError(f"model must be one of {[k.__name__ for k in KINDS.values()]}, got {type(model).__name__}")
    network = _network(model).config
    scalings = SCALINGS if model.kind != DigitsClassifier.kind else ()
    return _config(model.kind, network, {key: float(getattr(model, key)) for key in scalings})


def _config(kind: str, network: dict[str, Any], scalings: dict[str, float]) -> dict[str, Any]:
    shape = network.get("shape") or [network["in_channels"], *[network.get("size") or network["image_size"]] * 2]
    facts = {"format": FORMAT, "kind": kind, "network": network, "shape": list(shape)}
    return facts | {"num_classes": network.get("num_classes")} | scalings


def _weights_of(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {key: _stored(key, value, dtype) for key, value in _network(model).state_dict().items()}


def _stored(key: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight as it goes to disk. Raises ValueError if it is not finite there: half precision ends at 65,504."""
    if dtype not in (None, *PRECISIONS):
        raise ValueError(f"dtype must be one of {', '.join(map(str, PRECISIONS))}, got {dtype}")
    value = value.detach().cpu().contiguous()
    if not value.is_floating_point():
        return value
    stored = value.to(dtype or value.dtype)
    if not stored.isfinite().all():
        raise ValueError(f"weight {key} is not finite in {stored.dtype}: such a model is not saved")
    return stored


def _write(folder: Path, files: dict[str, dict]) -> Path:
    """Writes {"name.json": object, "name.safetensors": tensors} as the content of a folder, all or nothing; returns it."""
    try:
        _refuse_other_files(folder, files)
        _replace(folder, files)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot save to {folder}: {error}. What was there before is untouched.") from error
    return folder


def _refuse_other_files(folder: Path, names: Iterable[str]) -> None:
    """Raises FileExistsError if writing to the folder would delete anything but a saved model."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError("it is a file; name a folder")
    own = {part for name in names for part in (name, *map(str, Path(name).parents))}
    for path in folder.rglob("*") if folder.exists() else ():
        if path.relative_to(folder).as_posix() not in own:
            raise FileExistsError(f"it holds {path.name!r}, which is no part of a saved model; name a new folder")


def _replace(folder: Path, files: dict[str, dict]) -> None:
    """Puts the new files in the place of the old by renaming whole folders; on any failure the old ones stay."""
    partial, previous = _beside(folder, "partial"), _beside(folder, "previous")
    _heal(folder)
    try:
        _remove(partial, previous)
        partial.mkdir(parents=True)
        for name, content in files.items():
            _write_file(partial / name, content)
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
    finally:
        _heal(folder)
        _remove(partial, previous)


def _write_file(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.touch()
    mode = path.stat().st_mode
    if path.suffix == ".json":
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    else:
        save_file(content, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors makes its files private
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _heal(folder: Path) -> None:
    """Brings back the previous version if a save was killed between its two renames."""
    previous = _beside(folder, "previous")
    if not folder.exists() and previous.exists():
        previous.rename(folder)


def _find(name_or_path: str | Path) -> Path:
    """The folder or file of a model by name or path. Raises ValueError if there is none."""
    name, path = str(name_or_path), Path(name_or_path).absolute()
    if isinstance(name_or_path, str) and name in EMBEDDED:
        return EMBEDDED_FOLDER / name
    if isinstance(name_or_path, str) and name in RELEASED:
        if not RELEASED[name].path.is_file():
            raise ValueError(f"{name} is not in {RELEASED[name].path.parent} yet: cmlab fetch {name}")
        return RELEASED[name].path
    previous = _beside(path, "previous")
    if not path.exists() and previous.is_dir():  # a save stands, or was killed, between its two renames
        return previous
    if path.exists():
        return path
    if HUB_ID.fullmatch(name):
        return interop.fetch_from_hub(name)
    known("model or folder", name, [*EMBEDDED, *RELEASED])
    return path  # an embedded model's name as a Path: what is missing there is said on reading it


def _read(place: Path, kind: str | None) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """The config and the weights at a place, whatever their form, and the file that the weights are from."""
    if place.is_file():
        return _read_released(place, kind)
    if (place / interop.INDEX).is_file():
        network, sigmas, weights, path = interop.read(place)
        return _config(ConsistencyModel.kind, network, sigmas) | {"data": None, "facts": {}}, weights, path
    config, path = _read_config(place), place / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{place} is not a saved model: {WEIGHTS} is missing")
    return config, read_safetensors(path), path


def _read_released(path: Path, kind: str | None) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(
            f"{path} is no model: that is a .pt file in the released form, or a folder with {CONFIG} and {WEIGHTS}"
        )
    kind = kind or kind_of(path)
    if kind is None:
        raise ValueError(f"{path.name} does not say what it holds: give kind='denoiser' or kind='consistency'")
    known("kind", kind, [Denoiser.kind, ConsistencyModel.kind])
    weights = read_pt(path)
    try:
        with torch.device("meta"):
            network = build({"name": "unet"} | unet_config(weights)).config
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    released = next((r for r in RELEASED.values() if r.file == path.name), None)
    facts = {} if released is None else {"released": released.name}
    return (
        _config(kind, network, RELEASED_SCALINGS) | {"data": released and released.data, "facts": facts},
        weights,
        path,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        inside = f"; there is one in {folder / 'model'}" if (folder / "model" / CONFIG).is_file() else ""
        raise ValueError(f"{folder} is not a saved model: {CONFIG} is missing{inside}")
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a config of this package: format must be {FORMAT}, got {config.get('format')!r}"
        )
    kind = known(f"kind in {path}:", config.get("kind"), KINDS)
    needed = ["network"] if kind == DigitsClassifier.kind else ["network", "shape", *SCALINGS]
    kinds = {"network": dict, "shape": list} | dict.fromkeys(SCALINGS, (int, float))
    missing = [field for field in needed if not isinstance(config.get(field), kinds[field])]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, or has something else in its place")
    return config


def _assemble(config: dict[str, Any], weights: dict[str, Tensor], path: Path) -> nn.Module:
    """The network that the config describes, with these weights, which came from path."""
    with torch.device("meta"):  # shapes without memory, and no initial weights to draw
        network = _build(config)
    _check_fit(path, {key: tuple(v.shape) for key, v in weights.items()}, network)
    network.load_state_dict(weights, assign=True)
    return network


def _build(config: dict[str, Any]) -> nn.Module:
    if config["kind"] != DigitsClassifier.kind:
        return build(config["network"])
    try:
        return DigitsClassifier(**config["network"])
    except TypeError as error:
        raise ValueError(f"network config {config['network']} does not fit DigitsClassifier: {error}") from error


def _check_fit(path: Path, given: dict[str, tuple[int, ...]], network: nn.Module) -> None:
    """Raises ValueError naming the first weights that the file lacks, has too many of, or has in another shape."""
    expected = {key: tuple(v.shape) for key, v in network.state_dict().items()}
    problems = [f"{key} is missing" for key in expected if key not in given]
    problems += [f"{key} is not part of the network" for key in given if key not in expected]
    problems += [
        f"{key} has shape {given[key]}, the network {expected[key]}"
        for key in expected
        if key in given and given[key] != expected[key]
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{path} does not fit its config: {'; '.join(problems[:3])}{more}")


def _ready(model: nn.Module, config: dict[str, Any], device: str | None, dtype: torch.dtype | None) -> Any:
    model.info = config
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r} is not usable: this torch ({torch.__version__}) finds no GPU here; take 'cpu'"
        )
    return model.to(device=device, dtype=dtype or torch.float32).eval().requires_grad_(False)
