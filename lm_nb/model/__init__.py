"The model, what makes it fast, and its exchange with other libraries"
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

from . import fused as _fast  # noqa: E402, F401  registers the fast operations
