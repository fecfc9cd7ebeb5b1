"""GPU kernels: each file holds the Triton kernels, the same in plain PyTorch, and the operation that torch sees."""

from cmlab.kernels.jvp import attention, jvp_attention
from cmlab.kernels.norm import group_norm_silu
from cmlab.kernels.step import fused_step, normal

__all__ = ["attention", "fused_step", "group_norm_silu", "jvp_attention", "normal"]
