import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cmlab.noise import karras_sigmas
from cmlab.scaling import ConsistencyModel, Denoiser, boundary_scalings, edm_scalings, per_image


class Constant(nn.Module):
    """A network whose output is easy to see."""

    def forward(self, x, c_noise, labels=None):
        self.seen = x, c_noise
        return torch.full_like(x, 3.0)


@given(sigma_min=st.floats(1e-4, 0.5), sigma_data=st.floats(0.05, 5), seed=st.integers(0, 10))
def test_boundary_condition_holds_bit_for_bit(sigma_min, sigma_data, seed):
    model = ConsistencyModel(Constant(), sigma_data, sigma_min, 80.0)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    x[0] = 0  # a network term of 1e-10 would show here
    lowest = karras_sigmas(18, sigma_min, 80.0)[-1]
    for sigma in (sigma_min, lowest, lowest.float(), lowest.float().expand(4)):
        assert torch.equal(model(x, sigma), x)


@given(sigma=st.floats(1e-3, 1e3), sigma_data=st.floats(0.05, 5))
def test_edm_gives_the_network_unit_variance_input_and_target(sigma, sigma_data):
    c_skip, c_out, c_in = edm_scalings(torch.tensor(sigma, dtype=torch.float64), sigma_data)
    assert float(c_in**2 * (sigma**2 + sigma_data**2)) == pytest.approx(1)
    # target (y - c_skip (y + n)) / c_out, with independent y and n: Karras et al. (2022), app. B.6
    assert float(((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2) == pytest.approx(1)


def test_boundary_scalings_approach_edms_far_above_sigma_min():
    sigma = torch.tensor([5.0, 80.0], dtype=torch.float64)
    for ours, theirs in zip(boundary_scalings(sigma, 0.5, 0.002), edm_scalings(sigma, 0.5), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3)


def test_input_scale_is_the_inverse_root_not_the_inverse():
    """A widely used training script forgets the root: at sigma 80 its network sees an input 80 times too small."""
    _, _, c_in = edm_scalings(torch.tensor(80.0), 0.5)
    assert float(c_in * (80**2 + 0.5**2) ** 0.5) == pytest.approx(1)


def test_output_scale_is_zero_at_sigma_min_and_carries_sigma_data():
    """Peers drop sigma_min (then the boundary fails), or square sigma_data (then it is half)."""
    _, c_out, _ = boundary_scalings(torch.tensor([0.002, 80.0], dtype=torch.float64), 0.5, 0.002)
    assert c_out[0] == 0 and float(c_out[1]) == pytest.approx(0.5, rel=1e-3)


def test_the_network_sees_scaled_input_and_250_log_sigma():
    net = Constant()
    Denoiser(net)(torch.ones(2, 1, 4, 4), torch.tensor([0.5, 2.0]))
    x, c_noise = net.seen
    assert torch.allclose(c_noise, 250 * torch.tensor([0.5, 2.0]).log())
    assert torch.allclose(x[:, 0, 0, 0], torch.tensor([0.5, 4.25]).rsqrt())


def test_solver_state_stays_in_float32_for_half_precision_input():
    assert per_image(0.1, torch.zeros(2, 1, 4, 4, dtype=torch.float16)).dtype == torch.float32
    assert per_image(0.1, torch.zeros(2, 1, 4, 4, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (0.0, "sigma must be finite and above 0, got 0"),
        (-1.0, "above 0, got -1"),
        (float("nan"), "above 0, got nan"),
        (torch.ones(3), r"number or have shape \(2,\), got shape \(3,\)"),
    ],
)
def test_bad_sigma_is_named(sigma, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(Constant())(torch.zeros(2, 1, 4, 4), sigma)


def test_integer_images_are_refused():
    with pytest.raises(TypeError, match="floating-point tensor, got dtype torch.uint8"):
        Denoiser(Constant())(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 1.0)


def test_bad_ranges_are_named():
    with pytest.raises(ValueError, match="sigma_data must be a finite number above 0, got 0"):
        Denoiser(Constant(), sigma_data=0)
    with pytest.raises(ValueError, match="need 0 < sigma_min <= sigma_max"):
        ConsistencyModel(Constant(), sigma_min=2, sigma_max=1)


def test_a_level_below_sigma_min_is_refused_by_a_consistency_model():
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="sigma must be at least sigma_min = 0.002, got 0.001"):
        ConsistencyModel(Constant())(x, torch.tensor([1.0, 0.001]))
    assert torch.equal(ConsistencyModel(Constant())(x, torch.tensor(0.002).float()), x), "rounded to float32"
