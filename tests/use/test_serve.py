"""`lm_nb.use.serve` asked by the official client, by lm-evaluation-harness, and by whoever sends
what is no request"""
import gc, json, os, re, signal, socket, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest, torch

import lm_nb
from lm_nb.cli import main
from lm_nb.core import UserError
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.inference.chat import Chat, answer, stop_ids
from lm_nb.inference.sampling import generate_batch, stream
from lm_nb.model.hub import load_model, save_model
from lm_nb.model.lora import add_lora, save_adapter
from lm_nb.use import serve as serving_module
from lm_nb.use.serve import ServeConfig, find_models, serving

for name in ('starlette', 'uvicorn', 'openai', 'httpx'): pytest.importorskip(name)
import httpx, openai  # noqa: E402
from openai import OpenAI  # noqa: E402
from serve_load import (  # noqa: E402
    ASKS, HI, MALFORMED, PATHS, TEXT, TEXTS, both, load, malformed, network, post, record,
    resident, says, streamed, together)


@pytest.fixture(scope='module')
def tok(): return Tokenizer.train(TEXTS * 4, 300)


@pytest.fixture(scope='module', params=['gpt2', 'qwen3'])
def gpt(request, tok): return network(tok, request.param)


@pytest.fixture(scope='module')
def url(gpt, tok):
    with serving(both(gpt, tok), queue=256) as url: yield url


@pytest.fixture(scope='module')
def client(url):
    with OpenAI(base_url=f'{url}/v1', api_key='-', max_retries=0) as client: yield client


# the same answers

def test_twenty_ask_at_once_and_get_what_each_would_get_alone(client, gpt, tok):
    want = [answer(gpt, tok, ask, 200) for ask in ASKS]
    ask = lambda text: client.chat.completions.create(
        model='m/chat', messages=says(text)).choices[0].message.content
    whole = together(ask, ASKS)
    assert whole == want and len(set(want)) > 15
    ask = lambda text: streamed(client, model='m/chat', messages=says(text))
    parts = together(ask, ASKS)
    assert parts == want
    for how, got in (('whole', whole), ('streamed', parts)):
        record('openai', 'openai', f'answers to twenty at once, {how}, {gpt.cfg.arch}',
               [a == b for a, b in zip(got, want)])


def test_a_conversation_is_that_of_chat(client, gpt, tok):
    chat = Chat(gpt, tok, system='A river.', max_new=12)
    messages = [dict(role='system', content='A river.')]
    for text in ('Hi?', '河', 'a b'):
        messages += says(text)
        said = client.chat.completions.create(model='m/chat', messages=messages, max_tokens=12)
        want = chat.ask(text)
        assert said.choices[0].message.content == want
        chat.turns[-1] = text, tok.encode(want)  # another program knows the text, not the ids
        messages.append(dict(role='assistant', content=want))


def test_completions_are_those_of_generate_batch(client, gpt, tok):
    rows = [[tok.bos, *tok.encode(text)] for text in TEXTS]
    want = [tok.decode(ids) for ids in generate_batch(gpt, rows, 30, stop_ids(tok))]
    texts = client.completions.create(model='m/base', prompt=TEXTS, max_tokens=30)
    ids = client.completions.create(model='m/base', prompt=rows, max_tokens=30)
    for got in (texts, ids): assert [c.text for c in got.choices] == want
    chunks = client.completions.create(model='m/base', prompt=TEXTS, max_tokens=30, stream=True)
    parts = [''] * len(TEXTS)
    for c in chunks: parts[c.choices[0].index] += c.choices[0].text
    assert parts == want


HOW = [dict(temperature=1.3, seed=n, extra_body=more) for n, more in
       enumerate([{}, {'top_k': 5}, {'min_p': .01}, {'repetition_penalty': 1.3}])]

