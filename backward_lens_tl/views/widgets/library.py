"""CircuitsVis's JavaScript, 1.3 MB that a page needs once, and which notebook output carries it.

The page's first widget carries it and sets `window.CircuitsVis`; the others hold a call that waits
for it. Nothing is loaded from a network.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from backward_lens_tl.errors import WidgetError

_READY = "backward-lens-circuitsvis"
_WAIT_MS, _TRIES = 100, 50

_MISSING = (
    "This widget's JavaScript is not on this page. Run the cell of the first widget again, or "
    "backward_lens_tl.widgets.javascript() in a cell of its own. Where every output is a "
    "page of its own, show IPython.display.HTML(widget.local_src) instead."
)

# `define` and its kin are hidden: on a page with require.js (older notebooks), parts of the bundle
# would register there and not in the bundle. A second run would complain about the first.
# TensorFlow.js, which holds the numbers, is kept off the graphics card: half precision on some of
# them would turn small norms into zeros.
_LIBRARY = """\
<script>
if (!window.CircuitsVis) window.CircuitsVis = (function (define, module, exports) {
%s
if (window._tfengine) window._tfengine.setBackend("cpu");
return CircuitsVis;
})();
window.dispatchEvent(new Event("%s"));
</script>"""

# JupyterLab runs the script of an output that it has not yet put into the page, and draws outputs
# in the order in which they are scrolled to: so both are waited for, and after the patience an
# event still brings the widget back.
_CALL = """\
<script>
(function (id, props) {
  var tries = 0;
  function draw() {
    var place = document.getElementById(id);
    if (!place || !window.CircuitsVis) return false;
    if (!place.dataset.drawn) window.CircuitsVis.render(id, window.CircuitsVis.%(element)s, props);
    place.dataset.drawn = "yes";
    return true;
  }
  function wait() {
    if (draw()) return;
    if ((tries += 1) < %(tries)d) return void setTimeout(wait, %(wait)d);
    var place = document.getElementById(id);
    if (place) place.textContent = %(missing)s;
    window.addEventListener("%(ready)s", draw);
  }
  wait();
})(%(id)s, %(props)s);
</script>"""


def not_as_known(problem: str) -> str:
    """What to say of a circuitsvis that is not as known.

    Args:
        problem: What it does.

    Returns:
        The message of a `WidgetError`.
    """
    return (
        f"circuitsvis {version('circuitsvis')} {problem}; its release 1.43.3 is known to work, and "
        "result.save_html(path) needs no circuitsvis"
    )


@cache
def library_script() -> str:
    """A script element with CircuitsVis's JavaScript, 1.3 MB.

    Returns:
        HTML that sets `window.CircuitsVis`.

    Raises:
        WidgetError: If circuitsvis does not ship it where it used to.
    """
    try:
        bundle = files("circuitsvis").joinpath("dist", "cdn", "iife.js").read_text("utf-8")
    except OSError as error:
        raise WidgetError(not_as_known("ships no dist/cdn/iife.js")) from error
    if "var CircuitsVis=" not in bundle:
        raise WidgetError(not_as_known("ships JavaScript that does not define CircuitsVis"))
    # The bundle holds "</script>" in a string, which would end the element; its source map is not
    # on any page.
    safe = bundle.replace("</script", r"<\/script").partition("//# sourceMappingURL=")[0]
    return _LIBRARY % (safe, _READY)


def call_script(place: str, element: str, props: dict[str, Any]) -> str:
    """A script element that draws a widget as soon as the JavaScript is there.

    Args:
        place: The `id` of the element that it is drawn into.
        element: CircuitsVis's name of the component.
        props: What the component shows.

    Returns:
        HTML.
    """
    return _CALL % {
        "element": element,
        "id": json.dumps(place),
        "props": script_json(props),
        "missing": json.dumps(_MISSING),
        "ready": _READY,
        "tries": _TRIES,
        "wait": _WAIT_MS,
    }


def script_json(value: object) -> str:
    """JSON that cannot end the script element that it stands in; it has no infinite numbers."""
    return json.dumps(value, allow_nan=False).replace("<", r"\u003c")


# --- notebooks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Execution:
    """One run of one cell.

    Attributes:
        request: Id of the request to run it, which every run has anew.
        cell: Id of the cell, which stays; `None` if the front end does not say.
    """

    request: str
    cell: str | None


@dataclass
class Carrier:
    """Which run of which cell carries the JavaScript of this notebook.

    Attributes:
        execution: That run, if there is one.
    """

    execution: Execution | None = None

    def must_carry(self, now: Execution) -> bool:
        """Whether an output of a run has to carry the JavaScript; if so, it is taken to do so.

        Args:
            now: The run.

        Returns:
            True for the first output of all, and for the first of another run of the same cell,
            which has cleared the output that carried it.
        """
        before = self.execution
        if before is not None:
            again = now.cell is not None and now.cell == before.cell
            if now.request == before.request or not again:
                return False
        self.execution = now
        return True


_carrier = Carrier()


def _execution() -> Execution | None:
    """The run of a notebook cell that this is part of."""
    interactive = sys.modules.get("IPython")
    kernel = getattr(interactive.get_ipython(), "kernel", None) if interactive else None
    parent = kernel.get_parent() if kernel is not None else None
    if not parent:
        return None
    request = parent.get("header", {}).get("msg_id", "")
    return Execution(request, parent.get("metadata", {}).get("cellId"))


def output_must_carry() -> bool:
    """Whether the output that is shown now has to carry the JavaScript.

    Returns:
        True outside of notebooks, and in Colab, where every output is a page of its own.
    """
    now = _execution()
    return now is None or "google.colab" in sys.modules or _carrier.must_carry(now)


class JavaScript:
    """What widgets need of a page; shown in a notebook, it brings the widgets there to life."""

    def __repr__(self) -> str:
        return "JavaScript(CircuitsVis, shown in a notebook cell)"

    def _repr_html_(self) -> str:
        return f"<p>The JavaScript of the widgets is in this output.</p>{library_script()}"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        del include, exclude
        now = _execution()
        if now is not None:
            _carrier.execution = now
        return {"text/html": self._repr_html_()}
