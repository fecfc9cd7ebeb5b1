import math

import pytest
import torch

from cmlab.exact import GaussianMixtureDenoiser
from cmlab.noise import karras_sigmas
from cmlab.ode import dpm2_step, euler_step, get_solver, heun_step, solve, trajectory, velocity

MIXTURE = GaussianMixtureDenoiser(torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]], dtype=torch.float64), 0.3)


def end_point_error(step, steps):
    start = 10 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fine, coarse = (karras_sigmas(n + 1, 0.05, 10.0) for n in (4096, steps))
    return float((solve(MIXTURE, start, coarse, step=step) - solve(MIXTURE, start, fine)).norm(dim=1).mean())


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (heun_step, 2), (dpm2_step, 2)])
def test_solvers_have_their_order_on_the_exact_ode(step, order):
    measured = math.log2(end_point_error(step, 64) / end_point_error(step, 128))
    assert order - 0.25 < measured < order + 0.35


def test_a_gaussian_shrinks_by_the_closed_form():
    """For one Gaussian of std s the exact flow is x sqrt((s^2 + b^2) / (s^2 + a^2))."""
    gaussian, x = GaussianMixtureDenoiser(torch.zeros(1, 3, dtype=torch.float64), 0.5), torch.randn(8, 3).double()
    got = solve(gaussian, x, karras_sigmas(400, 0.01, 20.0))
    assert torch.allclose(got, x * ((0.25 + 1e-4) / (0.25 + 400)) ** 0.5, rtol=1e-3)


def test_velocity_points_away_from_the_denoised_image():
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert torch.allclose(velocity(lambda x, s, labels: 0 * x, x, 5.0), x / 5)


def test_trajectory_yields_every_level_and_solve_its_end():
    x, sigmas = torch.randn(4, 2).double(), karras_sigmas(9, 0.1, 10.0)
    states = list(trajectory(MIXTURE, x, sigmas))
    assert len(states) == 9 and torch.equal(states[0], x) and torch.equal(states[-1], solve(MIXTURE, x, sigmas))


def test_the_way_up_is_the_way_down_reversed():
    x, sigmas = torch.randn(16, 2).double(), karras_sigmas(300, 0.05, 10.0)
    back = solve(MIXTURE, solve(MIXTURE, 10 * x, sigmas), sigmas.flip(0))
    assert torch.allclose(back, 10 * x, atol=5e-3)


def test_unknown_solver_names_the_nearest():
    with pytest.raises(ValueError, match="unknown solver 'huen'. Did you mean 'heun'"):
        get_solver("huen")
