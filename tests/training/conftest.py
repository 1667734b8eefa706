"What the stages' tests share"
from desk import at_desk  # noqa: F401
