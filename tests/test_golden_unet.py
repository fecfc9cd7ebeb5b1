import pytest
import torch
from golden_tools import TINY, arrays, assert_close, facts, tiny_unet

from cmlab.models.unet import UNet, qkv_attention, timestep_embedding
from cmlab.released import IMAGENET64, LSUN256


@pytest.mark.parametrize("name", TINY)
def test_outputs_equal_the_reference(name):
    io = arrays(f"unet_{name}_io")
    assert_close(tiny_unet(name)(io["x"], io["timesteps"], io.get("y")), io["out"])


@pytest.mark.parametrize("name", TINY)
def test_parameters_have_the_reference_names_shapes_and_order(name):
    ours = [[key, list(value.shape)] for key, value in tiny_unet(name).state_dict().items()]
    assert ours == facts(f"unet_{name}")["state_dict"]


@pytest.mark.parametrize(
    ("keys", "arguments", "entries", "parameters"),
    [
        ("unet_keys_imagenet64", IMAGENET64, 541, 295_899_267),
        ("unet_keys_lsun256", LSUN256, 566, 526_304_771),
    ],
)
def test_the_released_architectures_have_the_checkpoints_keys(keys, arguments, entries, parameters):
    with torch.device("meta"):
        state = UNet(**arguments).state_dict()
    assert [[key, list(value.shape)] for key, value in state.items()] == facts(keys)
    assert len(state) == entries and sum(value.numel() for value in state.values()) == parameters


def test_attention_splits_three_then_head_then_channel():
    golden = arrays("attention_core")
    ours = qkv_attention(golden["qkv"], int(golden["num_heads"]))
    assert_close(ours, golden["out_flash"])
    assert_close(ours, golden["out_qkvattention"])
    assert_close(ours, golden["out_legacy_fp16"], 2e-3)  # computed in float16


@pytest.mark.parametrize("dim", [32, 33, 192, 256])
def test_timestep_embedding_equals_the_reference(dim):
    golden = arrays("schedules")
    ours = timestep_embedding(golden["timestep_embedding/timesteps"], dim)
    assert_close(ours, golden[f"timestep_embedding/dim{dim}"], 2e-4)  # angles reach 1553 rad: one last bit is 6e-5
