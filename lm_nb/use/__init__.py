"Models that leave the workbook: as files for other programs, and behind an address"
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
