"""diffusers is the peer here: what we write it reads, what it writes we read, and both draw the same pictures."""

import json
import warnings

import pytest
import torch
from test_released import network
from toys import draws, random_model, saved

from cmlab import checkpoints, interop
from cmlab.models import UNet
from cmlab.noise import karras_sigmas
from cmlab.released import IMAGENET64, LSUN256
from cmlab.sampling import sample_multistep, sample_onestep
from cmlab.scaling import ConsistencyModel, Denoiser

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

KINDS = {
    "class-conditional, scale and shift": dict(num_classes=10, use_scale_shift_norm=True),
    "unconditional, attention at two levels": dict(channel_mult=(1, 1, 2), attention_resolutions=(2, 4), image_size=32),
}


def model(**changes) -> ConsistencyModel:
    return ConsistencyModel(network(**changes)).eval().requires_grad_(False)


def pipeline_of(path) -> ConsistencyModelPipeline:
    pipeline = ConsistencyModelPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, noise, labels, generator=None, **steps):
    """What the pipeline makes of N(0, 1) noise, in [-1, 1]; it scales by its initial sigma itself."""
    found = pipeline(
        batch_size=len(noise), class_labels=labels, latents=noise, generator=generator, output_type="pt", **steps
    )
    return found.images * 2 - 1


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_the_exported_pipeline_draws_the_same_pictures(changes, tmp_path):
    ours = model(**changes)
    size = ours.net.config["image_size"]
    noise, labels = draws(3, 3, size, size), torch.tensor([1, 0, 9]) if "num_classes" in changes else None
    pipeline = pipeline_of(checkpoints.export(ours, tmp_path / "pipeline"))
    expected = sample_onestep(ours, noise, labels, clip_denoised=True)
    assert (drawn(pipeline, noise, labels, num_inference_steps=1) - expected).abs().max() < 1e-4
    sigmas = karras_sigmas(40)[[0, 22]]
    two = sample_multistep(ours, noise, sigmas, labels, generator=torch.Generator().manual_seed(3), clip_denoised=True)
    generator = torch.Generator().manual_seed(3)
    theirs = drawn(pipeline, noise, labels, generator, num_inference_steps=None, timesteps=[22, 0])
    assert (theirs - two.clamp(-1, 1)).abs().max() < 1e-4 and (theirs - expected).abs().max() > 0.01


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_pipeline_that_diffusers_wrote_loads(changes, safe, tmp_path):
    ours = model(**changes)
    unet = UNet2DModel.from_config(interop.unet_to_diffusers(ours.net.config))
    unet.load_state_dict(interop.weights_to_diffusers(ours.net.config, ours.net.state_dict()))
    scheduler = CMStochasticIterativeScheduler(sigma_max=50.0)
    ConsistencyModelPipeline(unet, scheduler).save_pretrained(tmp_path / "pipeline", safe_serialization=safe)
    loaded = checkpoints.load(tmp_path / "pipeline")
    assert loaded.sigma_max == 50.0 and loaded.info["network"] == ours.net.config
    assert all(torch.equal(v, ours.net.state_dict()[k]) for k, v in loaded.net.state_dict().items())


@pytest.mark.parametrize("arguments", [IMAGENET64, LSUN256], ids=["imagenet64", "lsun256"])
def test_every_parameter_of_the_released_networks_has_its_counterpart(arguments):
    with torch.device("meta"):
        net = UNet(**arguments)
        theirs = UNet2DModel.from_config(interop.unet_to_diffusers(net.config))
    weights = interop.weights_to_diffusers(net.config, net.state_dict())
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert interop.unet_from_diffusers(dict(theirs.config)) == net.config
    back = interop.weights_from_diffusers(net.config, weights)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_there_and_back_changes_nothing(tmp_path):
    ours = model(num_classes=10)
    again = checkpoints.load(checkpoints.export(ours, tmp_path / "pipeline"))
    assert all(torch.equal(v, ours.net.state_dict()[k]) for k, v in again.net.state_dict().items())


def test_the_scalings_go_there_and_back_and_default_to_the_schedulers(tmp_path):
    ours = ConsistencyModel(network(), sigma_data=0.8, sigma_min=0.01, sigma_max=40.0).eval()
    path = checkpoints.export(ours, tmp_path / "pipeline")
    again = checkpoints.load(path)
    assert (again.sigma_data, again.sigma_min, again.sigma_max) == (0.8, 0.01, 40.0)
    config = path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": interop.SCHEDULER}))
    again = checkpoints.load(path)
    assert (again.sigma_data, again.sigma_min, again.sigma_max) == (0.5, 0.002, 80.0)


def test_an_id_of_the_hub_is_fetched_from_there(tmp_path, monkeypatch):
    """The hub is a function here that knows one pipeline: what comes back is that pipeline's model."""
    ours = model()
    hub = {"openai/diffusers-cd_imagenet64_l2": str(checkpoints.export(ours, tmp_path / "pipeline"))}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: hub[name])
    found = checkpoints.load("openai/diffusers-cd_imagenet64_l2")
    assert all(torch.equal(v, ours.net.state_dict()[k]) for k, v in found.net.state_dict().items())


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'openai/nothing' is neither a model or folder here, nor could it be fetched"):
        checkpoints.load("openai/nothing")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Denoiser(network()), "the pipeline holds consistency models, got a Denoiser"),
        (lambda: random_model(), "only a UNet with resblock_updown=True"),
        (lambda: model(resblock_updown=False), "only a UNet with resblock_updown=True"),
        (lambda: model(num_head_channels=None, num_heads=2), "the network needs num_head_channels, not num_heads"),
    ],
)
def test_what_the_pipeline_cannot_hold_is_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoints.export(make(), tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    path = checkpoints.export(model(), tmp_path / "pipeline")
    checkpoints.export(model(), path)  # its own files may be replaced
    (path / "unet" / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="it holds 'notes.txt', which is no part of a saved model"):
        checkpoints.export(model(), path)
    assert (path / "unet" / "notes.txt").read_text() == "mine"


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: rewrite(f / "model_index.json", _class_name="DDPMPipeline"), "only ConsistencyModelPipeline can be"),
        (lambda f: (f / "model_index.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "unet" / "config.json").unlink(), "not whole: unet/config.json is missing"),
        (
            lambda f: (f / "unet" / interop.WEIGHTS).unlink(),
            "not whole: unet/diffusion_pytorch_model.safetensors is missing",
        ),
        (lambda f: rewrite(f / "unet" / "config.json", downsample_type="conv"), "built otherwise .*: downsample_type"),
        (lambda f: rewrite(f / "unet" / "config.json", layers_per_block=2), "is missing"),
        (lambda f: (f / "unet" / interop.WEIGHTS).write_bytes(b"no"), "is cut off or is no safetensors file"),
    ],
)
def test_a_damaged_or_foreign_pipeline_is_refused(damage, message, tmp_path):
    path = checkpoints.export(model(), tmp_path / "pipeline")
    damage(path)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(path)


def test_code_in_a_bin_file_is_refused(tmp_path):
    path = checkpoints.export(model(), tmp_path / "pipeline")
    (path / "unet" / interop.WEIGHTS).unlink()

    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    (path / "unet" / "diffusion_pytorch_model.bin").write_bytes(saved({"conv_in.weight": Evil()}))
    with pytest.raises(ValueError, match="none of it was run"):
        checkpoints.load(path)