def test_a_seed_gives_the_same_answer_whoever_else_asks(client, gpt, tok):
    def alone(n):
        how = dict(HOW[n % 4], seed=n)
        new = stream(gpt, [tok.bos, *tok.encode(TEXTS[n % 10])], 60, stop_ids(tok),
                     temperature=1.3, seed=n, **how['extra_body'])
        return tok.decode([i for i in new if i not in stop_ids(tok)])
    def ask(n):
        how = dict(HOW[n % 4], seed=n)
        return client.completions.create(model='m/base', prompt=TEXTS[n % 10], max_tokens=60,
                                         **how).choices[0].text
    want = [alone(n) for n in range(20)]
    got = together(ask, range(20))
    assert got == want
    record('openai', 'openai', f'answers drawn with a seed, {gpt.cfg.arch}',
           [a == b for a, b in zip(got, want)])
    assert [ask(n) for n in range(4)] == want[:4]
    several = client.completions.create(model='m/base', prompt=TEXTS[3], max_tokens=60, n=4,
                                        seed=3, temperature=1.3,
                                        extra_body={'repetition_penalty': 1.3})
    assert several.choices[0].text == want[3]
    assert len({c.text for c in several.choices}) == 4 == len(several.choices)


def test_without_a_seed_answers_differ(client):
    how = dict(model='m/base', prompt='The', max_tokens=30, temperature=1.5, n=3)
    assert len({c.text for c in client.completions.create(**how).choices}) == 3

# what ends an answer

def test_stop_strings_are_never_given_out(client, gpt, tok):
    whole = answer(gpt, tok, ASKS[0], 200)
    stops = {whole[i:i+n] for i in range(0, len(whole), 7) for n in (1, 3, 6)} - {''}
    stops = [s for s in stops if '\ufffd' not in s]
    assert len(stops) > 5
    def ask(stop):
        how = dict(model='m/chat', messages=says(ASKS[0]), stop=[stop, 'nowhere in it'])
        said = client.chat.completions.create(**how).choices[0]
        return said.message.content, said.finish_reason, streamed(client, **how)
    for stop, (text, end, pieces) in zip(stops, together(ask, stops)):
        assert text == pieces == whole.split(stop)[0] and end == 'stop', stop
    record('openai', 'openai', f'answers cut at a stop string, {gpt.cfg.arch}', [True]*len(stops))


def test_reasons_and_counts(client, gpt, tok):
    how = dict(model='m/chat', messages=says(ASKS[1]), max_completion_tokens=5)
    said = client.chat.completions.create(**how)
    assert said.choices[0].finish_reason == 'length' and said.usage.completion_tokens == 5
    how |= dict(stream=True, stream_options={'include_usage': True})
    *parts, last = client.chat.completions.create(**how)
    assert last.usage == said.usage and not last.choices and parts[-1].choices[0].finish_reason
    assert all(p.usage is None for p in parts) and parts[0].choices[0].delta.role == 'assistant'
    assert said.usage.total_tokens == said.usage.prompt_tokens + 5


def test_the_context_is_used_to_its_last_place(client, gpt, tok):
    rows = [[7] * n for n in (1, 100, gpt.cfg.context - 1, gpt.cfg.context)]
    want = [tok.decode(ids) for ids in generate_batch(gpt, rows, 500, stop_ids(tok))]
    got = client.completions.create(model='m/base', prompt=rows, max_tokens=500)
    assert [c.text for c in got.choices] == want

# what the model thought

def test_logprobs_of_an_answer_and_of_a_prompt(client, gpt, tok):
    ids = [tok.bos, *tok.encode(TEXTS[2])]
    with torch.inference_mode(): logp = gpt(torch.tensor([ids])).float().log_softmax(-1)[0]
    want = logp[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    how = dict(model='m/base', echo=True)
    said = client.completions.create(prompt=TEXTS[2], logprobs=2, max_tokens=3, **how)
    lp, text = said.choices[0].logprobs, said.choices[0].text
    n = len(ids) - 1
    torch.testing.assert_close(torch.tensor(lp.token_logprobs[:n]), want, atol=1e-4, rtol=0)
    assert text.startswith(TEXTS[2]) and lp.tokens[0] != '<s>' and lp.text_offset[0] == 0
    assert lp.text_offset[n] == len(TEXTS[2])
    for token, p, top in zip(lp.tokens, lp.token_logprobs, lp.top_logprobs):
        assert top[token] == p and 2 <= len(top) <= 3
    by_ids = client.completions.create(prompt=ids, logprobs=1, max_tokens=0, **how)
    lp = by_ids.choices[0].logprobs
    assert lp.token_logprobs[0] is None and len(lp.tokens) == len(ids)
    torch.testing.assert_close(torch.tensor(lp.token_logprobs[1:]), want, atol=1e-4, rtol=0)


def test_tokens_of_a_chat_spell_its_answer(client, gpt, tok):
    how = dict(model='m/chat', messages=says(ASKS[4]), logprobs=True, top_logprobs=3, max_tokens=40)
    said = client.chat.completions.create(**how).choices[0]
    tokens = said.logprobs.content
    raw = b''.join(bytes(t.bytes) for t in tokens).decode(errors='ignore')
    assert raw == said.message.content.replace('\ufffd', '') and len(tokens) > 2
    assert all(t.logprob == t.top_logprobs[0].logprob for t in tokens)  # the most probable one
    chunks = client.chat.completions.create(stream=True, **how)
    again = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.bytes for t in again] == [t.bytes for t in tokens]


