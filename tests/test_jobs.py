from types import SimpleNamespace

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import SMALL

from cmlab import jobs
from cmlab.cli_train import _resumed


def test_losses_samples_and_metrics_are_there_to_look_at(tmp_path):
    model = jobs.run(
        SMALL.replace(iterations=20), tmp_path, False, look_every=10, metrics_samples=50, sheet=16, device="cpu"
    )
    assert (model / "config.json").is_file()
    sheets = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert sheets == ["step-00000010.png", "step-00000020.png"]
    assert Image.open(tmp_path / "samples" / sheets[0]).width >= 8 * 64
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [10, 20]
    assert [event.step for event in events.Scalars("fd")] == [10, 20] and events.Scalars("fd")[0].value > 0


def test_a_folder_must_have_a_name_where_it_cannot_be_made_up(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert jobs.folder_of("digits-edm", None, None).name.startswith("train-digits-edm")
    assert jobs.folder_of("digits-edm", None, "runs/mine").name == "mine"
    with pytest.raises(ValueError, match="give --output: with --resume auto"):
        jobs.folder_of("digits-edm", None, "auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="give --output: .*in several processes"):
        jobs.folder_of("digits-edm", None, None)


def test_an_unknown_tracker_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="unknown tracker 'tensorbord'. Did you mean 'tensorboard'"):
        jobs.run(SMALL, tmp_path, False, tracker="tensorbord")


def test_a_lost_process_is_told_from_other_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(jobs, "Watch", lambda *a: SimpleNamespace(see=lambda r: None, close=lambda: None))
    for error, message in (
        ("[gloo] Connection reset by peer", "another process of this training has ended .* start all of them again with --resume auto"),
        ("shapes do not match", "^shapes do not match$"),
    ):  # fmt: skip

        def broken(*arguments, error=error, **options):
            raise RuntimeError(error)
            yield

        monkeypatch.setattr(jobs.training, "train", broken)
        with pytest.raises(RuntimeError, match=message):
            jobs.run(SMALL, tmp_path, False)


def test_the_command_that_goes_on_repeats_what_was_asked(tmp_path):
    given = ["train", "digits-edm", "--seed", "3", "--output", "runs/a", "--precision", "fp32"]
    assert _resumed(given, "runs/a") == [
        "train",
        "digits-edm",
        "--seed",
        "3",
        "--precision",
        "fp32",
        "--resume",
        "runs/a",
    ]
    assert _resumed(["train", "x", "--output=a b", "--resume=auto"], "c d") == ["train", "x", "--resume", "c d"]
    assert _resumed([*given[:4], "--resume", "auto"], "b") == ["train", "digits-edm", "--seed", "3", "--resume", "b"]
