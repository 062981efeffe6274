"""Settings of nbconvert that load no scripts from the web."""

from __future__ import annotations

OFFLINE = {
    f"{name}_url": ""
    for name in ("jquery", "mathjax", "mermaid_js", "mermaid_layout_elk_js", "require_js")
}  # loaded by nbconvert itself
