"""cmlab: consistency models, right and small enough to read. The names that most users need, from the rooms that hold them."""

from importlib import import_module

__version__ = "0.1.0"

_ROOMS = [
    "batch", "checkpoints", "continuous", "data", "distances", "downloads", "drawing", "editing", "exact",
    "extractors", "interop", "kernels", "lessons", "metrics", "models", "noise", "objectives", "ode", "pictures",
    "planning", "plots", "prepare", "prepared", "recipes", "released", "run", "sampling", "scaling", "streams",
    "tour", "training", "widgets",
]  # fmt: skip
_HOMES = {
    "ConsistencyModel": "scaling", "Denoiser": "scaling", "RECIPES": "recipes", "Record": "training",
    "check": "lessons", "edit": "editing", "export": "checkpoints", "fast_mode": "lessons", "fetch": "released",
    "get_recipe": "recipes", "interpolate": "editing", "karras_sigmas": "noise", "load": "checkpoints",
    "load_data": "data", "report": "lessons", "sample_heun": "sampling", "save": "checkpoints",
    "sample_multistep": "sampling", "sample_onestep": "sampling", "train": "training",
}  # fmt: skip

__all__ = sorted([*_ROOMS, *_HOMES])


def __getattr__(name: str):
    """Rooms load when they are first asked for: importing torch takes seconds, `cmlab --help` should not."""
    if name in _HOMES:
        return getattr(import_module(f"cmlab.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return import_module(f"cmlab.{name}")
    raise AttributeError(f"module 'cmlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
