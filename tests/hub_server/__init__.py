"""A Hub on loopback for tests: the HTTP contract that `huggingface_hub` speaks with the real one, models only.

Standard library only, apart from `hf_xet`, whose own `local://` store stands in for Xet storage: nothing of the Xet protocol is
imitated. File contents are served from a second port, as on the real Hub, so that a leaked Authorization header can be seen.
"""

from hub_server.faults import Fault, Request
from hub_server.hub import Hub

__all__ = ["Fault", "Hub", "Request"]
