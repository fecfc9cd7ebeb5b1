"""Live controls for the lessons: sliders, and pictures to point at, beside a picture and a sentence that follow them.

All state lives in the widget that is returned. Without a running kernel the lessons show a static figure beside each.
"""

from cmlab.widgets.curves import CurriculumViewer, Point, QualityExplorer
from cmlab.widgets.explore import explore
from cmlab.widgets.live import train_live
from cmlab.widgets.paths import ConsistencyViewer, OdeExplorer
from cmlab.widgets.samples import MaskPainter, SamplerPlayground, enlarged

__all__ = [
    "ConsistencyViewer", "CurriculumViewer", "MaskPainter", "OdeExplorer", "Point", "QualityExplorer", "SamplerPlayground", "enlarged",
    "explore", "train_live",
]  # fmt: skip
