"""Whether the Hugging Face hub can be asked."""

from __future__ import annotations

import socket
from urllib.parse import urlparse
from urllib.request import getproxies

import huggingface_hub


def hub_is_reachable() -> bool:
    """Whether it is worth asking the hub, whose client retries for half a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlparse(huggingface_hub.constants.ENDPOINT)
    if endpoint.scheme in getproxies():
        return True
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
