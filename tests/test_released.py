import os
from pathlib import Path

import pytest
import torch
from golden_tools import facts
from processes import run_script
from served import serving
from toys import draws, saved

from cmlab import checkpoints, released
from cmlab.downloads import DownloadError
from cmlab.models import UNet
from cmlab.released import IMAGENET64, LSUN256, RELEASED, fetch, unet_config
from cmlab.scaling import ConsistencyModel, Denoiser

SMALL = dict(
    image_size=16, in_channels=3, out_channels=3, model_channels=64, num_res_blocks=1, attention_resolutions=(2,),
    channel_mult=(1, 2), num_head_channels=64, resblock_updown=True,
)  # fmt: skip


def network(**changes) -> UNet:
    """A small U-Net of the released kind with every weight random."""
    net = UNet(**SMALL | changes)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return net.eval()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where fetched checkpoints go, in this test."""
    monkeypatch.setenv("CMLAB_CHECKPOINTS", str(tmp_path / "checkpoints"))
    return tmp_path / "checkpoints"


def test_there_are_four_models_of_each_of_three_data_sets():
    assert sorted(RELEASED) == sorted(
        name.format(data)
        for data in ("imagenet64", "bedroom256", "cat256")
        for name in ("edm_{}", "cd_{}_l2", "cd_{}_lpips", "ct_{}")
    )


def test_two_step_commands_end_on_the_grid_they_count_on():
    for one in RELEASED.values():
        assert one.ts is None or (one.ts[0] == 0 and one.ts[-1] == one.steps - 1 and len(one.ts) == 3)
    assert RELEASED["ct_imagenet64"].ts == (0, 106, 200) and RELEASED["cd_imagenet64_l2"].ts == (0, 22, 39)


def test_a_mirror_can_be_named(monkeypatch):
    monkeypatch.setenv("CMLAB_RELEASED_URL", "http://mirror/consistency/")
    assert RELEASED["edm_cat256"].url == "http://mirror/consistency/edm_cat256_ema.pt"


@pytest.mark.parametrize(("arguments", "keys"), [(IMAGENET64, "unet_keys_imagenet64"), (LSUN256, "unet_keys_lsun256")])
def test_the_architecture_is_read_off_the_released_keys(arguments, keys):
    with torch.device("meta"):
        expected = UNet(**arguments).config
        assert UNet(**unet_config({key: torch.empty(shape) for key, shape in facts(keys)})).config == expected


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_classes=7, use_scale_shift_norm=True),
        dict(resblock_updown=False, attention_resolutions=(1, 2), num_res_blocks=2),
        dict(channel_mult=(1, 1.5, 2), attention_resolutions=(), image_size=32),
        dict(in_channels=1, out_channels=2),
    ],
)
def test_other_architectures_are_read_off_too(changes):
    net = UNet(**SMALL | changes)
    assert UNet(**unet_config(net.state_dict())).config == net.config | {"num_heads": 1}


@pytest.mark.parametrize("name", ["cd_imagenet64_l2", "edm_bedroom256"])
def test_a_fetched_model_loads_by_its_name(name, folder, monkeypatch):
    net, x = network(), draws(2, 3, 16, 16)
    with serving({f"/{RELEASED[name].file}": saved(net.state_dict())}) as site:
        monkeypatch.setenv("CMLAB_RELEASED_URL", site.url)
        path = fetch(name, progress=False)
    assert path == folder / RELEASED[name].file and (folder / f"{path.name}.sha256").is_file()
    model = checkpoints.load(name)
    kind = ConsistencyModel if name.startswith("cd") else Denoiser
    assert type(model) is kind and model.info["facts"] == {"released": name}
    assert torch.allclose(model(x, 80.0), kind(net)(x, 80.0), atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_a_model_that_was_not_fetched_says_how_to(folder):
    with pytest.raises(ValueError, match=f"cd_cat256_l2 is not in {folder} yet: cmlab fetch cd_cat256_l2"):
        checkpoints.load("cd_cat256_l2")
    with pytest.raises(ValueError, match="unknown released checkpoint 'cd_cat256_l1'. Did you mean 'cd_cat256_l2'"):
        fetch("cd_cat256_l1")


def run_fetch(folder, url, *names):
    script = Path(__file__).parents[1] / "checkpoints" / "fetch_checkpoints.sh"
    return run_script(script, *names, CMLAB_CHECKPOINTS=str(folder), CMLAB_RELEASED_URL=url)


def test_the_script_fetches_all_of_them_and_resumes(folder):
    content = {one.file: os.urandom(200_000) for one in RELEASED.values()}
    with serving({f"/{file}": data for file, data in content.items()}) as site:
        site.cuts = [60_000, 50_000, 40_000]
        done = run_fetch(folder, site.url, "all")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("licence: MIT") == 12
        assert {file: (folder / file).read_bytes() for file in content} == content
        again = run_fetch(folder, site.url, "cd_cat256_l2")
    assert again.returncode == 0 and len(site.requests) == 12 + 3
    wrong = run_fetch(folder, site.url, "cd_cat256_l1")
    assert wrong.returncode == 1 and wrong.stderr.startswith("cmlab: unknown released checkpoint 'cd_cat256_l1'")


def test_without_a_network_the_error_names_the_address(folder, monkeypatch):
    monkeypatch.setenv("CMLAB_RELEASED_URL", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="http://127.0.0.1:9/ct_cat256.pt does not answer"):
        fetch("ct_cat256", progress=False)


def test_the_repository_keeps_checkpoints_beside_its_script(monkeypatch):
    monkeypatch.delenv("CMLAB_CHECKPOINTS", raising=False)
    assert released.checkpoints_folder() == Path(__file__).parents[1] / "checkpoints"


def test_a_file_under_another_name_needs_its_kind(tmp_path):
    path = tmp_path / "model500000.pt"
    path.write_bytes(saved(network().state_dict()))
    with pytest.raises(ValueError, match="model500000.pt does not say what it holds: give kind='denoiser' or"):
        checkpoints.load(path)
    assert type(checkpoints.load(path, kind="denoiser")) is Denoiser
    with pytest.raises(ValueError, match="unknown kind 'denoise'. Did you mean 'denoiser'"):
        checkpoints.load(path, kind="denoise")


class Trap:
    """Unpickling it makes a folder: what any code in a file could do."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    path = tmp_path / "cd_evil.pt"
    path.write_bytes(saved({"out.2.weight": Trap(tmp_path / "sprung")}))
    with pytest.raises(
        ValueError, match=f"{path} holds something else than weights, or cannot be read .*none of it was run"
    ):
        checkpoints.load(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved(network().state_dict())[:100_000], "holds something else than weights, or cannot be read"),
        (
            saved({"fc.weight": draws(3, 3)}),
            "cannot be loaded: these are no weights of a released U-Net: .*input_blocks",
        ),
        (saved([1, 2]), "holds something else than weights"),
        (saved(network().state_dict() | {"extra.weight": draws(3)}), "extra.weight is not part of the network"),
        (
            saved({k: v for k, v in network().state_dict().items() if k != "middle_block.1.qkv.weight"}),
            "middle_block.1.qkv.weight is missing",
        ),
    ],
)
def test_files_that_are_no_checkpoint_are_refused(tmp_path, content, message):
    path = tmp_path / "cd_file.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(path)
