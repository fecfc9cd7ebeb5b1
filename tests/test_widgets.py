"""The live controls without a browser: what each shows must follow what is chosen. tests/test_lessons_browser.py moves them for real."""

import base64
import io
import os
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from toys import draws

import cmlab
from cmlab import objectives, training
from cmlab.data import load_data
from cmlab.exact import DatasetDenoiser
from cmlab.recipes import get_recipe
from cmlab.widgets import (
    ConsistencyViewer,
    CurriculumViewer,
    MaskPainter,
    OdeExplorer,
    QualityExplorer,
    SamplerPlayground,
)
from cmlab.widgets.live import LiveView, train_live
from cmlab.widgets.sketch import encoded


def shown(widget) -> np.ndarray:
    """The pixels of the (last) picture inside a widget."""
    return decoded(re.findall(r"data:image/png;base64,[A-Za-z0-9+/=]+", everything(widget))[-1])


def decoded(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB"), float)


def everything(widget) -> str:
    """All texts and pictures that a widget and its children show, in order."""
    own = [str(getattr(widget, name, "")) for name in ("value", "source", "alt")]
    return " ".join([*own, *(everything(child) for child in getattr(widget, "children", ()))])


def said(widget) -> str:
    return re.findall(r'<p role="status"[^>]*>(.*?)</p>', everything(widget))[-1]


@pytest.fixture(scope="module")
def ode():
    points = load_data("moons").images[:500]
    exact = DatasetDenoiser(points)
    return OdeExplorer(points, exact, exact, cmlab.load("moons-cd"))


def test_the_ode_explorer_redraws_for_another_level_and_another_start(ode):
    seen = [shown(ode)]
    ode.sigma.value = 0.3
    seen.append(shown(ode))
    ode.surface.touch = [0.4, 0.6, 1.0]
    seen.append(shown(ode))
    assert all((a != b).any() for a, b in zip(seen, seen[1:], strict=False))
    assert "at sigma 0.30 the exact ODE ends" in said(ode) and "learned ODE: 0.00 off" in said(ode), "the same denoiser"


def test_a_click_lands_where_the_picture_shows_it(ode):
    """A start point is drawn as a black disc: its middle is where the pointer was."""
    ode.surface.touch = [0.62, 0.44, 2.0]
    before = shown(ode)
    ode.surface.touch = [0.9, 0.85, 3.0]
    gone = (before.max(2) < 60) & (shown(ode).max(2) > 120)
    rows, columns = np.nonzero(gone)
    height, width = gone.shape
    assert abs(np.median(columns) / width - 0.62) < 0.02 and abs(np.median(rows) / height - 0.44) < 0.02


def test_clicks_on_the_axis_labels_stay_inside_the_plot(ode):
    ode.surface.touch = [0.0, 0.999, 4.0]
    assert "From (-3.00, -3.00)" in said(ode)


def test_the_consistency_viewer_tells_how_far_the_answers_spread():
    student, teacher = cmlab.load("digits-cd"), cmlab.load("digits-edm")
    viewer = ConsistencyViewer(teacher, student, draws(1, 1, 8, 8), torch.tensor([3]))
    first = shown(viewer)
    viewer.level.value = 17
    assert (shown(viewer) != first).any() and "from the one at the end" in said(viewer)
    assert "is 0.000 from the one at the end" in said(viewer), "at the end itself"
    blur = ConsistencyViewer(teacher, Denoised(teacher), draws(1, 1, 8, 8), torch.tensor([3]))
    assert viewer.spread < 0.5 * blur.spread, (
        "a denoiser's means wander along the trajectory, a student's answers do not"
    )


class Denoised:
    """A denoiser in the place of a consistency model."""

    def __init__(self, denoiser):
        self.denoiser, self.sigma_min, self.sigma_max = denoiser, denoiser.sigma_min, denoiser.sigma_max

    def __call__(self, *arguments):
        return self.denoiser(*arguments)


def test_the_curriculum_viewer_tells_levels_and_decay_of_every_objective():
    aims = {"CT": objectives.ConsistencyTraining(start=2, end=150), "ECT": objectives.EasyConsistencyTuning()}
    viewer = CurriculumViewer(aims, total=1000)
    for share in (0.0, 0.5, 1.0):
        viewer.progress.value = share
        step = min(int(share * 1000), 999)
        assert f"CT: {aims['CT'].scales(step, 1000)} levels, mu {aims['CT'].mu(step, 1000):.2f}" in said(viewer)
        assert "ECT: continuous levels" in said(viewer)


def test_the_quality_explorer_shows_the_pictures_of_the_chosen_setting():
    points = [(calls, 1 / calls, torch.full((8, 1, 8, 8), tone)) for calls, tone in ((1, -1.0), (3, 0.0), (9, 1.0))]
    explorer = QualityExplorer({"teacher": points, "student": points[:1]}, floor=0.05)
    tones = []
    for k in range(3):
        explorer.setting.value = k
        tones.append(shown(explorer)[100:200, 400:500].mean())
        assert f"teacher, {points[k][0]} network call" in said(explorer)
    assert tones[0] < tones[1] < tones[2]
    explorer.model.value = "student"
    assert "student, 1 network call: FD 1." in said(explorer), "the student has one setting: the last one stands"


@pytest.fixture
def painter():
    return MaskPainter(cmlab.load("tinted-digits-cd"), load_data("tinted-digits").held_out[:5], repairs=3)


def test_painting_hides_what_the_brush_passes_over_also_between_two_positions_of_the_pointer(painter):
    painter.surface.touch = [2.5 / 16, 8.5 / 16, 1.0]
    painter.surface.touch = [12.5 / 16, 8.5 / 16, 1.0]
    hidden = painter.mask == 0
    assert hidden[7:10, 1:14].all() and int(hidden.sum()) == 3 * 13
    painter.surface.touch = [2.5 / 16, 2.5 / 16, 2.0]
    assert int((painter.mask == 0).sum()) == 3 * 13 + 9, "another stroke begins where the pointer is"
    painter.surface.touch = [14.5 / 16, 14.5 / 16, 0.0]
    assert int((painter.mask == 0).sum()) == 3 * 13 + 9, "an arrow key only moves the brush"


def test_dabs_that_come_while_the_kernel_is_busy_are_all_painted(painter):
    """The page sends each as a message; of the positions only the last arrives."""
    for stroke, place in enumerate((2.5 / 16, 7.5 / 16, 12.5 / 16), start=1):
        painter.surface._handle_custom_msg({"mark": [place, place, stroke]}, [])
    painter.surface.touch = [12.5 / 16, 12.5 / 16, 3.0]
    assert int((painter.mask == 0).sum()) == 3 * 9 and "11% painted over" in said(painter)


def test_a_mask_is_cleared_and_repairs_follow_every_control(painter):
    seen = [shown(painter)]
    assert "0% painted over" in said(painter) and "differ by 0.00" in said(painter), "all is known"
    painter.surface.touch = [0.5, 0.5, 1.0]
    for control, value in ((painter.calls, 3), (painter.seed, 7), (painter.choice, 2)):
        seen.append(shown(painter))
        control.value = value
    seen.append(shown(painter))
    assert all((a != b).any() for a, b in zip(seen, seen[1:], strict=False))
    painter.clear.click()
    assert (painter.mask == 1).all() and "0% painted over" in said(painter)


def test_the_repairs_keep_what_is_known(painter):
    painter.choice.value = 1
    painter.surface.touch = [0.5, 0.5, 1.0]
    repaired = re.findall(r"data:image/png;base64,[A-Za-z0-9+/=]+", painter.repaired.value)[0]
    first = decoded(repaired)[:112, :112].reshape(16, 7, 16, 7, 3)[:, 3, :, 3]
    right = ((load_data("tinted-digits").held_out[1].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    known = painter.mask.bool().numpy()
    assert np.abs(first - right)[known].max() <= 1 < np.abs(first - right)[~known].max()


def test_the_playground_tells_how_often_it_called_the_network():
    models = {"student": cmlab.load("digits-cd"), "teacher": cmlab.load("digits-edm")}
    playground = SamplerPlayground(models, (1, 8, 8), torch.arange(4))
    assert said(playground) == "student: 1 network call a picture, at sigma 20."
    one = shown(playground)
    playground.steps.value = 2
    assert (
        said(playground).startswith("student: 2 network calls a picture, at sigma 20, 0.5")
        and (shown(playground) != one).any()
    )
    playground.model.value = "teacher"
    playground.steps.value = 4
    assert said(playground) == "teacher: 7 network calls a picture, in 4 Heun steps."


def test_two_widgets_do_not_see_each_others_state():
    pictures, model = load_data("tinted-digits").held_out[:2], cmlab.load("tinted-digits-cd")
    one, other = (MaskPainter(model, pictures, repairs=1) for _ in range(2))
    before = shown(other)
    one.surface.touch = [0.5, 0.5, 1.0]
    assert (other.mask == 1).all() and (shown(other) == before).all()


SHORT = get_recipe("moons-edm").replace(iterations=30, batch=16)


def test_a_live_training_shows_its_loss_and_ends_with_the_very_model_of_a_plain_one(capsys):
    record, losses = train_live(SHORT)
    *_, plain = training.train(SHORT)
    assert len(losses) == 30 and record.step == 30
    assert all(torch.equal(a, b) for a, b in zip(record.model.parameters(), plain.model.parameters(), strict=True))


@pytest.mark.parametrize("way", ["button", "interrupt"])
def test_stop_ends_a_live_training_and_keeps_the_model(way, monkeypatch):
    seen = LiveView.see

    def see(view, record, draw):
        seen(view, record, draw)
        if record.step == 12:
            view.stop.click() if way == "button" else os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LiveView, "see", see)
    handler = signal.getsignal(signal.SIGINT)
    record, losses = train_live(SHORT)
    assert record.step == 13 and len(losses) == 13 and record.model is not None
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_live_training_draws_the_samples_that_it_is_asked_for():
    drawn = []

    def draw(model):
        drawn.append(model)
        return torch.zeros(8, 1, 8, 8)

    train_live(SHORT, draw, looks=3)
    assert len(drawn) == 3


def test_the_loss_is_drawn_also_below_zero_and_from_the_step_where_it_begins():
    view = LiveView(SHORT)
    for step, loss in enumerate((2.0, 1.0, -0.5), start=11):
        view.see(training.Record(step, 30, loss, lr=0.0, grad_norm=0.0, scales=None, mu=0.0, seconds=0.0), None)
    axes = view._figure().axes[0]
    assert axes.get_yscale() == "linear" and axes.lines[0].get_xdata().tolist() == [11, 12, 13]
    view.losses[-1] = 0.5
    assert view._figure().axes[0].get_yscale() == "log"


def test_more_curves_than_colours_are_refused():
    points = [(1, 1.0, torch.zeros(1, 1, 8, 8))]
    with pytest.raises(ValueError, match="curves must be one to 3, got 4"):
        QualityExplorer({name: points for name in "abcd"})


def test_pixels_come_back_from_png_as_they_were():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(encoded(pixels)))) == pixels).all()