def log_likelihood(gpt, before, after):
    "Of ids behind others, in nats, and whether each is the most probable one"
    with torch.inference_mode(): logits = gpt(torch.tensor([before + after])).float()[0]
    logp = logits[len(before)-1 : -1].log_softmax(-1)
    p = logp.gather(-1, torch.tensor(after)[:, None])[:, 0]
    return p.sum().item(), bool((p == logp.amax(-1)).all())


def test_the_harness_scores_through_the_address_as_we_do(url, gpt, tok, tmp_path):
    for name in ('lm_eval', 'transformers', 'tenacity'): pytest.importorskip(name)
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    save_model(tmp_path/'m', gpt, tok)
    pairs = [(a, f' {b}') for a in TEXTS[:5] for b in TEXTS[5:8]]
    requests = [Instance('loglikelihood', {}, p, n) for n, p in enumerate(pairs)]
    rows = [([tok.bos]*text + tok.encode(a), tok.encode(b)) for text in (0, 1) for a, b in pairs]
    want = [log_likelihood(gpt, *row) for row in rows]
    for text in (False, True):
        lm = LocalCompletionsAPI(base_url=f'{url}/v1/completions', model='m/base', batch_size=4,
                                 tokenizer=str(tmp_path/'m'), tokenizer_backend='huggingface',
                                 tokenized_requests=not text, max_length=160)
        got = lm.loglikelihood(requests, disable_tqdm=True)
        mine = want[len(pairs)*text:][:len(pairs)]
        same = [abs(p - q) < 2e-5*max(1, abs(q)) and g == h for (p, g), (q, h) in zip(got, mine)]
        assert all(same)
        how = 'texts' if text else 'ids'
        record('lm_eval', 'lm-evaluation-harness',
               f'log-likelihoods through local-completions, {how}, {gpt.cfg.arch}', same)


def test_ids_that_have_no_token(tok):
    "As in Qwen3, whose model knows 267 ids more than its tokenizer"
    wide, rows = network(tok, 'qwen3', vocab_size=len(tok) + 200), [[7, n] for n in range(30, 40)]
    ids = generate_batch(wide, rows, 30, stop_ids(tok))
    assert any(i >= len(tok) for row in ids for i in row)
    with serving(both(wide, tok)) as url, OpenAI(base_url=f'{url}/v1', api_key='-') as client:
        how = dict(model='m/base', prompt=rows, max_tokens=30, logprobs=5)
        said = client.completions.create(**how).choices
        parts = [''] * len(rows)
        for c in client.completions.create(stream=True, **how):
            parts[c.choices[0].index] += c.choices[0].text
    want = [tok.decode([i for i in row if i < len(tok)]) for row in ids]
    assert [c.text for c in said] == parts == want
    names = [t for c in said for t in c.logprobs.tokens]
    assert {f'<{i}>' for row in ids for i in row if i >= len(tok)} <= set(names)


# what is no request

@pytest.mark.parametrize('which', range(len(MALFORMED)))
def test_a_mistake_is_answered_in_a_line(url, which, capfd):
    malformed(url, which)
    assert capfd.readouterr() == ('', '')


