import pytest
import torch
from toys import draws

from cmlab.checkpoints import load_classifier
from cmlab.data import load_data
from cmlab.models.classifier import DigitsClassifier, accuracy, shifted, train_classifier


@pytest.mark.parametrize(("data", "least"), [("digits", 0.98), ("tinted-digits", 0.97)])
def test_the_embedded_classifier_reads_held_out_digits(data, least):
    assert accuracy(load_classifier(f"{data}-classifier"), load_data(data)) >= least


def test_a_short_training_already_reads_most_held_out_digits_and_repeats_exactly():
    first, again = (train_classifier("digits", steps=40, batch=64) for _ in range(2))
    assert accuracy(first, load_data("digits")) > 0.8  # 0.1 is chance
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_training_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    train_classifier("digits", steps=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16), (3, 32)])
def test_features_are_64_wide_and_do_not_depend_on_the_batch(channels, size):
    model, images = DigitsClassifier(channels, size).eval(), draws(5, channels, size, size)
    features, logits = model(images)
    assert features.shape == (5, 64) and logits.shape == (5, 10) and (features >= 0).all()
    assert torch.allclose(model(images[2:3])[0], features[2:3], atol=1e-5)


def test_a_shift_moves_every_image_by_at_most_one_pixel():
    image = torch.full((1, 1, 8, 8), -1.0)
    image[..., 4, 4] = 1
    moved = shifted(image.expand(200, -1, -1, -1), torch.Generator().manual_seed(0))
    places = (moved == 1).nonzero()[:, 2:]
    assert len(places) == 200  # one bright pixel each
    assert {tuple(p) for p in places.tolist()} == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train_classifier("digit"), "unknown data set 'digit'. Did you mean 'digits'"),
        (lambda: train_classifier("moons"), "data must have classes to tell apart, got moons, which has none"),
        (lambda: train_classifier("digits", steps=0), "steps must be at least 1, got 0"),
        (lambda: DigitsClassifier(size=12), "size must be a power of two, got 12"),
        (lambda: DigitsClassifier(size=4), "size must be at least 8, got 4"),
        (lambda: DigitsClassifier()(draws(2, 3, 8, 8)), r"images must have shape \(2, 1, 8, 8\), got \(2, 3, 8, 8\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
