"""Works through mutated files in a process of its own, so that even a crash is only a count.
python hostile_work.py KIND FOLDER FIRST LAST

One line of JSON per case. A case must end within a minute: else the alarm ends the process, and
whoever started it sees which case it was."""
import contextlib, io, json, math, os, random, re, shutil, signal, sys, traceback
from pathlib import Path

SECONDS = 60                                     # for one case
TEXTS = ['', ' ', 'The cat  sat on the mat.\n', '春眠不覺曉，處處聞啼鳥。', '\0\t\x7f',
         '𠀀é e\u0301 👩\u200d🚀 ▁▅⁇', '<|user|></s><0xE4>', 'aa' * 3000]
HOSTILE = ['', ' ', 'none', 'None', 'nan', 'inf', '-inf', '-1', '0', '1', '2', '3', '-0', '1e400',
           '1e-400', '0.5', '0.999999', '1.0000001', '9' * 5000, str(2**31), str(2**63),
           str(2**64), '-9223372036854775809', 'true', 'False', 'yes', '0x10', '1_0', '__', '१२',
           '½', '1e3', '1e999999999', '%(x)s', '${a}', '$(reboot)', '../../etc/passwd', '/dev/null',
           'a=b', '=', '[', ']', '"', "'", '名字', '\ufeff', '\u202e1', 'x' * 10000, 'auto', 'cpu',
           'cuda:99', 'mps', 'meta', 'microworld', 'hf:', 'unigram', 'muon', 'gpt2', 'qwen3',
           'fsdp']


# ---------------------------------------------------------------- how bytes and values are changed

def spoil(data, rng):
    "One to four accidents or attacks on some bytes"
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        n, at, k = len(data), rng.randrange(len(data) + 1), rng.choice((1, 2, 7, 64, 4096))
        how = rng.choice('bit byte cut drop insert zero copy swap number'.split())
        if how == 'bit' and n: data[at % n] ^= 1 << rng.randrange(8)
        if how == 'byte' and n:
            data[at % n] = rng.choice((0, 1, 0x7f, 0x80, 0xff, rng.randrange(256)))
        if how == 'cut': del data[at:]
        if how == 'drop': del data[at:at + k]
        if how == 'insert': data[at:at] = rng.randbytes(k)
        if how == 'zero': data[at:at + k] = bytes(len(data[at:at + k]))
        if how == 'copy': data[at:at] = data[(b := rng.randrange(n + 1)):b + k]
        if how == 'swap': data[at:at + k], data[0:k] = data[0:k], data[at:at + k]
        if how == 'number':
            data[at:at + 8] = rng.choice((2**64 - 1, 2**63, 2**31, 2**60, 0)).to_bytes(8, 'little')
    return bytes(data)


