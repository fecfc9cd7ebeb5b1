"""How the processes of a training share it: each keeps whole models (DDP), or a share of every weight (FSDP2)."""

from __future__ import annotations

import atexit
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cmlab.checks import known
from cmlab.scaling import Denoiser, TrigFlow

PARALLEL = ["ddp", "fsdp"]
PATIENCE = timedelta(hours=3)  # the others wait while the first process draws and measures samples


def accelerator_on(device: str | None) -> Accelerator:
    """accelerate's side of a run. The first one in a process decides on the device: raises ValueError for another."""
    try:
        patience = InitProcessGroupKwargs(timeout=PATIENCE)
        accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[patience])
        own, asked = accelerator.device, torch.device(device or accelerator.device)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"device {device!r} cannot be had: {error}") from error
    if asked.type != own.type or asked.index not in (None, own.index):
        raise ValueError(f"device {device!r} was asked for, this process runs on {own}")
    if accelerator.num_processes > 1:
        _part_at_exit()
    return accelerator


@cache  # once a process
def _part_at_exit() -> None:
    """Ends the group of processes before the interpreter: its threads, if they outlive it, abort a job whose work is done."""
    atexit.register(lambda: distributed.is_initialized() and distributed.destroy_process_group())


class Sharing:
    """What "ddp" and "fsdp" do to the modules of one process; in a training of one process they do nothing, and are the same.

    Raises ValueError for another name.
    """

    def __init__(self, parallel: str, accelerator: Accelerator):
        self.device, ranks = accelerator.device, accelerator.num_processes
        sharded = known("parallel", parallel, PARALLEL) == "fsdp" and ranks > 1
        self.mesh = init_device_mesh(self.device.type, (ranks,)) if sharded else None
        self.copies = ranks > 1 and not sharded

    def place(self, model: nn.Module) -> nn.Module:
        """Puts a model on the device; of a sharded one only this process's share, layer by layer. Returns it."""
        if self.mesh is None or not isinstance(model, Denoiser):
            return model.to(self.device)
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        layers = [layer for some in reversed(lists) for layer in some if not isinstance(layer, nn.ModuleList)]
        if isinstance(model, TrigFlow) and model.log_weight is not None:
            layers.append(model.log_weight)  # is called by itself
        for module in (*layers, model):  # from the inside out
            fully_shard(module, mesh=self.mesh)
        if isinstance(model, TrigFlow):
            register_fsdp_forward_method(model, "velocity")  # its objective calls that instead of the model
        return model

    def join(self, loss: nn.Module) -> nn.Module:
        """The module whose backward pass averages gradients over the processes: all placed models that a loss calls are its own."""
        if self.mesh is not None:
            return fully_shard(loss, mesh=self.mesh)
        return DistributedDataParallel(loss) if self.copies else loss


def averaging(loss: nn.Module, now: bool) -> AbstractContextManager:
    """Where a backward pass of a joined loss averages gradients over the processes now, or leaves that to a later one."""
    if isinstance(loss, FSDPModule):
        loss.set_requires_gradient_sync(now)
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) and not now else nullcontext()


def gathered(state: Any, keep: bool = True) -> Any:
    """A state, of tensors in dictionaries and lists, with every shard put together, on the CPU: what DDP would have there.

    All processes must call it. keep=False takes part and leaves nothing in the place of what was sharded.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, dict):
        return {key: gathered(value, keep) for key, value in state.items()}
    return [gathered(value, keep) for value in state] if isinstance(state, list) else state


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """load_state_dict of a gathered state."""
    own = model.state_dict()
    model.load_state_dict({key: _as_held(value, own.get(key)) for key, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """load_state_dict of a gathered state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = {
        k: {name: _as_held(value, parameters[k]) for name, value in moments.items()}
        for k, moments in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": held})


def _as_held(value: Tensor, own: Tensor | None) -> Tensor:
    """A whole tensor sharded as its counterpart here is. Counts of steps have no shards."""
    if isinstance(own, DTensor) and value.shape == own.shape:
        return distribute_tensor(value, own.device_mesh, own.placements)
    return value
