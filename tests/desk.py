"A folder to train in: a recipe that takes seconds, a text, and instruction records"
import json

PEOPLE = 'Ada Bela Cora Dora Edna Fay Gail Hope Iris'.split()
TOWNS = '林城 海门 青山 石桥 Rivertown Hillford Oakham'.split()
RECIPE = dict(
    text='text.txt', instructions='ask.jsonl', dtype='fp32', device='cpu', kind='bpe',
    vocab_size=330, context=32, n_layer=1, n_head=2, d_model=32,
    batch_tokens=160,  # 5 rows a step: an odd number, so that two ranks must share unevenly
    valid_share=0.1, warmup=2, log_every=1)


def facts(people=PEOPLE, towns=TOWNS):
    "Who came to which town, and when"
    return [(p, t, 1800 + 10*i + j) for i, p in enumerate(people) for j, t in enumerate(towns)]


def text(some):
    return ''.join(f'{p} came to {t} in {y}. {p} 在 {y} 年来到 {t}。\n' for p, t, y in some)


def asks(some):
    return [dict(instruction=f'When did {p} come?', input=t, output=f'In {y}.')
            for p, t, y in some]


def furnish(folder, keys):
    """Write settings.ini with the recipe `tiny`, where `keys` add to `RECIPE` or replace it,
    text.txt and ask.jsonl"""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = ''.join(f'{k} = {v}\n' for k, v in (RECIPE | keys).items())
    (folder/'settings.ini').write_text(f'[tiny]\n{pairs}')
    (folder/'text.txt').write_text(text(facts()), encoding='utf-8')
    (folder/'ask.jsonl').write_text(''.join(json.dumps(a) + '\n' for a in asks(facts())))
    return folder
