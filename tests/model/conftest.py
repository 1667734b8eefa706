"What the tests of the model share"
import pytest
import torch

from tiny_models import SHAPES


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def cfg(request): return request.param


@pytest.fixture(autouse=True)
def one_thread(): # small tensors: more threads only wait for each other
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
