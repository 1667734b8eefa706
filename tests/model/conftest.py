"What the tests of the model share"
import pytest

from tiny_models import SHAPES


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def cfg(request): return request.param
