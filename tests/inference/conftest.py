"What the tests of inference share; some run with each decoder"
import pytest
from random_models import SHAPES, make

from lm_nb.data.tokenizer import Tokenizer
from lm_nb.inference import decoding, sampling

DECODERS = dict(plain=sampling.plain_decode, fast=decoding._fast_decode)


@pytest.fixture(scope='module', params=SHAPES)
def model(request): return make(request.param)


@pytest.fixture(params=DECODERS)
def decoder(request, monkeypatch):
    "What `generate`, `stream` and `generate_batch` use"
    monkeypatch.setattr(sampling, '_decoders', [DECODERS[request.param]])
    return DECODERS[request.param]


@pytest.fixture(scope='session')
def tok():
    texts = ['What colour is the river?', 'The river is green.', '你好，河是绿色的。']
    return Tokenizer.train(texts * 5, vocab_size=290)