def odd(rng, value=None):
    "A JSON value where another was expected"
    deep = []
    for _ in range(rng.choice((1, 50, 2000))): deep = [deep]
    return rng.choice([None, True, 0, 1, -1, 2**31, 2**63, 10**30, 1e308, 0.5, math.nan, math.inf,
                       '', 'x', 'x' * 10**5, '../../x', '\0', [], {}, [value], {'a': value}, deep,
                       [[]] * 1000, str(value),
                       *([value + 1, -value, value * 2, value // 2, float(value)]
                         if type(value) is int else [])])


def twist(x, rng):
    "JSON with one value, key or element changed, somewhere"
    if isinstance(x, dict) and x and rng.random() < .85:
        k = rng.choice(list(x))
        how = rng.choice('value value value value drop rename add'.split())
        if how == 'drop': return {a: b for a, b in x.items() if a != k}
        if how == 'rename':
            return {(rng.choice(('', '..', '/etc/passwd', k.upper(), k + 'x', 'a/b')) if a == k
                     else a): b for a, b in x.items()}
        if how == 'add': return {**x, rng.choice(('x', '../x', '__class__', '.lock')): odd(rng)}
        return {**x, k: twist(x[k], rng)}
    if isinstance(x, list) and x and rng.random() < .6:
        i = rng.randrange(len(x))
        return rng.choice(
            [x[:i] + x[i+1:], x + [odd(rng)], x[:i] + [twist(x[i], rng)] + x[i+1:], x[::-1]])
    return odd(rng, x)


# ------------------------------------------------------------------ tokenizers

def mutated_proto(base, rng):
    "A sentencepiece model, changed as bytes or in its fields"
    if rng.random() < .4: return spoil(base, rng)
    from sentencepiece import sentencepiece_model_pb2 as pb
    m = pb.ModelProto.FromString(base)
    numbers = (-2**31, -5, -1, 0, 1, 2, 5, 6, 263, 264, 1000, 2**31 - 1)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        p, q = (rng.choice(m.pieces) if m.pieces else m.pieces.add() for _ in range(2))
        ways = 'score type text same drop add order trainer trainer trainer normalizer charsmap'
        how = rng.choice([*ways.split(), 'clear', 'many', 'denormalizer'])
        if how == 'score':
            p.score = rng.choice((math.nan, math.inf, -math.inf, 0., 1e38, -1e38, 1e-45))
        if how == 'type': p.type = rng.randrange(1, 7)
        if how == 'text':
            p.piece = rng.choice(('', ' ', '▁', '\n', '\0', '<s>', '<0x41>', '<0xZZ>', '<|user|>',
                                  'x' * 5000, '名', p.piece * 2, 'a\0b'))
        if how == 'same': p.piece = q.piece
        if how == 'drop': m.pieces.remove(p)
        if how == 'add':
            m.pieces.add(piece=rng.choice(('new', '', p.piece)), score=-1.,
                         type=rng.randrange(1, 7))
        if how == 'order':
            a, b = rng.randrange(len(m.pieces)), rng.randrange(len(m.pieces))
            one = pb.ModelProto.SentencePiece.FromString(m.pieces[a].SerializeToString())
            m.pieces[a].CopyFrom(m.pieces[b]), m.pieces[b].CopyFrom(one)
        if how == 'trainer':
            t = m.trainer_spec
            keys = ('model_type vocab_size unk_id bos_id eos_id pad_id byte_fallback unk_surface '
                    'unk_piece treat_whitespace_as_suffix bos_piece pad_piece '
                    'max_sentencepiece_length')
            k = rng.choice(keys.split())
            if k == 'model_type': t.model_type = rng.randrange(1, 5)
            elif k.endswith(('_piece', '_surface')):
                setattr(t, k, rng.choice(('', '<0x41>', '\0', 'x' * 5000, '<pad>', '▁')))
            elif k in ('byte_fallback', 'treat_whitespace_as_suffix'):
                setattr(t, k, not getattr(t, k))
            else: setattr(t, k, rng.choice(numbers))
        if how == 'normalizer':
            k = rng.choice('add_dummy_prefix remove_extra_whitespaces escape_whitespaces'.split())
            setattr(m.normalizer_spec, k, not getattr(m.normalizer_spec, k))
        if how == 'charsmap':
            size = rng.choice((0, 1, 4, 100, 2**31, 2**32 - 4))
            m.normalizer_spec.precompiled_charsmap = rng.choice((
                b'', size.to_bytes(4, 'little')[:4] + rng.randbytes(rng.choice((0, 3, 1024, 4096))),
                rng.randbytes(64)))
        if how == 'denormalizer':
            m.denormalizer_spec.precompiled_charsmap = rng.choice((4, 1024)).to_bytes(
                4, 'little') + rng.randbytes(rng.choice((4, 1024, 2048)))
        if how == 'clear': m.ClearField(rng.choice(('pieces', 'trainer_spec', 'normalizer_spec')))
        if how == 'many':
            for i in range(3000):
                m.pieces.add(piece=f'p{i}', score=-i, type=rng.choice((1, 1, 1, 4)))
    data = m.SerializeToString()
    return spoil(data, rng) if rng.random() < .1 else data


def tokenizer(folder, rng):
    """Load a mutated tokenizer; one that is accepted has to give texts back, but for a piece that
    the mutation itself has renamed"""
    from lm_nb.data.tokenizer import Tokenizer
    path = folder/'mutated.model'
    path.write_bytes(
        mutated_proto((folder/rng.choice(('unigram.model', 'bpe.model'))).read_bytes(), rng))
    tok = Tokenizer.load(path)
    rows = tok.encode_batch(TEXTS)
    tok.decode(range(len(tok))), [tok.pieces(t) for t in TEXTS]
    assert all(max(r, default=0) < len(tok) for r in rows), 'an id outside of the vocabulary'
    assert min((i for r in rows for i in r), default=9) > tok.user, 'text made a marker'
    lossy = [t for t, r in zip(TEXTS, rows) if tok.decode(r) != t]
    assert not lossy, f'{lossy[0]!r} came back as {tok.decode(tok.encode(lossy[0]))!r}'
    return 'accepted'


# ------------------------------------------------------------------ recipes

def mutated_ini(text, rng):
    "A settings file, changed in its lines or its bytes"
    if rng.random() < .25: return spoil(text.encode(), rng)
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(lines))
        key, eq, value = lines[at].partition('=')
        ways = 'key drop twice move section like indent empty join bom long colon'
        how = rng.choice(['value'] * 5 + ways.split())
        if how == 'value' and eq: lines[at] = f'{key}= {rng.choice(HOSTILE)}'
        if how == 'key' and eq:
            lines[at] = rng.choice((key.strip()[:-1], key.upper(), '', 'x.' + key,
                                    'pretrain.' + key, 'sft.' + key, key + '\t', '名', 'like',
                                    '__class__')) + ' = ' + value
        if how == 'drop': lines[at] = ''
        if how == 'twice': lines.insert(at, lines[at])
        if how == 'move': lines.insert(rng.randrange(len(lines)), lines.pop(at))
        if how == 'section':
            lines.insert(
                at,
                rng.choice(('[', '[]', '[micro]', '[DEFAULT]', '[other]', '[名]', '[a]]', '[a] x')))
        if how == 'like':
            lines.insert(at, 'like = '
                         + rng.choice(('micro', 'micro-one', 'own', 'nowhere', '', 'DEFAULT')))
        if how == 'indent': lines[at] = rng.choice((' ', '\t', '\u3000')) + lines[at]
        if how == 'empty' and eq: lines[at] = rng.choice((f'{key}=', key, f'= {value}'))
        if how == 'join': lines[at] += '\r' + lines[(at + 1) % len(lines)]
        if how == 'bom': lines[0] = '\ufeff' + lines[0]
        if how == 'long': lines[at] = key + '= ' + 'x' * 10**5
        if how == 'colon': lines[at] = lines[at].replace('=', ':')
    out = '\n'.join(lines)
    return out.encode(rng.choice(('utf-8',) * 8 + ('utf-16', 'latin-1', 'gb18030')), 'replace')


