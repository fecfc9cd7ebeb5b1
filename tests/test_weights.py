import os

import pytest
import torch
from toys import draws, saved, weights_file

from cmlab.weights import weights_at

NEED = "FID needs weights"


def test_weights_are_fetched_once_and_kept(offline, tmp_path):
    there = weights_file(tmp_path, saved({"fc.weight": draws(3)}))
    assert torch.equal(weights_at(there.as_uri(), NEED)["fc.weight"], draws(3))
    there.unlink()
    assert torch.equal(weights_at(there.as_uri(), NEED)["fc.weight"], draws(3))
    assert [path.name for path in offline.glob("[!.]*")] == [there.name]


def test_missing_weights_say_what_to_fetch_and_where_to_put_it(offline):
    message = rf"{NEED}, which are not in {offline} and could not be fetched .* Fetch https://a.b/w-01234567.pth on"
    with pytest.raises(FileNotFoundError, match=message):
        weights_at("https://a.b/w-01234567.pth", NEED)


def test_weights_damaged_on_their_way_are_not_kept(offline, tmp_path):
    there = weights_file(tmp_path, b"weights")
    there.write_bytes(b"other weights")
    with pytest.raises(
        FileNotFoundError, match=r"could not be fetched \(what file:.* gives is damaged .*\). Fetch file:"
    ):
        weights_at(there.as_uri(), NEED)
    assert list(offline.glob("[!.]*")) == []


def test_damaged_weights_are_named_and_so_is_the_address_to_fetch_them_again(offline):
    path = weights_file(offline, b"weights")
    path.write_bytes(b"other weights")
    message = (
        rf"{path} is damaged or another file: .* begins with \w{{8}}, not {path.stem[-8:]}. Remove it and fetch file:"
    )
    with pytest.raises(ValueError, match=message):
        weights_at(path.as_uri(), NEED)


class Trap:
    """Unpickling it makes a folder: what any code in a file could do."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_the_file_is_refused_and_does_not_run(offline, tmp_path):
    path = weights_file(offline, saved({"fc.weight": Trap(tmp_path / "sprung")}))
    with pytest.raises(
        ValueError, match=rf"{path} holds something else than weights, .*; none of it was run. Remove it"
    ):
        weights_at(path.as_uri(), NEED)
    assert not (tmp_path / "sprung").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "sprung").is_dir(), "the trap was a live one"


@pytest.mark.parametrize("data", [b"", b"no weights", saved(torch.zeros(3)), saved({"fc.weight": "three"})])
def test_a_file_without_weights_is_refused(data, offline):
    with pytest.raises(ValueError, match=r"holds something else than weights, or cannot be read \(\w+\); none of it"):
        weights_at(weights_file(offline, data).as_uri(), NEED)
