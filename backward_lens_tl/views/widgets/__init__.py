"""A result in CircuitsVis's widgets: norms, top tokens, quantities by token, Reversed Attention.

Each function returns a CircuitsVis object, which a notebook shows; `page` combines several, and
results, into one document. None of them needs a network.
"""

from backward_lens_tl.views.widgets.attention import reversed_attention
from backward_lens_tl.views.widgets.by_token import norms, quantities
from backward_lens_tl.views.widgets.document import page
from backward_lens_tl.views.widgets.library import javascript
from backward_lens_tl.views.widgets.token_table import top_tokens

__all__ = [
    "javascript",
    "norms",
    "page",
    "quantities",
    "reversed_attention",
    "top_tokens",
]


def __dir__() -> list[str]:
    return __all__
