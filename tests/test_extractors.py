import io

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from toys import draws, saved, weights_file

from cmlab import extractors
from cmlab.extractors import get_extractor


class BareInception(FeatureExtractorInceptionV3):
    """The network with random weights that keep the scale from layer to layer (He et al. 2015)."""

    def __init__(self):
        nothing = io.BytesIO(saved({}))
        super().__init__("bare", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)

    def load_state_dict(self, _):
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            if name.endswith("conv.weight"):
                torch.nn.init.kaiming_normal_(parameter, generator=generator)


@pytest.fixture(scope="module")
def inception():
    return BareInception()


def test_inception_sees_what_torch_fidelitys_network_sees(inception, offline, tmp_path, monkeypatch):
    there = weights_file(tmp_path, saved(inception.state_dict()))  # a file: address
    monkeypatch.setattr(extractors, "INCEPTION", there.as_uri())
    images, before = draws(2, 3, 32, 32).clamp(-1, 1), torch.get_rng_state()
    seen = get_extractor("inception")(images)
    features, logits = inception(((images + 1) * 127.5).round().byte())
    assert torch.equal(seen.features, features) and seen.features.shape == (2, 2048)
    assert torch.equal(seen.probabilities, logits.softmax(1)) and seen.probabilities.shape == (2, 1008)
    assert (features[0] - features[1]).abs().mean() > 0.01 * features.mean()  # the images are told apart
    assert torch.equal(torch.get_rng_state(), before)
    assert [path.read_bytes() == there.read_bytes() for path in offline.glob("[!.]*")] == [
        True
    ]  # kept for the next time


def test_inception_takes_grey_as_colour_and_no_other_number_of_channels(inception, offline, monkeypatch):
    monkeypatch.setattr(extractors, "INCEPTION", weights_file(offline, saved(inception.state_dict())).as_uri())
    grey, extract = draws(1, 1, 16, 16).clamp(-1, 1), get_extractor("inception")
    assert torch.equal(extract(grey).features, extract(grey.expand(-1, 3, -1, -1)).features)
    with pytest.raises(ValueError, match=r"images must have 1 or 3 channels for inception, got shape \(1, 4, 16, 16\)"):
        extract(grey.expand(-1, 4, -1, -1))