def test_the_client_raises_the_right_exception(url, client, tmp_path):
    def failing(kind, **how):
        with pytest.raises(kind) as e: client.chat.completions.create(**{**HI, **how})
        return e.value
    failing(openai.NotFoundError, model='m/chta')
    assert "no model '? a'" in post(url, {**HI, 'model': '\ud800\na'})[1]['error']['message']
    failing(openai.BadRequestError, model='m/base')
    error = failing(openai.BadRequestError, messages=says('x' * 999))
    assert error.code == 'context_length_exceeded'
    assert [m.id for m in client.models.list()] == ['m/base', 'm/chat']
    assert client.models.retrieve('m/chat').max_model_len == 160
    with pytest.raises(openai.NotFoundError): client.models.retrieve('m')


def test_other_paths_and_methods(url):
    assert post(url, {}, '/v1/embeddings')[0] == 404
    assert httpx.get(f'{url}/v1/completions').status_code == 405
    assert 'error' in httpx.get(f'{url}/etc').json() and httpx.get(f'{url}/health').is_success


def test_a_body_has_a_limit_with_and_without_its_length_said(gpt, tok):
    with serving(both(gpt, tok), body=1000) as url:
        status, said = post(url, {**HI, 'user': 'x' * 2000})
        assert status == 413 and '1,000 bytes' in said['error']['message']
        chunks = httpx.post(f'{url}/v1/completions', content=(b'x' * 100 for _ in range(99)))
        assert chunks.status_code == 413 and post(url, HI)[0] == 200


def test_garbage_instead_of_http(url):
    port = int(url.rsplit(':', 1)[1])
    for junk in (b'\x16\x03\x01\x02', b'GET\r\n\r\n', b'GET / HTTP/1.1\r\n' + b'a: b\r\n' * 99999,
                 b'POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n'):
        with closing(socket.create_connection(('127.0.0.1', port), 5)) as s:
            try:
                s.sendall(junk)
                s.recv(100)
            except OSError: pass
    assert post(url, HI)[0] == 200

# who may ask

def test_pages_from_elsewhere(url):
    assert post(url, HI, Host='evil.example')[0] == 403
    assert post(url, HI, Origin='https://evil.example')[0] == 403
    assert post(url, HI, Origin=url, Host=url.split('//')[1])[0] == 200
    assert httpx.get(url, headers={'Host': 'evil.example'}).status_code == 403
    asks = httpx.options(f'{url}/v1/chat/completions', headers={
        'Origin': 'https://evil.example', 'Access-Control-Request-Method': 'POST'})
    assert not [k for k in asks.headers if k.startswith('access-control')]


def test_a_page_that_was_let_in(gpt, tok):
    with serving(both(gpt, tok), cors='https://friend.example') as url:
        for who, yes in (('friend', True), ('evil', False)):
            said = httpx.post(f'{url}/v1/chat/completions', json=HI,
                              headers={'Origin': f'https://{who}.example'})
            allowed = said.headers.get('access-control-allow-origin') == f'https://{who}.example'
            assert (said.is_success, allowed) == (yes, yes)


def test_a_key(gpt, tok):
    with serving(both(gpt, tok), api_key='sesame') as url:
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=f'{url}/v1', api_key='sesam').models.list()
        assert len(list(OpenAI(base_url=f'{url}/v1', api_key='sesame').models.list())) == 2
        assert httpx.get(url).status_code == 200 and post(url, HI)[0] == 401

# many, and some who leave

@pytest.fixture
def slow(monkeypatch):
    "Each step takes a while"
    step = serving_module._step
    monkeypatch.setattr(serving_module, '_step', lambda *a: (time.sleep(.02), step(*a))[1])


class Opened:
    "A server whose engine can be looked into"
    def __init__(self, monkeypatch, served, **config):
        make = serving_module._Engine
        def noting(*how):
            self.engine = make(*how)
            return self.engine
        monkeypatch.setattr(serving_module, '_Engine', noting)
        self.context = serving(served, **config)
    def __enter__(self):
        self.url = self.context.__enter__()
        return self
    def __exit__(self, *how): self.context.__exit__(*how)
    def rows(self):
        groups = [g for g in self.engine.groups.values() if g]
        return sum(not r.ended for g in groups for r in g.rows), len(self.engine.queue.rows)
    def until(self, rows, seconds=5):
        end = time.monotonic() + seconds
        while (now := self.rows()) != rows and time.monotonic() < end: time.sleep(.01)
        assert now == rows


