"""Many who ask a server at once, and what is no request:

    python tests/serve_load.py [clients=64] [seconds=60]     writes nbs/6_use/results/serve.json
"""
import datetime, json, os, random, re, signal, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import httpx, torch
from openai import OpenAI

from lm_nb.core import provenance, read_json, write_json
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.inference.chat import answer
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.model.hub import save_model
from lm_nb.use.serve import Served

HOME = Path(__file__).resolve().parent.parent
TEXTS = ['The river is green today.', '河今天是绿色的。', 'Hello, traveller! 🙂', '雪🙂 and ice',
         'a\tb\n\nc', '谢春宁的家乡在哪里？', 'Mind the mud.', 'What colour is the river?',
         '<|user|></s>', ' ']
ASKS = [f'{a}\n{b}' for a in TEXTS for b in TEXTS[:2]]  # twenty


def network(tok, arch, context=160, seed=0, **more):
    "Random, with weights that make choices differ; its texts have broken characters in them"
    torch.manual_seed(seed)
    shape = dict(arch=arch, context=context, n_layer=2, n_head=2, d_model=32, zero_init=False)
    gpt = GPT(GPTConfig(**{'vocab_size': len(tok), **shape, **more}))
    with torch.no_grad():
        for p in gpt.parameters():
            if p.ndim == 2: p.mul_(8)
    return gpt.eval()


def both(gpt, tok): return [Served('m/base', gpt, tok, False), Served('m/chat', gpt, tok, True)]


def says(text): return [dict(role='user', content=text)]


def together(ask, many, workers=20):
    with ThreadPoolExecutor(workers) as pool: return list(pool.map(ask, many))


def streamed(client, **how):
    chunks = client.chat.completions.create(stream=True, **how)
    return ''.join(c.choices[0].delta.content or '' for c in chunks)

def post(url, body, path='/v1/chat/completions', **headers):
    "Status and JSON of whatever is sent"
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    said = httpx.post(url + path, content=content, headers=headers, timeout=30)
    return said.status_code, said.json()


HI = dict(model='m/chat', messages=says('Hi'), max_tokens=2)
TEXT = dict(model='m/base', prompt='Hi', max_tokens=2)
DEEP = b'{"messages":' + b'[' * 100_000
MALFORMED = [  # what is sent, where to, and what the answer has to speak of
    (b'', 'c', 'JSON'), (b'{', 'c', 'JSON'), (b'\xff\xfe\x00', 'c', 'JSON'), (DEEP, 'c', 'JSON'),
    (b'{"n": ' + b'9' * 5000 + b'}', 'c', 'JSON'), (b'[]', 'c', 'object'), (b'null', 'c', 'object'),
    (b'3', 'c', 'object'), ({**HI, 'messages': []}, 'c', 'messages'),
    ({**HI, 'messages': 'Hi'}, 'c', 'messages'), ({**HI, 'messages': [3]}, 'c', 'messages'),
    ({**HI, 'messages': [{'role': 'user'}]}, 'c', 'content'),
    ({**HI, 'messages': [{'role': 'pope', 'content': 'Hi'}]}, 'c', 'pope'),
    ({**HI, 'messages': [{'role': ['user'], 'content': 'Hi'}]}, 'c', 'role'),
    ({**HI, 'messages': [*says('Hi'), {'role': 'assistant', 'content': 'Hi'}]}, 'c', 'user last'),
    ({**HI, 'messages': says([{'type': 'image_url', 'image_url': 'x'}])}, 'c', 'text'),
    ({**HI, 'messages': says('\ud800')}, 'c', 'surrogate'), ({**HI, 'n': 0}, 'c', 'n = 0'),
    ({**HI, 'n': 10**9}, 'c', 'n = '), ({**HI, 'n': True}, 'c', 'whole number'),
    ({**HI, 'temperature': 'hot'}, 'c', 'temperature'), ({**HI, 'temperature': -1}, 'c', '-1'),
    (json.dumps({**HI, 'temperature': float('nan')}).encode(), 'c', 'temperature'),
    ({**HI, 'temperature': 1e400}, 'c', 'temperature'), ({**HI, 'seed': 2**70}, 'c', 'seed'),
    ({**HI, 'stop': {'a': 1}}, 'c', 'stop'), ({**HI, 'stop': ['x'] * 99}, 'c', 'stop'),
    ({**HI, 'max_tokens': 0}, 'c', 'max_tokens'), ({**HI, 'logprobs': 3}, 'c', 'logprobs'),
    ({**HI, 'top_logprobs': 99, 'logprobs': True}, 'c', 'top_logprobs'),
    ({**HI, 'temprature': 1}, 'c', "'temperature'"), ({**HI, 'a\nb': 1}, 'c', "'a b'"),
    ({**HI, '\ud800': 1}, 'c', "'?'"), ({**HI, 'x' * 9999: 1}, 'c', 'unknown'),
    ({**HI, 'tools': [{}]}, 'c', 'tools'),
    ({**HI, 'stream_options': 3}, 'c', 'stream_options'), ({**HI, 'model': 3}, 'c', 'model'),
    ({**HI, 'model': 'm/base'}, 'c', '/v1/completions'),
    ({**HI, 'messages': says('x' * 999)}, 'c', 'reads at most'),
    ({**TEXT, 'prompt': None}, 't', 'prompt'), ({**TEXT, 'prompt': [[]]}, 't', 'prompt'),
    ({**TEXT, 'prompt': [999]}, 't', '999'), ({**TEXT, 'prompt': [-1]}, 't', '-1'),
    ({**TEXT, 'prompt': [1.5]}, 't', 'prompt'), ({**TEXT, 'prompt': ['x'] * 999}, 't', '999'),
    ({**TEXT, 'prompt': 'x' * 999}, 't', 'shorten'), ({**TEXT, 'suffix': '!'}, 't', 'suffix')]
