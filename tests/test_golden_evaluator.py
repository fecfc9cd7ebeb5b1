import pytest
from golden_tools import arrays, assert_close

from cmlab.metrics import (
    GaussianStatistics,
    frechet_distance,
    frechet_from_statistics,
    inception_score,
    manifold_radii,
    precision_recall,
)

GOLDEN = arrays("evaluator")
REF, SAMPLE = GOLDEN["ref_features"], GOLDEN["sample_features"]


@pytest.mark.parametrize("which", ["ref", "sample"])
def test_statistics_equal_the_reference(which):
    features = GOLDEN[f"{which}_features"]
    at_once, in_batches = GaussianStatistics().update(features), GaussianStatistics()
    for batch in features.split(64):
        in_batches.update(batch)
    for ours in (at_once, in_batches):
        assert_close(ours.mean, GOLDEN[f"{which}_mu"], 1e-6)  # stored as float32
        assert_close(ours.cov, GOLDEN[f"{which}_sigma"], 1e-6)


def test_frechet_distances_equal_the_reference():
    assert frechet_distance(SAMPLE, REF) == pytest.approx(float(GOLDEN["fid"]), rel=1e-6)
    assert frechet_distance(REF, REF) == pytest.approx(float(GOLDEN["fid_self"]), abs=1e-6)


def test_frechet_distance_of_singular_covariances_equals_the_reference():
    few = GaussianStatistics().update(REF[:12]), GaussianStatistics().update(SAMPLE[:13])
    # few samples of many features; an eigenvalue formula differs from a matrix root by 3e-9
    assert frechet_from_statistics(*few) == pytest.approx(float(GOLDEN["fid_rank_deficient"]), rel=1e-6)


@pytest.mark.parametrize("split_size", [5000, 50])
def test_inception_scores_equal_the_reference(split_size):
    ours = inception_score(GOLDEN["softmax_preds"], split_size)
    assert ours == pytest.approx(float(GOLDEN[f"inception_score_split{split_size}"]), rel=1e-5)


@pytest.mark.parametrize("which", ["ref", "sample"])
def test_manifold_radii_equal_the_reference(which):
    assert_close(manifold_radii(GOLDEN[f"{which}_features"], k=3), GOLDEN[f"radii_{which}_k3"].flatten())


def test_precision_and_recall_equal_the_reference():
    expected = float(GOLDEN["precision"]), float(GOLDEN["recall"])
    assert precision_recall(REF, SAMPLE, k=3) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
