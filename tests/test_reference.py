"""Against the released code itself, with fresh random weights. Collected only where a clone is: see reference_code."""

import pytest
import torch
from golden_tools import assert_close, assert_same_direction
from reference_code import reference_modules
from toys import draws

from cmlab.models.unet import UNet, timestep_embedding
from cmlab.noise import karras_sigmas
from cmlab.sampling import sample_heun, sample_ts
from cmlab.scaling import ConsistencyModel, Denoiser

BASE = dict(
    image_size=16, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, attention_resolutions=(2,)
)  # fmt: skip
NETWORKS = [
    dict(channel_mult=(1, 2), num_classes=10, num_head_channels=16, use_scale_shift_norm=True, resblock_updown=True),
    dict(channel_mult=(2, 1, 3), num_heads=4, use_scale_shift_norm=False, resblock_updown=True),
    dict(channel_mult=(1, 2), num_heads=4, num_heads_upsample=2, num_classes=3, resblock_updown=False),
]


@pytest.fixture(scope="module")
def cm():
    with reference_modules() as load:
        yield load


def pair(cm, arguments, seed=0):
    """The reference's U-Net and ours with the same random weights, moved across by load_state_dict alone."""
    theirs, ours = cm("cm.unet").UNetModel(**BASE, **arguments), UNet(**BASE, **arguments)
    generator = torch.Generator().manual_seed(seed)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval().requires_grad_(False), ours.eval().requires_grad_(False)


def inputs(arguments, batch=3, size=16):
    labels = torch.arange(batch) if "num_classes" in arguments else None
    return draws(batch, 3, size, size), torch.linspace(-1500, 1000, batch), labels


@pytest.mark.parametrize("arguments", NETWORKS)
def test_unets_agree(cm, arguments):
    theirs, ours = pair(cm, arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, c_noise, labels = inputs(arguments)
    assert_close(ours(x, c_noise, labels), theirs(x, c_noise, labels))


def test_gradients_agree(cm):
    theirs, ours = (net.requires_grad_(True) for net in pair(cm, NETWORKS[0]))
    for net in (theirs, ours):
        net(*inputs(NETWORKS[0])).square().mean().backward()
    a, b = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (ours, theirs))
    assert_same_direction(a, b)


def test_embeddings_agree(cm):
    timesteps = torch.linspace(-1500, 1100, 50)
    assert_close(timestep_embedding(timesteps, 65), cm("cm.nn").timestep_embedding(timesteps, 65), 2e-4)  # last bit


class Injected:
    """The reference's generator with given draws, then zeros: its Heun sampler draws in every step, used or not."""

    def __init__(self, noise):
        self.rest = iter(noise)

    def randn(self, *shape, device):
        return next(self.rest)

    def randn_like(self, x):
        return next(self.rest, torch.zeros_like(x))


@pytest.mark.parametrize("distilled", [False, True])
def test_samples_agree(cm, distilled):
    theirs, net = pair(cm, NETWORKS[0])
    released = cm("cm.karras_diffusion")
    labels, ts, noise = torch.tensor([1, 2]), (0, 3, 6, 9), draws(4, 2, 3, 16, 16)
    stream = Injected(noise)
    x0 = released.karras_sample(
        released.KarrasDenoiser(loss_norm="l2", distillation=distilled), theirs, (2, 3, 16, 16), steps=10,
        model_kwargs={"y": labels}, sampler="multistep" if distilled else "heun", ts=ts, generator=stream, device="cpu",
    )  # fmt: skip
    if distilled:
        ours = sample_ts(ConsistencyModel(net), noise[0], ts, 10, labels=labels, noises=noise[1:], clip_denoised=True)
    else:
        ours = sample_heun(Denoiser(net), noise[0], karras_sigmas(10), labels, clip_denoised=True)
    assert_close(ours.clamp(-1, 1), x0)