PATHS = dict(c='/v1/chat/completions', t='/v1/completions')


def malformed(url, which):
    body, where, words = MALFORMED[which]
    status, said = post(url, body, PATHS[where])
    error = said['error']
    assert status == 400 and words in error['message'] and error['type'] == 'invalid_request_error'
    assert set(error) == {'message', 'type', 'param', 'code'} and '\n' not in error['message']
    assert len(error['message']) <= 300


def resident(pid='self'):
    "Bytes of a process in memory"
    return int(Path(f'/proc/{pid}/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def load(url, gpt, tok, clients, seconds):
    "Many ask for a while, among them who knows no manners; every answer is checked. Gives counts"
    want = {text: answer(gpt, tok, text, 40) for text in ASKS}
    counts, end = dict(right=0, malformed=0, left=0), time.monotonic() + seconds
    def one(n):
        rng, client = random.Random(n), OpenAI(base_url=f'{url}/v1', api_key='-', max_retries=0)
        while time.monotonic() < end:
            text, kind = rng.choice(ASKS), rng.random()
            how = dict(model='m/chat', messages=says(text), max_tokens=40)
            if kind < .1:
                malformed(url, rng.randrange(len(MALFORMED)))
                counts['malformed'] += 1
            elif kind < .2:
                with client.chat.completions.create(stream=True, **how) as said:
                    next(iter(said), None)
                counts['left'] += 1
            else:
                got = streamed(client, **how) if kind < .6 else \
                    client.chat.completions.create(**how).choices[0].message.content
                assert got == want[text], (text, got)
                counts['right'] += 1
        client.close()
    together(one, range(clients), clients)
    return counts


def record(package, program, what, equal, number=None):
    "Write down what was compared with a program, if LM_NB_RECORD asks for it"
    if not os.environ.get('LM_NB_RECORD'): return
    path = HOME/'nbs'/'6_use'/'results'/f'{package}.json'
    was = read_json(path) if path.exists() else {}
    rows = {row[0]: row for row in was.get('compared', [])} | {what: [what, sum(equal), len(equal)]}
    write_json(path, dict(program=program, version=number or version(package),
                          compared=[*rows.values()], date=f'{datetime.date.today()}'))


# --- the whole thing, with the server in a process of its own

def server_process(folder):
    "A server of the model in a folder, and its address"
    code = ('import sys; from serve_load import both; from lm_nb.model.hub import load_model; '
            'from lm_nb.use.serve import ServeConfig, serve_models; '
            'serve_models(both(*load_model(sys.argv[1])), ServeConfig(port=0))')
    env = {**os.environ, 'PYTHONPATH': f'{HOME}:{HOME}/tests', 'PYTHONUNBUFFERED': '1'}
    server = subprocess.Popen([sys.executable, '-c', code, folder], text=True, env=env,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return server, re.search(r'http://127\.0\.0\.1:\d+', server.stdout.readline())[0]


def throughput(url, clients, seconds=5):
    "Tokens a second that so many clients get together, each asking again and again"
    end, counts = time.monotonic() + seconds, [0] * clients
    def one(n):
        with httpx.Client(base_url=url, timeout=60) as client:
            for ids in iter(lambda: [7 + n], None):
                if time.monotonic() > end: return
                body = dict(model='m/base', prompt=ids, max_tokens=64, temperature=.3, seed=n)
                said = client.post(PATHS['t'], json=body).json()
                counts[n] += said['usage']['completion_tokens']
    start = time.monotonic()
    together(one, range(clients), clients)
    return sum(counts) / (time.monotonic() - start)


def watched(pid, stop, every=1):
    "The memory of a process, second by second"
    out = []
    while not stop.wait(every): out.append(resident(pid))
    return out


def ask_for(clients=64, seconds=60):
    "Ask for so long, and write what came of it"
    tok = Tokenizer.train(TEXTS * 4, 300)
    shape = dict(context=512, n_layer=4, n_head=4, d_model=128, d_ff=320, tie=False)
    gpt, stop = network(tok, 'qwen3', **shape), threading.Event()
    with tempfile.TemporaryDirectory() as tmp, ThreadPoolExecutor(1) as pool:
        server, url = server_process(save_model(Path(tmp)/'m', gpt, tok))
        rates = {n: throughput(url, n) for n in (1, 2, 4, 8, 16, 32)}
        load(url, gpt, tok, clients, 20)  # until all has been needed once
        memory = pool.submit(watched, server.pid, stop)
        counts = load(url, gpt, tok, clients, seconds)
        stop.set()
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=20)
    seen = memory.result()
    quarters = seen[:len(seen)//4 or 1], seen[-(len(seen)//4 or 1):]
    write_json(HOME/'nbs'/'6_use'/'results'/'serve.json', dict(
        clients=clients, seconds=seconds, **counts, wrong=0, status=server.returncode,
        said_on_stderr=err, megabytes=[round(sum(q) / len(q) / 1e6, 1) for q in quarters],
        tokens_per_second={n: round(r, 1) for n, r in rates.items()},
        parameters=gpt.n_params(), hardware=provenance()))


if __name__ == '__main__': ask_for(**{k: int(v) for k, v in (a.split('=') for a in sys.argv[1:])})