LONG = dict(model='m/base', prompt=[7], max_tokens=150, temperature=.3, seed=0)

def endless(gpt, tok, seeds=range(40)):
    "A seed whose text does not end by itself"
    ids = lambda seed: [*stream(gpt, [7], 150, stop_ids(tok), temperature=.3, seed=seed)]
    return next(seed for seed in seeds if len(ids(seed)) == 150)


def test_a_full_queue_says_come_back(gpt, tok, slow, monkeypatch):
    long = {**LONG, 'seed': endless(gpt, tok)}
    pool, opened = ThreadPoolExecutor(4), Opened(monkeypatch, both(gpt, tok), batch=1, queue=2)
    with opened as served, pool:
        first = [pool.submit(post, served.url, long, PATHS['t'])]
        served.until((1, 0))
        first += [pool.submit(post, served.url, TEXT, PATHS['t']) for _ in range(2)]
        served.until((1, 2))
        said = httpx.post(served.url + PATHS['t'], json=TEXT)
        assert said.status_code == 429 and said.headers['Retry-After'] == '1'
        assert said.json()['error']['type'] == 'rate_limit_error'
        assert httpx.post(served.url + PATHS['t'], json={**TEXT, 'n': 3}).status_code == 400
        assert [f.result()[0] for f in first] == [200] * 3, 'who had a place was served'


@pytest.mark.parametrize('streams', [True, False])
def test_who_leaves_frees_a_place(gpt, tok, slow, monkeypatch, streams):
    long = json.dumps({**LONG, 'seed': endless(gpt, tok), 'stream': streams}).encode()
    def leaving(n):
        out = []
        for _ in range(n):
            s = socket.create_connection(('127.0.0.1', int(served.url.rsplit(':', 1)[1])))
            s.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n'
                      b'Content-Length: %d\r\n\r\n' % len(long) + long)
            out.append(s)
        return out
    with Opened(monkeypatch, both(gpt, tok), batch=2, queue=9) as served:
        asks = leaving(5)
        served.until((2, 3))
        for s in asks[2:]: s.close()   # of those that wait
        time.sleep(.2)
        more = leaving(1)              # clears the queue of who has left
        served.until((2, 1))
        for s in [*asks, *more]: s.close()
        served.until((0, 0), 1.5)
        assert post(served.url, HI)[0] == 200


def test_a_fault_of_the_model_is_one_answer_and_not_the_end(gpt, tok, monkeypatch, capfd):
    read = serving_module._read
    def failing(gpt, fused, rows):
        if any(r.ids == [7] for r in rows): raise RuntimeError('out of\nmemory')
        return read(gpt, fused, rows)
    monkeypatch.setattr(serving_module, '_read', failing)
    monkeypatch.delenv('IN_TEST', raising=False)
    with serving(both(gpt, tok)) as url:
        status, said = post(url, LONG, PATHS['t'])
        assert status == 500 and 'memory' not in said['error']['message']
        body = httpx.post(url + PATHS['t'], json={**LONG, 'stream': True}).text
        assert '"error"' in body and body.endswith('data: [DONE]\n\n')
        assert post(url, HI)[0] == 200
    err = capfd.readouterr().err
    assert 'out of memory' in err and 'Traceback' not in err


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='memory is read from /proc')
def test_many_for_a_while(url, gpt, tok, capfd):
    load(url, gpt, tok, 16, 1)
    gc.collect()
    before = resident()
    counts = load(url, gpt, tok, 16, 4)
    gc.collect()
    assert resident() - before < 30e6, 'memory grows'
    assert counts['right'] > 30 and counts['malformed'] and counts['left'], counts
    assert 'Traceback' not in ''.join(capfd.readouterr())

# the command

def run(*argv, **env):
    home = str(Path(lm_nb.__file__).resolve().parent.parent)
    code = 'import sys; from lm_nb.cli import main; sys.exit(main())'
    return subprocess.Popen([sys.executable, '-c', code, 'serve', *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, 'PYTHONPATH': home, **env})


