"Notebooks that train a language model from scratch, as a package. The names below are loaded when they are first used"
__version__ = "0.4.0"

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
