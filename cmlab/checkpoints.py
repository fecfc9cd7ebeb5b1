"""Saved models: a folder with config.json and model.safetensors, the files of huggingface_hub's PyTorchModelHubMixin.

Nothing is unpickled: a file from a stranger can hold wrong numbers, but no code.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmlab.checks import known
from cmlab.models import build
from cmlab.models.classifier import DigitsClassifier
from cmlab.scaling import ConsistencyModel, Denoiser

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
KINDS = {kind.kind: kind for kind in (Denoiser, ConsistencyModel, DigitsClassifier)}
SCALINGS = ["sigma_data", "sigma_min", "sigma_max"]
PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
EMBEDDED = tuple(sorted(path.parent.name for path in EMBEDDED_FOLDER.glob(f"*/{CONFIG}")))
# The twelve checkpoints of Song et al. (2023), as github.com/openai/consistency_models names them.
RELEASED = tuple(
    name.format(data)
    for data in ("imagenet64", "bedroom256", "cat256")
    for name in ("edm_{}", "cd_{}_l2", "cd_{}_lpips", "ct_{}")
)


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
    folder = Path(folder).absolute()
    config = json.dumps(_describe(model) | {"data": data, "facts": facts}, indent=2)
    weights = {key: _stored(key, value, dtype) for key, value in _network(model).state_dict().items()}
    try:
        _refuse_other_files(folder)
        _replace(folder, config, weights)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot save to {folder}: {error}. What was there before is untouched.") from error
    return folder


def load(name_or_path: str | Path, device: str | None = None, dtype: torch.dtype | None = None) -> Denoiser:
    """A saved Denoiser or ConsistencyModel, by the name of an embedded one ("digits-cd") or by the path of its folder.

    A name comes first: a folder that is called like an embedded model is "./digits-cd".
    Ready to use: in eval mode, without gradients, float32 unless dtype says otherwise; model.info is its config. No
    random numbers are drawn. Raises ValueError for an unknown name (naming the nearest) and for a file that is cut off,
    foreign or does not fit its config.
    """
    folder = _find(name_or_path)
    config = _read_config(folder)
    if config["kind"] == DigitsClassifier.kind:
        raise ValueError(f"{folder} holds a classifier; load it with load_classifier")
    model = KINDS[config["kind"]](_read_network(folder, config), **{key: config[key] for key in SCALINGS})
    return _ready(model, config, device, dtype)


def load_classifier(name_or_path: str | Path, device: str | None = None) -> DigitsClassifier:
    """A saved classifier ("digits-classifier", "tinted-digits-classifier" or a folder), ready to use."""
    folder = _find(name_or_path)
    config = _read_config(folder)
    if config["kind"] != DigitsClassifier.kind:
        raise ValueError(f"{folder} holds a {KINDS[config['kind']].__name__}, no classifier; load it with load")
    return _ready(_read_network(folder, config), config, device, None)


def _network(model: Denoiser | DigitsClassifier) -> nn.Module:
    return model if isinstance(model, DigitsClassifier) else model.net


def _describe(model: Denoiser | DigitsClassifier) -> dict[str, Any]:
    """The config that rebuilds the model."""
    if type(model) not in KINDS.values():
        raise TypeError(f"model must be one of {[k.__name__ for k in KINDS.values()]}, got {type(model).__name__}")
    network = _network(model).config
    shape = network.get("shape") or [network["in_channels"], *[network.get("size") or network["image_size"]] * 2]
    config = {"format": FORMAT, "kind": model.kind, "network": network, "shape": list(shape)}
    config |= {"num_classes": network.get("num_classes")}
    if model.kind != DigitsClassifier.kind:
        config |= {key: float(getattr(model, key)) for key in SCALINGS}
    return config


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


def _refuse_other_files(folder: Path) -> None:
    """Raises FileExistsError if saving to the folder would delete anything but a saved model."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.name not in (CONFIG, WEIGHTS):
            raise FileExistsError(f"it holds {path.name!r}, which is no part of a saved model; name a new folder")


def _replace(folder: Path, config: str, weights: dict[str, Tensor]) -> None:
    """Puts the new files in the place of the old by renaming whole folders; on any failure the old ones stay."""
    partial, previous = _beside(folder, "partial"), _beside(folder, "previous")
    _heal(folder)
    try:
        _remove(partial, previous)
        partial.mkdir(parents=True)
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(config + "\n", encoding="utf-8")
        os.chmod(partial / WEIGHTS, (partial / CONFIG).stat().st_mode)  # safetensors makes its files private
        for name in (WEIGHTS, CONFIG):
            with open(partial / name, "rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
    finally:
        _heal(folder)
        _remove(partial, previous)


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
    """The folder of an embedded model or at a path. Raises ValueError if there is none."""
    name = str(name_or_path)
    embedded, folder = EMBEDDED_FOLDER / name, Path(name).absolute()
    if isinstance(name_or_path, str) and name in EMBEDDED:
        return embedded
    if name in RELEASED:
        raise ValueError(
            f"{name!r} is a released model: its weights are not on disk, and loading released weights is not part of "
            f"this version yet. Embedded: {', '.join(EMBEDDED)}"
        )
    if folder.is_dir():
        return folder
    previous = _beside(folder, "previous")
    if not folder.exists() and previous.is_dir():  # a save stands, or was killed, between its two renames
        return previous
    if folder.exists():
        raise ValueError(f"{folder} is a file; a saved model is a folder with {CONFIG} and {WEIGHTS}")
    known("model or folder", name, [*EMBEDDED, *RELEASED])
    return folder  # an embedded model's name as a Path: what is missing there is said on reading it


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is not a saved model: {CONFIG} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} cannot be read as JSON ({error}); is it cut off?") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        given = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} is not a config of this package: format must be {FORMAT}, got {given!r}")
    kind = known(f"kind in {path}:", config.get("kind"), KINDS)
    needed = ["network"] if kind == DigitsClassifier.kind else ["network", "shape", *SCALINGS]
    kinds = {"network": dict, "shape": list} | dict.fromkeys(SCALINGS, (int, float))
    missing = [field for field in needed if not isinstance(config.get(field), kinds[field])]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, or has something else in its place")
    return config


def _read_network(folder: Path, config: dict[str, Any]) -> nn.Module:
    """The network that the config describes, with the weights of the folder."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} is not a saved model: {WEIGHTS} is missing")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or is no safetensors file ({error})") from error
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then overwritten
        network = _build(config)
    _check_fit(path, {key: tuple(v.shape) for key, v in weights.items()}, network)
    network.load_state_dict(weights)
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
