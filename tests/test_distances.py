import lpips
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models import squeezenet1_1
from toys import draws, saved, weights_file

from cmlab.distances import BACKBONES, LPIPS, PseudoHuber, l1, l2, load_lpips


@pytest.mark.parametrize(
    "distance", [l1, l2, PseudoHuber(), LPIPS(metric=lambda a, b: (a - b).square().mean((1, 2, 3)))]
)
def test_distances_are_zero_to_itself_and_symmetric(distance):
    a, b = draws(3, 3, 8, 8), draws(3, 3, 8, 8, seed=1)
    assert distance(a, b).shape == (3,) and (distance(a, b) > 0).all()
    assert torch.allclose(distance(a, a), torch.zeros(3), atol=1e-6)
    assert torch.allclose(distance(a, b), distance(b, a))


@given(scale=st.floats(1e-4, 1e3))
def test_pseudo_huber_lies_between_square_and_root(scale):
    a, b = torch.zeros(1, 3, 32, 32, dtype=torch.float64), torch.full((1, 3, 32, 32), scale, dtype=torch.float64)
    c, norm = 0.00054 * 3072**0.5, scale * 3072**0.5
    assert float(PseudoHuber()(a, b)) == pytest.approx((norm**2 + c**2) ** 0.5 - c, rel=1e-9)
    assert float(PseudoHuber()(a, b)) <= min(norm, norm**2 / (2 * c)) * (1 + 1e-9)


def test_pseudo_huber_is_of_the_whole_vector_not_of_each_element():
    """Peers apply the vector's c to each element; below c = 0.03 that is plain L2, and a factor of 30 off here."""
    a, b = torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.02)
    c = 0.00054 * 3072**0.5
    per_element = ((0.02**2 + c**2) ** 0.5 - c) * 3072
    assert abs(float(PseudoHuber()(a, b)) / per_element - 1) > 0.5


def test_pseudo_huber_has_a_finite_gradient_where_the_images_agree():
    a = draws(2, 1, 4, 4).requires_grad_()
    PseudoHuber(0.03)(a, a.detach()).sum().backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_lpips_enlarges_small_images_and_maps_them_to_zero_one():
    seen = []
    LPIPS(metric=lambda a, b: seen.append(a) or a.mean((1, 2, 3)))(-torch.ones(2, 3, 64, 64), torch.ones(2, 3, 64, 64))
    assert seen[0].shape == (2, 3, 224, 224) and seen[0].abs().max() < 1e-6


def test_lpips_leaves_large_images_at_their_size():
    seen = []
    LPIPS(metric=lambda a, b: seen.append(a) or a.mean((1, 2, 3)))(
        torch.ones(1, 3, 256, 256), torch.ones(1, 3, 256, 256)
    )
    assert seen[0].shape == (1, 3, 256, 256)


def test_lpips_is_the_authors_network_on_the_backbone_of_the_file(offline, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone, theirs = squeezenet1_1(), lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    for number in range(1, 8):
        getattr(theirs.net, f"slice{number}").load_state_dict(slice_of(backbone, theirs, number))
    address = weights_file(offline, saved(backbone.state_dict())).as_uri()
    monkeypatch.setitem(BACKBONES, "squeeze", address)
    a, b, before = draws(2, 3, 224, 224).clamp(-1, 1), draws(2, 3, 224, 224, seed=1).clamp(-1, 1), torch.get_rng_state()
    ours = LPIPS("squeeze")(a, b)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.allclose(ours, theirs(a, b).flatten(), rtol=1e-4) and ours.min() > 1e-3


def slice_of(backbone, network, number):
    """The layers of torchvision's network that lpips calls one slice, under lpips' names."""
    own = getattr(network.net, f"slice{number}").state_dict()
    return {key: backbone.features.state_dict()[key] for key in own}


def test_missing_backbone_says_what_to_fetch_and_where_to_put_it(offline):
    with pytest.raises(
        FileNotFoundError,
        match=r"LPIPS needs the vgg .*hub/checkpoints.*Fetch https://download.pytorch.org/models/vgg16-397923af",
    ):
        load_lpips("vgg")


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"b must have shape \(1, 2\), got \(1, 3\)"):
        l2(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="c must be a finite number above 0, got 0"):
        PseudoHuber(0.0)(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="LPIPS takes images"):
        LPIPS()(torch.zeros(1, 2), torch.zeros(1, 2))
