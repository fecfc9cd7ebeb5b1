from pathlib import Path

import pytest
import torch

from cmlab import prepared
from cmlab.data import load_data, moons, tint

LUMINANCE = torch.tensor([0.2989, 0.5870, 0.1140]).reshape(3, 1, 1)


@pytest.mark.parametrize(("name", "shape"), [("digits", (1, 8, 8)), ("tinted-digits", (3, 16, 16))])
def test_digits_are_real_split_once_and_in_range(name, shape):
    data = load_data(name)
    assert data.images.shape == (1437, *shape) and data.held_out.shape == (360, *shape)
    assert data.images.min() >= -1 and data.images.max() <= 1 and data.images.dtype == torch.float32
    assert data.labels.bincount().min() >= 130 and data.held_out_labels.bincount().min() >= 34


def test_no_digit_is_on_both_sides_of_the_split():
    data = load_data("digits")
    assert torch.cdist(data.held_out.flatten(1), data.images.flatten(1)).min() > 0


@pytest.mark.parametrize("name", ["digits", "tinted-digits", "moons"])
def test_sigma_data_is_near_the_data(name):
    data = load_data(name)
    assert float(data.images.std()) == pytest.approx(data.sigma_data, rel=0.15)


def test_a_tinted_digit_lies_on_the_line_between_its_two_colours():
    pictures = tint(load_data("digits").images[:50], torch.Generator().manual_seed(0))
    pixels = pictures.flatten(2)
    spread = torch.linalg.svdvals(pixels - pixels.mean(2, keepdim=True))
    assert (spread[:, 1] < 1e-4 * spread[:, 0]).all()


def test_tints_can_be_read_and_are_fresh_in_every_batch():
    data, index = load_data("tinted-digits"), torch.arange(40)
    first, labels = data.batch(index, torch.Generator().manual_seed(1))
    second, _ = data.batch(index, torch.Generator().manual_seed(2))
    grey = (first * LUMINANCE).sum(1)
    assert torch.equal(labels, data.labels[:40]) and (first - second).abs().mean() > 0.1
    assert (grey.amax((1, 2)) - grey.amin((1, 2))).min() > 0.5


def test_batches_follow_their_generator():
    data = load_data("tinted-digits")
    a, b = (data.batch(torch.arange(4), torch.Generator().manual_seed(5))[0] for _ in range(2))
    assert torch.equal(a, b)


def test_moons_are_centred_and_two():
    points = moons(20_000, torch.Generator().manual_seed(0))
    assert points.mean(0).abs().max() < 0.02
    assert float(points[:, 0].std()) == pytest.approx(float(points[:, 1].std()), rel=0.1)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown data set 'digts'. Did you mean 'digits'"):
        load_data("digts")
    with pytest.raises(ValueError, match=r"digits must have shape \(2, 1, 8, 8\), got \(2, 8, 8\)"):
        tint(torch.zeros(2, 8, 8), torch.Generator())


def test_an_installed_package_keeps_data_in_the_users_cache_and_not_beside_itself(tmp_path, monkeypatch):
    """Beside an installed cmlab lies another package called datasets."""
    monkeypatch.delenv("CMLAB_DATA", raising=False)
    installed = tmp_path / "site-packages"
    (installed / "datasets").mkdir(parents=True)
    monkeypatch.setattr(prepared, "__file__", str(installed / "cmlab" / "prepared.py"))
    assert prepared.data_folder() == Path.home() / ".cache" / "cmlab" / "datasets"
    (installed / "pyproject.toml").touch()
    assert prepared.data_folder() == installed / "datasets", "in the repository it is the repository's"