def recipe(folder, rng):
    """Load every recipe of a mutated settings file through the command line, or one with mutated
    words on it"""
    from lm_nb.cli import main
    (folder/'settings.ini').write_bytes(
        mutated_ini((folder/'good.ini').read_text(encoding='utf-8'), rng))
    if rng.random() < .4: shutil.copy(folder/'good.ini', folder/'settings.ini')
    os.chdir(folder)
    words = [f'{rng.choice(KEYS)}={rng.choice(HOSTILE)}' for _ in range(rng.choice((0, 1, 1, 2)))]
    return command(main, [
        'recipe', rng.choice(['micro', 'micro', 'own', 'poems-all', 'base-350m', 'belle', '', 'x']),
        *words])


def command(main, words):
    "Run a command; it may end in two ways: all is well, or one line says what is not"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): status = main(words)
    said = [l for l in err.getvalue().split('\n') if l]
    assert status in (0, 2), f'{words}: exit status {status}'
    assert 'Traceback' not in err.getvalue(), err.getvalue()
    if status:
        assert said and said[-1].startswith('lm-nb: ') and len(said[-1]) > 12, f'{words}: {said}'
    return 'accepted' if status == 0 else said[-1]


KEYS = """
seed text text_valid clean dedup kind vocab_size tokenizer_chars context arch n_layer n_head
n_kv_head d_model d_ff tie dropout norm_eps rope_theta batch_tokens tokens pretrain.tokens
sft.tokens replay lr muon_lr optimizer weight_decay warmup cooldown schedule clip dtype compile
micro_rows log_every eval_every save_every keep_last keep_every skip_bad parallel shard_group
valid_share paraphrases weights max_documents instructions errors separator field like nonsense
model.context pretrain.lr data.text name steps device
""".split()


