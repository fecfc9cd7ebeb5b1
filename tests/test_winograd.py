import copy

import pytest
import torch
import torch.nn.functional as F
from test_unet import C_NOISE, LABELS, X, random_unet
from torch import nn
from toys import draws

from cmlab.models.winograd import INPUT, OUTPUT, UP, WEIGHT, WinogradConv2d, combine, winograd

ROUNDING = {UP: 1, 2: 1, 4: 10}  # m = 4 multiplies by up to 8 and 1/24: in these layers it is 8 to 12 times further off


@pytest.mark.parametrize("m", [2, 4])
def test_the_algorithm_is_a_correlation(m):
    """In one dimension, with numbers that are exact: A^T [(G g) * (B^T d)]."""
    torch.manual_seed(0)
    g, d = (torch.randint(-50, 50, (n,)).double() for n in (3, m + 2))
    products = [a * b for a, b in zip(combine(WEIGHT[m], list(g)), combine(INPUT[m], list(d)), strict=True)]
    assert torch.allclose(torch.stack(combine(OUTPUT[m], products)), d.unfold(0, 3, 1) @ g)


def test_after_enlarging_three_products_give_two_results():
    torch.manual_seed(0)
    g, (a, b, c) = (torch.randint(-50, 50, (3,)).double() for _ in range(2))
    products = [p * q for p, q in zip(combine(WEIGHT[UP], list(g)), combine(INPUT[UP], [a, b, c]), strict=True)]
    enlarged = torch.stack([a, b, b, c])  # one row of the picture, around the two pixels of b
    assert torch.equal(torch.stack(combine(OUTPUT[UP], products)), enlarged.unfold(0, 3, 1) @ g)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(k, torch.float32) for k in (UP, 2, 4)] + [(UP, torch.bfloat16), (2, torch.bfloat16)]
)
def test_it_is_the_convolution(kind, dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 40, 3, padding=1).to(dtype).requires_grad_(False)
    # Whole tiles and every rest. No two sizes are equal at first, and none is 1: the transforms are compiled once for all.
    for size in ((6, 10), (8, 8), (5, 7)):
        x = draws(7, 24, *size).to(dtype)
        if kind == UP:
            x = F.interpolate(x.float(), scale_factor=2).to(dtype)
        exact = copy.deepcopy(conv).double()(x.double())
        apart = (WinogradConv2d(conv, kind)(x) - exact).abs().max()
        assert apart < 20 * ROUNDING[kind] * torch.finfo(dtype).eps * exact.std()


def test_half_precision_keeps_to_the_small_tile():
    kinds = [layer.kind for layer in winograd(random_unet().bfloat16()).modules() if isinstance(layer, WinogradConv2d)]
    assert set(kinds) == {UP, 2}


@pytest.mark.parametrize("resblock_updown", [True, False])
def test_the_network_computes_the_same(resblock_updown):
    net = random_unet(resblock_updown=resblock_updown).requires_grad_(False)
    plain = net(X, C_NOISE, LABELS)
    fewer = winograd(copy.deepcopy(net))
    replaced = [layer.kind for layer in fewer.modules() if isinstance(layer, WinogradConv2d)]
    left = [layer for layer in fewer.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)]
    assert replaced.count(UP) == 1 and 4 in replaced
    assert all(min(c.in_channels, c.out_channels) == 3 or c.stride == (2, 2) for c in left)
    assert torch.allclose(fewer(X, C_NOISE, LABELS), plain, atol=1e-4 * float(plain.std()))
