"""A picture that can be pointed at: with a mouse, a finger, or the arrow keys."""

from __future__ import annotations

from collections.abc import Callable

import anywidget
import traitlets

# Positions are shares of the picture's width and height. A stroke has a number of its own while the pointer is down; 0 is a
# pointer that only moves. Sent as one value, so that no position is ever paired with another one's stroke. While the kernel is
# busy, later values replace earlier ones; where a stroke begins and ends goes as a message too, and those all arrive.
_PAGE = """
function render({ model, el }) {
  const picture = document.createElement("img");
  picture.tabIndex = 0;
  picture.draggable = false;
  picture.className = "cmlab-surface";
  picture.setAttribute("role", "application");
  picture.dataset.lmSuppressShortcuts = "true";  // JupyterLab would take the arrow keys to walk through the cells
  picture.style = "touch-action: none; cursor: crosshair; max-width: 100%; image-rendering: pixelated";
  const show = () => {
    picture.src = model.get("source");
    picture.alt = model.get("alt");
    picture.setAttribute("aria-label", `${model.get("label")} ${model.get("alt")}`);  // it is spoken in place of alt
  };
  let stroke = 0, down = false, place = model.get("touch").slice(0, 2);
  const send = (number, mark = false) => {
    place = place.map((share) => Math.min(Math.max(share, 0), 0.9999));
    if (mark) model.send({ mark: [...place, number] });
    model.set("touch", [...place, number]);
    model.save_changes();
  };
  const at = (event) => {
    const box = picture.getBoundingClientRect();
    place = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  picture.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    down = true;
    stroke = Date.now();  // a number that no other view of this picture has used
    picture.setPointerCapture(event.pointerId);
    at(event);
    send(stroke, true);
  });
  picture.addEventListener("pointermove", (event) => {
    if (down) { at(event); send(stroke); }
  });
  for (const end of ["pointerup", "pointercancel"]) picture.addEventListener(end, () => {
    if (down) send(stroke, true);
    down = false;
  });
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  picture.addEventListener("keydown", (event) => {
    if (event.key in moves) place = place.map((share, k) => share + moves[event.key][k] * model.get("step"));
    else if (event.key === " " || event.key === "Enter") stroke = Date.now();
    else return;
    event.preventDefault();
    event.stopPropagation();
    send(event.key in moves ? 0 : stroke, !(event.key in moves));
  });
  model.on("change:source change:alt change:label", show);
  show();
  el.appendChild(picture);
}
export default { render };
"""


class Surface(anywidget.AnyWidget):
    """A picture and where it was touched last.

    source   the picture's address (sketch.source makes one of PNG bytes)
    alt      what is to be seen now, for screen readers
    label    what it is and what the keys do, for screen readers
    step     how far an arrow key goes, as a share of the picture
    touch    [x, y, stroke]: shares of width and height in [0, 1), and the number of the stroke, 0 for an arrow key
    """

    _esm = _PAGE
    source = traitlets.Unicode().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)
    step = traitlets.Float(0.05).tag(sync=True)
    touch = traitlets.List(traitlets.Float(), default_value=[0.5, 0.5, 0.0]).tag(sync=True)

    def on_mark(self, callback: Callable[[float, float, float], None]) -> None:
        """callback(x, y, stroke) where a stroke begins and ends, before touch says so: no mark is lost while the kernel is busy."""
        self.on_msg(lambda _, content, buffers: callback(*content["mark"]))
