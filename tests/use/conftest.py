"What the programs of this folder share"
from taught import tok, trained  # noqa: F401
