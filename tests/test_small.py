import pytest
import torch
from toys import draws, random_net

from cmlab.models.small import ResidualMLP, fourier


def test_a_fresh_network_says_nothing():
    """Its last layer and its gate start at zero: training begins from D = c_skip x."""
    net = ResidualMLP((1, 8, 8), width=16, depth=1)
    assert torch.equal(net(draws(2, 1, 8, 8), torch.zeros(2)), torch.zeros(2, 1, 8, 8))


def test_level_class_and_input_all_matter():
    net, x = random_net(num_classes=10).eval(), draws(2, 1, 8, 8)
    c_noise, labels = torch.tensor([0.0, 300.0]), torch.tensor([1, 2])
    out = net(x, c_noise, labels)
    assert not torch.allclose(out, net(x, c_noise + 100, labels), atol=1e-3)
    assert not torch.allclose(out, net(x, c_noise, labels + 1), atol=1e-3)
    assert not torch.allclose(out, net(x + 1, c_noise, labels), atol=1e-3)


def test_the_gate_carries_noise_around_the_bottleneck():
    """Width 4 cannot pass 64 numbers on; gate times x can."""
    net = ResidualMLP((1, 8, 8), width=4, depth=1)
    torch.nn.init.ones_(net.gate.bias)
    x = draws(2, 1, 8, 8)
    assert torch.allclose(net(x, torch.zeros(2)), x)


def test_embedding_tells_levels_apart_over_the_whole_range():
    levels = torch.linspace(-6.2, 4.4, 200)  # ln 0.002 … ln 80
    distance = torch.cdist(fourier(levels, 64), fourier(levels, 64)) + 10 * torch.eye(200)
    assert distance.min() > 0.05


def test_a_network_can_be_rebuilt_from_its_config():
    from cmlab.models import build

    net = random_net(num_classes=3, dropout=0.1)
    again = build(net.config)
    again.load_state_dict(net.state_dict())
    x, c = draws(2, 1, 8, 8), torch.zeros(2)
    assert torch.equal(net.eval()(x, c, torch.tensor([0, 2])), again.eval()(x, c, torch.tensor([0, 2])))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda net: net(draws(2, 1, 4, 4), torch.zeros(2), torch.zeros(2).long()),
            r"x must have shape \(2, 1, 8, 8\)",
        ),
        (lambda net: net(draws(2, 1, 8, 8), torch.zeros(2)), "labels are missing"),
        (
            lambda net: net(draws(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 10])),
            r"labels must lie in 0 … 9, got 10",
        ),
        (lambda net: net(draws(2, 1, 8, 8), torch.zeros(2), torch.tensor([-1, 0])), "got -1"),
        (lambda net: net(draws(2, 1, 8, 8), torch.zeros(2), torch.zeros(3).long()), r"labels must be \(2,\) integers"),
        (lambda net: random_net()(draws(2, 1, 8, 8), torch.zeros(2), torch.zeros(2).long()), "unconditional network"),
        (lambda net: ResidualMLP((1, 8, 8), dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda net: ResidualMLP((1, 8, 8), num_classes=0), "num_classes must be at least 1, got 0"),
        (lambda net: ResidualMLP((1, 8, 8), embedding=15), "embedding must be even, got 15"),
        (lambda net: ResidualMLP((1, 0, 8)), "every size in shape must be at least 1, got 0"),
        (lambda net: ResidualMLP((1, 8, 8), width=0), "width must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_net(num_classes=10))


def test_an_unknown_network_and_foreign_arguments_are_refused():
    from cmlab.models import build

    with pytest.raises(ValueError, match="unknown network 'mpl'. Did you mean 'mlp'"):
        build({"name": "mpl"})
    with pytest.raises(ValueError, match="does not fit ResidualMLP"):
        build({"name": "mlp", "shape": [2], "heads": 4})
