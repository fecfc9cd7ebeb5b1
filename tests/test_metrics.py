import pytest
import torch
import torch_fidelity
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from toys import draws

from cmlab.data import load_data
from cmlab.metrics import (
    ClassStatistics,
    Features,
    GaussianStatistics,
    Reservoir,
    Summary,
    evaluate,
    frechet_distance,
    frechet_from_statistics,
    get_extractor,
    inception_score,
    kernel_distance,
    nearest_neighbour_ratio,
    precision_recall,
    sliced_wasserstein,
)

SEEDS = st.integers(0, 2**31 - 1)


# --- against torch-fidelity -----------------------------------------------------------------------------------------


class TintedEyes(FeatureExtractorBase):
    """Our tinted digits classifier as torch-fidelity wants it: 8-bit images in, a tuple of named features out."""

    INPUT_IMAGE_SIZE = 16

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        self.extract = get_extractor("tinted-digits-classifier")

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled():
        return False

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 3, 16, 16, dtype=torch.uint8)

    def forward(self, pixels):
        seen = self.extract(pixels / 127.5 - 1)
        named = {"features": seen.features, "logits": seen.probabilities.log()}  # their softmax undoes our log
        return tuple(named[name] for name in self.features_list)


class Pixels(torch.utils.data.Dataset):
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.pixels[index]


def test_all_metrics_agree_with_torch_fidelity():
    torch_fidelity.register_feature_extractor("tinted-eyes", TintedEyes)
    data, size = load_data("tinted-digits"), 300
    fake = (data.held_out[:size] + 0.2 * draws(size, 3, 16, 16)).clamp(-1, 1)
    fake, real = (((images + 1) * 127.5).round().byte() for images in (fake, data.images[:size]))
    theirs = torch_fidelity.calculate_metrics(
        input1=Pixels(fake), input2=Pixels(real), feature_extractor="tinted-eyes", cuda=False, verbose=False,
        isc=True, isc_splits=1, fid=True, kid=True, kid_subsets=1, kid_subset_size=size, prc=True,
        batch_size=100, save_cpu_ram=True,  # the latter: no worker processes
    )  # fmt: skip
    ours = evaluate(fake / 127.5 - 1, real / 127.5 - 1, "tinted-digits-classifier")
    assert ours["fd"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)  # theirs is float32
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)  # theirs is float32
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]))
    assert 0 < ours["precision"] < 1 and ours["fd"] > 1  # none of the above is trivially equal


# --- truths ---------------------------------------------------------------------------------------------------------


def gaussian_features(seed, n=40, d=6):
    """Correlated features with a mean of their own."""
    return draws(n, d, seed=seed).double() @ draws(d, d, seed=seed + 1).double() + draws(d, seed=seed + 2).double()


def rotation(seed, d=6):
    return torch.linalg.qr(draws(d, d, seed=seed).double()).Q


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_frechet_distance_is_a_distance_between_gaussians(seed):
    a, b = gaussian_features(seed), gaussian_features(seed + 10, n=4)  # b: fewer samples than features
    distance, turn = frechet_distance(a, b), rotation(seed)
    assert distance > 0
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-6)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(distance, rel=1e-6)
    assert frechet_distance(a + 5, b + 5) == pytest.approx(distance, rel=1e-6)
    assert frechet_distance(2 * a, 2 * b) == pytest.approx(4 * distance, rel=1e-6)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-7 * float(a.square().sum(1).max()))