# ------------------------------------------------------------------ whole runs under odd recipes

BOUNDED = dict(pair.strip().split(' = ') for pair in """
seed = 0 -1 3 18446744073709551616 | context = 1 2 3 8 31 160 161 1000 | n_layer = 0 1 2 3 -1 |
n_head = 0 1 3 5 64 | n_kv_head = none 0 1 2 3 7 | d_model = 1 2 3 6 30 32 33 34 64 |
d_ff = none 0 1 3 7 64 | vocab_size = 1 264 265 270 310 330 400 5000 | kind = bpe unigram char |
dropout = 0 0.5 0.99 1 -0.1 nan | tie = true false maybe | arch = gpt2 qwen3 llama |
optimizer = muon adamw sgd | lr = 0 1e-9 0.01 1 1e30 nan inf -1 none |
muon_lr = 0 1e-9 1 1e30 nan inf -1 none | weight_decay = 0 1 1e9 nan -1 |
warmup = 0 1 3 10000 -1 0.5 | cooldown = 0 0.5 1 2 -1 nan | schedule = linear cosine wsd x |
clip = 0 1e-9 1e9 nan inf -1 | batch_tokens = 1 31 32 33 160 500 4800 100000 |
micro_rows = none 0 1 2 3 100 | norm_eps = 0 1e-30 1 nan -1 | rope_theta = 0 1 nan 1e30 -1 10000 |
doc_mask = true false | valid_share = 0 0.01 0.5 0.99 1 nan | replay = 0 0.2 0.5 0.99 1 nan |
log_every = 0 1 7 10000 | eval_every = 0 1 9 | sample_every = 0 1 9 | save_every = 0 1 9 |
keep_last = 0 1 5 | keep_every = 0 1 7 | skip_bad = 0 100 -1 | dtype = auto bf16 fp32 fp16 fp64 |
device = cpu auto cuda cuda:7 x | parallel = ddp fsdp hsdp x | shard_group = none 0 1 3 |
text = text.txt ask.jsonl missing.txt . /dev/null |
instructions = ask.jsonl text.txt missing.jsonl | field = none text x |
separator = line blank file x | errors = strict replace x | weights = 1 0 1,2 x nan |
max_documents = none 1 2 3 | clean = none light full x | dedup = none exact near x |
vocab_multiple = 1 2 128 0 -1 | recompute = true false | compile = false | zero_init = true false |
pretrain.tokens = 1 159 160 480 4800 | sft.tokens = 1 159 160 480 3200 | sft.lr = 0 1e30 nan |
sft.batch_tokens = 1 32 160
""".split('|'))


def run(folder, rng):
    "Train by a small recipe with one to three odd values, from nothing to the fine-tuned model"
    from lm_nb.cli import main
    os.chdir(folder)
    shutil.rmtree('run', ignore_errors=True)
    words = [f'{k}={rng.choice(BOUNDED[k].split(" "))}'
             for k in rng.sample(sorted(BOUNDED), rng.choice((1, 1, 2, 3)))]
    return command(main, [rng.choice(('pretrain', 'pretrain', 'shards', 'sft')), 'tiny',
                          'run_dir=run', *words]) + ' ' + ' '.join(words)


# ------------------------------------- checkpoints and models, sealed anew by whoever changed them

def change_header(data, rng):
    "A safetensors file with a header that lies"
    n = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8 + n])
    for _ in range(rng.choice((1, 1, 2))): header = twist(header, rng)
    try: new = json.dumps(header).encode()
    except RecursionError: new = b'[' * 10**5
    return rng.choice((len(new), len(new), len(new), len(new), 2**60, 0)).to_bytes(
        8, 'little') + new + data[8 + n:]


