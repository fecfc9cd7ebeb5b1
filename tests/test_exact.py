import math

import pytest
import torch

from cmlab.exact import DatasetDenoiser, GaussianMixtureDenoiser


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 1.0, 1e3])
def test_chunks_change_nothing_at_any_sigma(sigma):
    data, x = draws(300, 3, 4, 4), draws(5, 3, 4, 4, seed=1)
    assert torch.allclose(DatasetDenoiser(data, chunk=7)(x, sigma), DatasetDenoiser(data)(x, sigma), atol=1e-6)


def test_a_point_of_the_data_stays_where_it_is_at_tiny_noise():
    data = draws(200, 3, 8, 8)
    assert torch.equal(DatasetDenoiser(data)(data[:4] + 1e-5 * draws(4, 3, 8, 8, seed=2), 1e-4), data[:4])


def test_endless_noise_leaves_only_the_mean():
    data = draws(200, 2)
    assert torch.allclose(DatasetDenoiser(data)(draws(3, 2), 1e3), data.mean(0).expand(3, 2), atol=1e-2)


def test_labels_restrict_to_a_class_also_across_chunks():
    data, labels = draws(60, 2), torch.arange(60) // 30
    x = draws(4, 2, seed=3)
    both = DatasetDenoiser(data, labels, chunk=8)(x, 0.5, torch.tensor([0, 1, 0, 1]))
    alone = [DatasetDenoiser(data[labels == c])(x, 0.5) for c in (0, 1)]
    assert torch.allclose(both, torch.stack([alone[0][0], alone[1][1], alone[0][2], alone[1][3]]), atol=1e-6)


def test_mixture_of_points_is_the_data_set():
    data, x = draws(40, 2), draws(6, 2, seed=4)
    for sigma in (0.05, 0.5, 5.0):
        assert torch.allclose(GaussianMixtureDenoiser(data, 0.0)(x, sigma), DatasetDenoiser(data)(x, sigma), atol=1e-5)


def test_one_gaussian_denoises_by_its_wiener_filter():
    mean, x = torch.tensor([[1.0, -2.0]]), draws(5, 2)
    got = GaussianMixtureDenoiser(mean, 0.5)(x, 1.0)
    assert torch.allclose(got, (0.25 * x + 1.0 * mean) / 1.25, atol=1e-6)


def test_the_denoiser_is_the_best_one():
    """E[y | x] has the smallest mean squared error: any shift of it is worse."""
    mixture = GaussianMixtureDenoiser(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.2, 0.4]))
    g = torch.Generator().manual_seed(0)
    k = torch.randint(0, 2, (20_000,), generator=g)
    y = mixture.means[k] + mixture.stds[k, None].float() * torch.randn(20_000, 2, generator=g)
    x = y + 0.7 * torch.randn(20_000, 2, generator=g)
    best, error = mixture(x, 0.7), lambda d: float((d - y).square().mean())
    assert all(error(best + shift) > error(best) for shift in (0.05, -0.05))
    assert error(0.95 * best) > error(best) < error(1.05 * best)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DatasetDenoiser(torch.tensor([[float("nan")]])), "data must be finite, got 1 NaN"),
        (lambda: DatasetDenoiser(torch.zeros(0, 2)), "at least one item"),
        (
            lambda: DatasetDenoiser(torch.zeros(3, 2))(torch.zeros(1, 3), 1.0),
            r"x must have shape \(B, 2\), got \(1, 3\)",
        ),
        (lambda: DatasetDenoiser(torch.zeros(3, 2))(torch.zeros(1, 2), 0.0), "sigma must be finite and above 0"),
        (
            lambda: DatasetDenoiser(torch.zeros(2, 2), torch.zeros(2))(torch.zeros(1, 2), 1.0, torch.tensor([7])),
            "got 7",
        ),
        (lambda: DatasetDenoiser(torch.zeros(2, 2))(torch.full((1, 2), math.nan), 1.0), "x must be finite, got 2 NaN"),
        (
            lambda: DatasetDenoiser(torch.zeros(2, 2), torch.zeros(2))(torch.zeros(3, 2), 1.0, torch.tensor([0])),
            r"labels must have shape \(3,\), got \(1,\)",
        ),
        (
            lambda: GaussianMixtureDenoiser(torch.zeros(2, 2), 1.0)(torch.full((1, 2), math.inf), 1.0),
            "x must be finite",
        ),
        (lambda: GaussianMixtureDenoiser(torch.zeros(2, 2), -1.0), "stds must be 2 finite numbers, none negative"),
        (lambda: GaussianMixtureDenoiser(torch.zeros(2, 2), math.inf), "stds must be 2 finite numbers, none negative"),
        (lambda: GaussianMixtureDenoiser(torch.zeros(2, 2), 1.0, [1, 1, 1]), "weights must be 2 finite numbers"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