def test_frechet_distance_of_independent_features_is_the_closed_form():
    """Diagonal covariances: |m_a - m_b|^2 + sum (s_a - s_b)^2."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).double()  # 8 rows, exactly uncorrelated
    a, b = signs * torch.tensor([1.0, 2.0, 0.0]), signs * torch.tensor([3.0, 0.5, 0.0]) + torch.tensor([0.0, 0.0, 4.0])
    assert frechet_distance(a, b) == pytest.approx(16 + (4 + 2.25) * 8 / 7, rel=1e-9)


@given(SEEDS, st.lists(st.integers(1, 30), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_statistics_do_not_depend_on_how_the_samples_are_cut_up(seed, sizes):
    features = gaussian_features(seed, n=sum(sizes) + 2) + 1e4  # far from 0, where a sum of squares would lose digits
    probabilities, whole, parts = features.softmax(1), GaussianStatistics().update(features), GaussianStatistics()
    classes = ClassStatistics()
    for rows in torch.arange(len(features)).split([*sizes, 2]):
        parts.update(features[rows])
        classes.update(probabilities[rows])
    assert torch.allclose(parts.mean, whole.mean, rtol=1e-12)
    assert torch.allclose(parts.cov, whole.cov, rtol=1e-8, atol=1e-8)
    assert torch.allclose(whole.cov, torch.cov(features.T), rtol=1e-8, atol=1e-8)
    assert classes.score == pytest.approx(inception_score(probabilities), rel=1e-9)


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_the_order_of_samples_changes_nothing(seed):
    a, b = gaussian_features(seed), gaussian_features(seed + 10, n=50)
    shuffled = a[torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))]
    for metric in (frechet_distance, precision_recall):
        assert metric(shuffled, b) == pytest.approx(metric(a, b), rel=1e-9)
    assert inception_score(shuffled.softmax(1)) == pytest.approx(inception_score(a.softmax(1)), rel=1e-9)
    assert sliced_wasserstein(shuffled, b[:40]) == pytest.approx(sliced_wasserstein(a, b[:40]), rel=1e-9)
    kernel = [kernel_distance(x, b[:40], subsets=1, subset_size=40)[0] for x in (shuffled, a)]
    assert kernel[0] == pytest.approx(kernel[1], rel=1e-9)


def test_the_inception_score_runs_from_one_to_the_number_of_classes():
    assert inception_score(torch.eye(10).repeat(3, 1)) == pytest.approx(10)  # sure of each, all classes alike
    assert inception_score(torch.full((30, 10), 0.1)) == pytest.approx(1)  # unsure of each
    assert inception_score(torch.eye(10)[:1].repeat(30, 1)) == pytest.approx(1)  # sure, but always the same


def test_the_kernel_distance_is_unbiased():
    """Of two halves of one distribution it averages to 0, below it about half of the time; of two it does not."""
    values = torch.tensor(
        [kernel_distance(draws(40, 8, seed=s), draws(40, 8, seed=s + 1000), subsets=1)[0] for s in range(200)]
    )
    assert abs(values.mean()) < 4 * values.std() / 200**0.5 and 0.2 < (values < 0).double().mean() < 0.8
    assert kernel_distance(draws(40, 8), draws(40, 8, seed=1) + 1, subsets=1)[0] > 10 * values.std()


def test_precision_falls_for_bad_samples_and_recall_for_few_modes():
    corners = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    real = corners.repeat_interleave(50, 0) + 0.3 * draws(200, 2)
    one_mode = 0.3 * draws(200, 2, seed=1)
    half_noise = torch.cat([real[::2] + 0.01, torch.full((100, 2), 50.0) + draws(100, 2, seed=2)])
    assert precision_recall(real, real) == (1, 1)
    precision, recall = precision_recall(real, one_mode)
    assert precision > 0.6 and recall <= 0.25
    assert precision_recall(real, half_noise)[0] == pytest.approx(0.5, abs=0.02)


def test_the_nearest_neighbour_ratio_tells_copies_from_new_images():
    train, held_out, new = (draws(300, 1, 4, 4, seed=s) for s in range(3))
    assert nearest_neighbour_ratio(train[:100], train, held_out) == pytest.approx(0, abs=1e-6)
    assert nearest_neighbour_ratio(new, train, held_out) == pytest.approx(1, abs=0.05)
    assert nearest_neighbour_ratio((train + new / 4)[:100], train, held_out) < 0.5


def test_sliced_wasserstein_of_a_shift_is_the_mean_length_of_its_projection():
    """E |cos| over directions of the plane is 2 / pi."""
    a = draws(500, 2)
    assert sliced_wasserstein(a, a) == 0
    shifted = a + torch.tensor([3.0, 4.0])
    assert sliced_wasserstein(a, shifted, projections=4000) == pytest.approx(5 * 2 / torch.pi, rel=0.02)


# --- streams --------------------------------------------------------------------------------------------------------


def numbers_held(part) -> int:
    """How many numbers an accumulator holds in tensors, its parts included."""
    if isinstance(part, torch.Tensor):
        return part.numel()
    return sum(numbers_held(value) for value in vars(part).values()) if hasattr(part, "__dict__") else 0


def test_memory_is_flat_however_many_samples_stream_through():
    summary, held = Summary(kept=Reservoir(size=1000)), []
    for seed in range(50):
        features = draws(1000, 16, seed=seed)
        held.append(numbers_held(summary.update(Features(features, features[:, :10].softmax(1)))))
    assert summary.gaussian.count == 50_000
    assert len(set(held)) == 1 and held[0] < 20_000  # 1000 rows of 16; 50,000 would be 800,000


def test_a_reservoir_keeps_a_short_stream_whole_and_a_fair_part_of_a_long_one():
    short, long = Reservoir(size=500), Reservoir(size=500)
    for rows in torch.arange(5000.0)[:, None].split(300):
        long.update(rows)
    assert torch.equal(short.update(torch.arange(400.0)[:, None]).rows.flatten(), torch.arange(400.0))
    assert len(long.rows.unique()) == 500
    counts = torch.histc(long.rows, bins=5, min=0, max=5000)  # 100 expected in each, standard deviation 8.5
    assert ((counts - 100).abs() < 40).all()


def test_batches_and_one_tensor_give_the_same_evaluation():
    data = load_data("digits")
    samples, options = data.images[:500], dict(labels=data.labels[:500], train=data.images[500:])
    whole = evaluate(samples, data.held_out, **options)
    parts = evaluate(iter(samples.split(90)), iter(data.held_out.split(70)), **options)
    assert parts == pytest.approx(whole, rel=1e-6) and len(parts) == 9


# --- on real digits -------------------------------------------------------------------------------------------------


def test_real_digits_beat_blurred_ones_and_noise_on_every_count():
    data = load_data("digits")
    labels, half = data.held_out_labels, data.images[::2]
    blurred = torch.nn.functional.avg_pool2d(data.held_out, 3, stride=1, padding=1)
    noise = draws(360, 1, 8, 8).clamp(-1, 1)
    real, soft, none = (evaluate(images, half, labels=labels) for images in (data.held_out, blurred, noise))
    assert real["fd"] < 1.5 < soft["fd"] < none["fd"]
    assert real["kid"] < soft["kid"] < none["kid"]
    assert real["accuracy"] >= 0.98 > soft["accuracy"] > none["accuracy"]
    assert min(real["precision"], real["recall"]) > 0.7 > none["precision"]
    assert real["samples"] == 360 and real["reference"] == len(half)


def test_copies_of_the_training_set_score_well_but_for_the_nearest_neighbour_ratio():
    data = load_data("digits")
    copies, fresh = data.images[:360], data.held_out[:180]
    score, new = (evaluate(images, data.held_out[180:], train=data.images) for images in (copies, fresh))
    assert score["fd"] < 2.5 and score["precision"] > 0.7
    assert score["nearest_neighbour_ratio"] == pytest.approx(0, abs=1e-6)
    assert new["nearest_neighbour_ratio"] == pytest.approx(1, abs=0.1)


# --- bad input ------------------------------------------------------------------------------------------------------

DIGITS = torch.zeros(8, 1, 8, 8)
NOISE = draws(8, 1, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(torch.zeros(5), torch.zeros(5)), r"features_a must have shape \(N, D\) .*\(5,\)"),
        (lambda: frechet_distance(draws(5, 3), draws(5, 4)), r"the second mean must have shape \(3,\), got \(4,\)"),
        (lambda: frechet_distance(draws(5, 3), draws(5, 3) / 0), "features_b must be finite, got 15 NaN or infinite"),
        (lambda: GaussianStatistics().cov, "a covariance needs at least 2 samples, got 0"),
        (lambda: frechet_from_statistics(*[GaussianStatistics().update(draws(1, 3))] * 2), "at least 2 samples, got 1"),
        (lambda: inception_score(draws(5, 3)), "probabilities must be .* sum to 1"),
        (lambda: inception_score(torch.zeros(0, 3)), r"probabilities must be \(N, K\), .* got shape \(0, 3\)"),
        (lambda: ClassStatistics().score, "an inception score needs at least 1 sample, got 0"),
        (
            lambda: ClassStatistics().update(torch.eye(3)).update(torch.eye(2)),
            r"probabilities must have shape \(2, 3\), got \(2, 2\)",
        ),
        (lambda: inception_score(torch.eye(3), split_size=0), "split_size must be at least 1, got 0"),
        (lambda: precision_recall(draws(3, 2), draws(9, 2)), "k must be below the number of samples 3, got 3"),
        (lambda: precision_recall(draws(9, 2), draws(9, 2), k=0), "k must be at least 1, got 0"),
        (lambda: kernel_distance(draws(9, 2), draws(9, 3)), r"features_b must have shape \(9, 2\), got \(9, 3\)"),
        (lambda: sliced_wasserstein(draws(9, 2), draws(8, 2)), r"b must have shape \(9, 2\), got \(8, 2\)"),
        (lambda: nearest_neighbour_ratio(DIGITS, DIGITS, DIGITS), "held_out must hold images that are not in train"),
        (lambda: evaluate(DIGITS, DIGITS, train=DIGITS), "reference must hold images that are not in train"),
        (lambda: nearest_neighbour_ratio(NOISE, NOISE, NOISE), "held_out must hold images that are not in train"),
        (lambda: nearest_neighbour_ratio(draws(2, 3), DIGITS, DIGITS), r"samples must have shape \(2, 1, 8, 8\)"),
        (lambda: get_extractor("incepion"), "unknown extractor 'incepion'. Did you mean 'inception'"),
        (lambda: evaluate(DIGITS, DIGITS, "tinted-digits-classifier"), r"images must have shape \(8, 3, 16, 16\)"),
        (lambda: evaluate(DIGITS[0], DIGITS), r"images must have shape \(B, C, H, W\) with B >= 1, got \(1, 8, 8\)"),
        (lambda: evaluate(DIGITS + 255, DIGITS), r"images must lie in \[-1, 1\], got values up to 255"),
        (lambda: evaluate([], DIGITS), "samples must hold at least one batch of images, got none"),
        (lambda: evaluate(DIGITS, DIGITS, labels=torch.zeros(3)), r"labels must have shape \(8,\), got \(3,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_eight_bit_images_are_refused_with_what_is_expected():
    with pytest.raises(TypeError, match=r"images must be a floating-point tensor, got dtype torch.uint8"):
        evaluate(DIGITS.byte(), DIGITS)
