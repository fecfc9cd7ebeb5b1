import json

import pytest
import torch
from golden_tools import tiny_unet
from torch.nn.attention import SDPBackend, sdpa_kernel
from toys import draws

from cmlab.models import build
from cmlab.models.unet import UNet, timestep_embedding

SMALL = dict(
    image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=(2,),
    channel_mult=(1, 2), num_classes=10, num_head_channels=16, use_scale_shift_norm=True, resblock_updown=True,
)  # fmt: skip
X, C_NOISE, LABELS = draws(2, 3, 8, 8), torch.tensor([-900.0, 400.0]), torch.tensor([3, 9])


def random_unet(**changes) -> UNet:
    """A small U-Net with nothing at zero."""
    torch.manual_seed(0)
    net = UNet(**{**SMALL, **changes})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def test_a_fresh_network_says_nothing():
    assert torch.equal(UNet(**SMALL)(X, C_NOISE, LABELS), torch.zeros_like(X))


def test_every_parameter_learns():
    net = random_unet(model_channels=64)  # at 32 a group is one channel, and its norm removes the bias before it
    net(X, C_NOISE, LABELS).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.norm() < 1e-5] == []


def test_the_output_depends_on_noise_level_and_label():
    net = random_unet().requires_grad_(False)
    out = net(X, C_NOISE, LABELS)
    assert not torch.allclose(net(X, C_NOISE + 100, LABELS), out, atol=1e-3)
    assert not torch.allclose(net(X, C_NOISE, LABELS - 1), out, atol=1e-3)


def test_the_picture_does_not_depend_on_the_batch():
    net = random_unet().requires_grad_(False)
    alone = net(X[1:], C_NOISE[1:], LABELS[1:])
    assert torch.allclose(net(X, C_NOISE, LABELS)[1:], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["num_heads", "ssn_class"])
def test_the_attention_backend_does_not_show(name):
    net, size = tiny_unet(name), tiny_unet(name).config["image_size"]
    x, labels = draws(2, 3, size, size), LABELS if name == "ssn_class" else None
    with sdpa_kernel(SDPBackend.MATH):
        plain = net(x, C_NOISE, labels)
    assert torch.allclose(net(x, C_NOISE, labels), plain, atol=1e-5)


def test_memory_layout_does_not_show():
    net, last = tiny_unet("three_level"), torch.channels_last
    x = draws(2, 3, 16, 16)
    labels = torch.tensor([0, 6])
    assert torch.allclose(net(x.to(memory_format=last), C_NOISE, labels), net(x, C_NOISE, labels), atol=1e-5)


def test_larger_pictures_than_planned_go_through():
    assert random_unet()(draws(1, 3, 16, 24), C_NOISE[:1], LABELS[:1]).shape == (1, 3, 16, 24)


def test_half_precision_weights_take_and_give_float32():
    net = random_unet().requires_grad_(False)
    exact = net(X, C_NOISE, LABELS)
    half = net.bfloat16()(X, C_NOISE, LABELS)
    assert half.dtype == torch.float32
    assert (half - exact).norm() < 0.05 * exact.norm()  # bfloat16 keeps 8 bits


def test_forward_compiles_without_a_graph_break():
    report = torch._dynamo.explain(random_unet())(X, C_NOISE, LABELS)
    assert report.graph_break_count == 0 and report.graph_count == 1


@pytest.mark.parametrize("changes", [{}, {"resblock_updown": False, "num_head_channels": -1, "num_heads": 2}])
def test_config_is_json_and_builds_the_same_network(changes):
    net = random_unet(**changes)
    again = build(json.loads(json.dumps(net.config)))
    again.load_state_dict(net.state_dict())
    assert again.config == net.config and net.config["name"] == "unet"
    assert torch.equal(again.eval()(X, C_NOISE, LABELS), net(X, C_NOISE, LABELS))


def test_training_mode_drops_and_eval_mode_does_not():
    net = random_unet(dropout=0.5)
    assert torch.equal(net(X, C_NOISE, LABELS), net(X, C_NOISE, LABELS))
    net.train()
    assert not torch.equal(net(X, C_NOISE, LABELS), net(X, C_NOISE, LABELS))


def test_embedding_begins_with_cosines_and_ends_with_sines():
    embedding = timestep_embedding(torch.tensor([0.0, 0.5]), 7)
    assert embedding.shape == (2, 7) and embedding.dtype == torch.float32
    assert torch.equal(embedding[0], torch.tensor([1.0, 1, 1, 0, 0, 0, 0]))
    assert embedding[1, 0] == pytest.approx(torch.tensor(0.5).cos()) and embedding[1, 6] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((X, C_NOISE, LABELS + 1), r"labels must lie in 0 … 9, got 10"),
        ((X, C_NOISE, None), "labels are missing: this network is conditional on 10 classes"),
        ((X, C_NOISE, LABELS[:1]), r"labels must be \(2,\) integers"),
        ((X[:, :1], C_NOISE, LABELS), r"x must have shape \(B, 3, H, W\).*got \(2, 1, 8, 8\)"),
        ((X[..., :7], C_NOISE, LABELS), "multiples of 2"),
        ((X, C_NOISE[:1], LABELS), r"c_noise must have shape \(2,\), got \(1,\)"),
    ],
)
def test_input_that_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        random_unet()(*call)


def test_labels_for_an_unconditional_network_are_refused():
    with pytest.raises(ValueError, match="unconditional"):
        random_unet(num_classes=None)(X, C_NOISE, LABELS)


def test_labels_are_a_tensor():
    with pytest.raises(TypeError, match=r"labels must be a torch tensor \(\d,\) of integers, got \["):
        random_unet()(X, C_NOISE, LABELS.tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_resolutions": (16, 8)}, r"downsampling factors .* some of \[1, 2\], got \[16, 8\]"),
        ({"model_channels": 48}, r"multiple of 32, got \[48, 96\]"),
        ({"num_head_channels": 24}, "num_head_channels must divide the 64 channels .* got 24"),
        ({"num_head_channels": None, "num_heads": 3}, "num_heads must divide the 64 channels .* got 3"),
        ({"image_size": 9}, "image_size must be a multiple of .* 2, got 9"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**SMALL, **changes})