def mutate_folder(folder, rng):
    "Change one or two files of a folder of JSON and tensors; then seal it again, or not"
    from lm_nb.core import write_manifest
    files = sorted(p for p in folder.iterdir() if p.is_file())
    for path in rng.sample(files, rng.choice((1, 1, 2))):
        data, how = (
            path.read_bytes() if path.is_file() else b'',
            rng.choice('know know know spoil spoil gone empty link folder other pickle'.split()))
        if how == 'know' and path.suffix == '.json':
            try: path.write_text(json.dumps(twist(json.loads(data), rng)))
            except (RecursionError, ValueError, UnicodeDecodeError): path.write_text('[' * 10**5)
        elif how == 'know' and path.suffix == '.safetensors':
            path.write_bytes(change_header(data, rng))
        elif how in ('know', 'spoil'): path.write_bytes(spoil(data, rng))
        else: path.unlink()
        if how == 'empty': path.touch()
        if how == 'link':
            path.symlink_to(rng.choice(('/dev/zero', '/etc/passwd', path.name, 'nowhere', '..')))
        if how == 'folder': path.mkdir()
        if how == 'other':
            path.write_bytes(
                rng.choice([p for p in files if p.is_file()] or [Path(__file__)]).read_bytes())
        if how == 'pickle':
            path.write_bytes(PICKLE)
            (folder/rng.choice(('.metadata', 'x.distcp', 'pytorch_model.bin'))).write_bytes(PICKLE)
    # we would read /dev/zero ourselves
    if rng.random() < .7 and not any(p.is_symlink() and p.exists() for p in folder.iterdir()):
        with contextlib.suppress(Exception): write_manifest(folder)


# runs a command in whoever unpickles it
PICKLE = b'cposix\nsystem\n(S"touch %s"\ntR.' % os.environ.get('PAYLOAD', '/dev/null').encode()


def untouched():
    path = os.environ.get('PAYLOAD')
    assert not (path and os.path.exists(path)), 'a pickle was run'


def checkpoint(folder, rng):
    """Load what is left of a run's checkpoints: the newest whole one, none at all, or one line that
    says what is wrong"""
    import torch
    from torch import nn
    from lm_nb.training.checkpoint import Saver
    where = folder/'mutated'
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(folder/'checkpoints', where)
    mutate_folder(sorted(where.glob('step-*'))[-1], rng)
    model = nn.Sequential(nn.Embedding(19, 16), nn.Linear(16, 16), nn.Linear(16, 19))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        got = Saver(where, model, [torch.optim.AdamW(model.parameters())]).load()
    untouched()
    assert got is None or (type(got[0]) is int and isinstance(got[1], dict)), got
    assert len(said.getvalue().splitlines()) <= 2, said.getvalue()
    return 'accepted' if got and got[0] == 3 else 'the one before' if got else 'none'


def model(folder, rng):
    "Load a mutated model folder as if somebody had sent it"
    import torch
    from lm_nb.model.hub import load_model
    where = folder/'mutated-model'
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(folder/'model', where)
    mutate_folder(where, rng)
    if rng.random() < .3:
        (where/'manifest.json').unlink(missing_ok=True) if not (where/'manifest.json').is_dir(
            ) else None
    gpt, tok = load_model(where)
    untouched()
    with torch.no_grad(): gpt(torch.tensor([tok.encode('The cat')[:gpt.cfg.context]]))
    return 'accepted'


# ------------------------------------------------------------------ one case after the other

def case(work, folder, rng):
    from lm_nb.core import UserError
    try: return True, work(folder, rng)
    except UserError as e:
        text = str(e)
        # a hostile value is quoted as it is
        return '\n' not in text and 3 < len(text) < 12_000 + 5000, text
    except MemoryError: return True, 'MemoryError'
    except BaseException as e:
        return False, f'{type(e).__name__}: {e} ' + re.sub(
            r'\s+', ' ', traceback.format_exc()[-600:])


def main(kind, folder, first, last):
    os.environ['IN_TEST'] = '1'
    import torch
    torch.set_num_threads(1)
    folder, work = Path(folder), globals()[kind]
    for i in range(int(first), int(last)):
        print(f'#{i}', flush=True)
        signal.alarm(SECONDS)   # not handled: it ends a loop in C++, too
        ok, about = case(work, folder, random.Random(f'{kind} {i}'))
        signal.alarm(0)
        print(json.dumps(dict(case=i, ok=ok, about=str(about)[:700])), flush=True)


if __name__ == '__main__': main(*sys.argv[1:])
