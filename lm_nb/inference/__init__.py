"Sampling, chat, and measuring what a model knows"
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

from . import decoding as _fast  # noqa: E402, F401  registers itself: whoever imports `generate` gets the fast one
