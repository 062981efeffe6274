"""CircuitsVis's JavaScript: 1.3 MB that a page needs once, in the output of one notebook cell.

The first widget on a page contains it and sets `window.CircuitsVis`; the others call it as soon as
it is available. Nothing is loaded from a network.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any, NamedTuple

from backward_lens_tl.errors import WidgetError

_READY = "backward-lens-circuitsvis"
_WAIT_MS, _TRIES = 100, 50

_MISSING = (
    "This widget's JavaScript is not on this page. Run the cell of the first widget again, or "
    "backward_lens_tl.widgets.javascript() in a separate cell. If every output is a separate page, "
    "show IPython.display.HTML(widget.local_src) instead."
)

# `define`, `module` and `exports` are hidden: with require.js on the page (older notebooks), parts
# of the bundle would register there instead. The bundle runs only once, since it warns otherwise.
# TensorFlow.js, which holds the numbers, stays on the CPU: half precision on some graphics cards
# would turn small norms into zeros.
_LIBRARY = """\
<script>
if (!window.CircuitsVis) window.CircuitsVis = (function (define, module, exports) {
%s
if (window._tfengine) window._tfengine.setBackend("cpu");
return CircuitsVis;
})();
window.dispatchEvent(new Event("%s"));
</script>"""

# JupyterLab runs an output's script before it puts the output into the page, and renders outputs in
# the order in which they are scrolled to. So the script waits for its element and the JavaScript;
# after a timeout, an event still draws the widget.
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


def unsupported(problem: str) -> str:
    """The message of a `WidgetError` about the installed circuitsvis."""
    return (
        f"circuitsvis {version('circuitsvis')} {problem}; install circuitsvis==1.43.3, or use "
        "result.save_html(path), which does not need circuitsvis"
    )


@cache
def library_script() -> str:
    """A script element of 1.3 MB that sets `window.CircuitsVis`.

    Returns:
        HTML.

    Raises:
        WidgetError: If circuitsvis does not ship the JavaScript in the expected file.
    """
    try:
        bundle = files("circuitsvis").joinpath("dist", "cdn", "iife.js").read_text("utf-8")
    except OSError as error:
        raise WidgetError(unsupported("ships no dist/cdn/iife.js")) from error
    if "var CircuitsVis=" not in bundle:
        raise WidgetError(unsupported("ships JavaScript that does not define CircuitsVis"))
    # The bundle has "</script>" in a string, which would end the element, and names a source map
    # that no page has.
    safe = bundle.replace("</script", r"<\/script").partition("//# sourceMappingURL=")[0]
    return _LIBRARY % (safe, _READY)


def call_script(place: str, element: str, props: dict[str, Any]) -> str:
    """A script element that draws a component into the element with an id, as soon as possible."""
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
    """JSON that cannot end the script element around it; infinite numbers raise `ValueError`."""
    return json.dumps(value, allow_nan=False).replace("<", r"\u003c")


# --- notebooks ----------------------------------------------------------------------------------


class Execution(NamedTuple):
    """One run of a cell: the request's id, and the cell's id, if the front end sends it."""

    request: str
    cell: str | None


@dataclass
class Carrier:
    """Which run of which cell contains the JavaScript of this notebook.

    Attributes:
        execution: That run, if there is one.
    """

    execution: Execution | None = None

    def must_carry(self, now: Execution) -> bool:
        """Whether the output of a run must contain the JavaScript; if so, the run is remembered.

        Args:
            now: The run.

        Returns:
            True for the first output of all, and for the first of another run of the same cell,
            which has cleared the output that contained it.
        """
        before = self.execution
        if before is not None:
            is_rerun = now.cell is not None and now.cell == before.cell
            if now.request == before.request or not is_rerun:
                return False
        self.execution = now
        return True


_carrier = Carrier()


def _execution() -> Execution | None:
    """The current run of a notebook cell."""
    interactive = sys.modules.get("IPython")
    kernel = getattr(interactive.get_ipython(), "kernel", None) if interactive else None
    parent = kernel.get_parent() if kernel is not None else None
    if not parent:
        return None
    request = parent.get("header", {}).get("msg_id", "")
    return Execution(request, parent.get("metadata", {}).get("cellId"))


def output_must_carry() -> bool:
    """Whether the current output must contain the JavaScript, as outside of notebooks."""
    # In Colab every output is a separate page.
    now = _execution()
    return now is None or "google.colab" in sys.modules or _carrier.must_carry(now)


class JavaScript:
    """The JavaScript of all widgets; shown in a notebook, it draws the widgets of that page."""

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


def javascript() -> JavaScript:
    """The JavaScript of all widgets, for a notebook whose first widget was deleted.

    Returns:
        An object that a notebook shows; it draws the widgets of that page.

    Examples:
        >>> import backward_lens_tl as blt
        >>> blt.widgets.javascript()
        JavaScript(CircuitsVis, shown in a notebook cell)
    """
    return JavaScript()
