"From an answer to a good answer: preferences, a reward, and policies that follow them"
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
