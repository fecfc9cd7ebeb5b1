"""Networks net(x, c_noise, labels): build one from its config, the dictionary that every network carries as .config."""

from __future__ import annotations

from typing import Any

from torch import nn

from cmlab.checks import known
from cmlab.models.small import ResidualMLP
from cmlab.models.unet import UNet

NETWORKS = {"mlp": ResidualMLP, "unet": UNet}


def build(config: dict[str, Any]) -> nn.Module:
    """The network that a config {"name": …, **arguments} describes, freshly initialised.

    Raises ValueError for an unknown name or arguments that the network does not take.
    """
    arguments = dict(config)
    network = NETWORKS[known("network", arguments.pop("name", ""), NETWORKS)]
    try:
        return network(**arguments)
    except TypeError as error:
        raise ValueError(f"network config {config} does not fit {network.__name__}: {error}") from error