@pytest.fixture(scope='module')
def folder(tok, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp('run')/'base', network(tok, 'qwen3', 512), tok,
                      chat=False)


def test_ctrl_c_ends_it_with_someone_reading(folder):
    with run(folder, 'port=0', LM_NB_API_KEY='sesame') as server:
        line = server.stdout.readline()
        url = re.search(r'http://127\.0\.0\.1:\d+', line)[0]
        key = {'Authorization': 'Bearer sesame'}
        assert httpx.get(f'{url}/v1/models').status_code == 401
        body = dict(prompt=[7], max_tokens=500, temperature=1, stream=True, n=20)
        with httpx.stream('POST', f'{url}/v1/completions', json=body, headers=key) as said:
            parts = said.iter_text()
            next(parts)
            server.send_signal(signal.SIGINT)
            rest = ''.join(parts)
        assert 'stopping' in rest and rest.endswith('[DONE]\n\n')
        out, err = server.communicate(timeout=10)
    assert (server.returncode, out, err) == (0, '', '')


def says_one_line(capsys, *argv):
    assert main(['serve', *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and err.startswith('lm-nb: '), err
    return err


def test_what_cannot_be_served_is_a_line(folder, tmp_path, capsys):
    with closing(socket.create_server(('127.0.0.1', 0))) as taken:
        port = taken.getsockname()[1]
        said = says_one_line(capsys, folder, f'port={port}')
        assert f'port = {port}' in said and f'port={port + 1}' in said
    assert 'no recipe' in says_one_line(capsys, 'mikro')
    said = says_one_line(capsys, folder, 'host=nowhere.invalid', 'port=0')
    assert 'host = nowhere.invalid' in said
    assert "did you mean 'port'" in says_one_line(capsys, folder, 'prot=1')
    bare = tmp_path/'bare'
    bare.mkdir()
    (bare/'config.json').write_text('{}')
    (bare/'model.safetensors').write_bytes((folder/'model.safetensors').read_bytes())
    assert 'has no tokenizer' in says_one_line(capsys, bare, 'port=0')
    (bare/'model.safetensors').unlink()
    assert 'has no model.safetensors' in says_one_line(capsys, bare, 'port=0')


def test_an_open_door_without_a_key_is_said(folder, monkeypatch, capsys):
    monkeypatch.delenv('IN_TEST', raising=False)
    import uvicorn
    monkeypatch.setattr(uvicorn.Server, 'run', lambda self, sockets: sockets[0].close())
    assert main(['serve', str(folder), 'port=0', 'host=0.0.0.0']) == 0
    assert 'without api_key' in capsys.readouterr().err
    assert main(['serve', str(folder), 'port=0', 'host=0.0.0.0', 'api_key=k']) == 0
    assert 'without api_key' not in capsys.readouterr().err


def test_an_adapter_makes_one_model_more(folder, tmp_path, monkeypatch, capsys):
    import uvicorn
    gpt, _ = load_model(folder)
    save_adapter(tmp_path/'adapter', add_lora(gpt, 2), str(folder))
    monkeypatch.setattr(uvicorn.Server, 'run', lambda self, sockets: sockets[0].close())
    assert main(['serve', str(folder), 'port=0', f'adapter={tmp_path}/adapter']) == 0
    assert 'run0/base, base/adapter at http' in capsys.readouterr().out
    assert 'no such adapter folder' in says_one_line(capsys, folder, f'adapter={tmp_path}/none')


def test_a_base_model_has_no_chat(folder):
    with serving(find_models(folder)) as url:
        status, said = post(url, dict(messages=says('Hi')))
        assert status == 400 and '/v1/completions' in said['error']['message']
        assert post(url, dict(prompt='Hi'), PATHS['t'])[0] == 200


def test_settings_of_the_server():
    for wrong in (dict(port=-1), dict(batch=0), dict(queue=0), dict(body=0), dict(api_key=''),
                  dict(api_key='sésame'), dict(cors='*'), dict(cors='https://example.org/')):
        with pytest.raises(UserError, match=next(iter(wrong))): ServeConfig(**wrong)
