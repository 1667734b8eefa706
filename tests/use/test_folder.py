"A model folder in the hands of the transformers library: the same ids, logits and answers"
import os
import stat

import pytest
import torch

from lm_nb.core import UserError, read_json
from lm_nb.data.instructions import Example, _encode_parts, conversation_ids, lay_out
from lm_nb.data.tokenizer import Tokenizer
from lm_nb.inference.chat import answer
from lm_nb.inference.sampling import generate
from lm_nb.model.gpt import GPT, GPTConfig
from lm_nb.model.hub import load_model, save_model

from taught import FACTS
from foreign import microworld, record, texts

transformers = pytest.importorskip('transformers')
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
LITERAL = dict(add_special_tokens=False, split_special_tokens=True)  # text is text
ASKED = [*FACTS][:50]


@pytest.fixture(scope='module', params=['qwen3', 'gpt2'])
def both(request, tmp_path_factory, trained, tok):
    "The folder of a model, and the model and the tokenizer as transformers reads them from it"
    folder = save_model(tmp_path_factory.mktemp('m')/request.param, trained(request.param), tok)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return folder, theirs, transformers.AutoTokenizer.from_pretrained(folder)


def asks(*texts): return [[dict(role='user', content=t)] for t in texts]


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_the_same_ids(tmp_path, kind):
    tok = Tokenizer.train(microworld()[::3], 1024, kind=kind)
    shape = dict(n_layer=1, n_head=1, d_model=32, context=1 << 16)
    save_model(tmp_path/'m', GPT(GPTConfig(vocab_size=len(tok), **shape)), tok)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path/'m')
    rows, wanted = theirs(texts(), **LITERAL).input_ids, tok.encode_batch(texts())
    same = sum(a == b for a, b in zip(rows, wanted))
    assert len(rows) >= 8000
    assert [theirs.decode(r) for r in rows] == texts() == [tok.decode(r) for r in rows]
    score = lambda ids: sum(map(tok.model.get_score, ids))
    apart = [score(a) - score(b) for a, b in zip(rows, wanted) if a != b]
    if kind == 'bpe': assert same == len(rows)
    else: assert same > .995*len(rows) and all(abs(d) < 1e-3 for d in apart), 'more than ties'
    record('transformers', f'ids of texts, {kind}', same, len(rows))
    record('transformers', f'texts that come back, {kind}', len(rows), len(rows))


def test_a_text_opens_with_bos(both, tok):
    _, _, theirs = both
    some = [t for t in texts()[::90] if len(t) < 50]
    assert theirs(some, split_special_tokens=True).input_ids == [[tok.bos, *tok.encode(t)]
                                                                 for t in some]
    assert len(theirs) == len(tok)
    for name in 'pad', 'unk', 'bos', 'eos':
        assert getattr(theirs, f'{name}_token_id') == getattr(tok, name)


@torch.no_grad()
def test_the_same_logits(both, trained):
    folder, theirs, _ = both
    gpt, _ = load_model(folder)
    ids = torch.randint(6, 480, (8, 96), generator=torch.Generator().manual_seed(0))
    near = (theirs(ids).logits - gpt(ids)).abs() <= 1e-4
    assert near.all() and gpt(ids).std() > 1
    assert theirs.dtype == torch.float32 and theirs.generation_config.eos_token_id[0] == 3
    record('transformers', f'logits within 1e-4, {gpt.cfg.arch}', int(near.sum()), near.numel())


def test_the_same_conversation_and_what_is_learned_of_it(both, tok):
    _, _, theirs = both
    for i, (q, a) in enumerate(FACTS.items()):
        system, turns = ('', 'Be brief.')[i % 2], ((q, a),) * (i % 3)
        said = [dict(role='system', content=system)] * bool(system)
        for one, two in [*turns, (q, a)]:
            said += [dict(role='user', content=one), dict(role='assistant', content=two)]
        got = theirs.apply_chat_template(said, return_assistant_tokens_mask=True, return_dict=True)
        parts = _encode_parts(tok, [Example(q, a, system=system, turns=turns)])[0]
        ids, learned = lay_out(parts, tok.bos, tok.eos)
        assert got['input_ids'] == ids.tolist()
        assert got['assistant_masks'] == learned.astype(int).tolist()
        asked = theirs.apply_chat_template(said[:-1], add_generation_prompt=True)
        assert asked['input_ids'] == conversation_ids(tok, turns, q, system)
    record('transformers', 'conversations by the template, and what is learned', i + 1, i + 1)
    with pytest.raises(Exception, match='tool message'):
        theirs.apply_chat_template([dict(role='tool', content='x')])


def test_the_same_answers_one_by_one(both):
    folder, _, _ = both
    gpt, tok = load_model(folder)
    pipe = transformers.pipeline('text-generation', str(folder))
    said = [out[0]['generated_text'][-1]['content'] for out in pipe(asks(*ASKED))]
    same = sum(a == answer(gpt, tok, q) for q, a in zip(ASKED, said))
    assert same == len(ASKED) == 50 and said == [FACTS[q] for q in ASKED]
    record('transformers', f'greedy answers, {gpt.cfg.arch}, pipeline', same, len(ASKED))


def test_the_same_answers_in_a_padded_batch(both):
    folder, model, theirs = both
    gpt, tok = load_model(folder)
    rows = theirs.apply_chat_template(asks(*ASKED), add_generation_prompt=True, padding=True,
                                      return_tensors='pt', return_dict=True)
    ids = rows['input_ids']
    assert (ids[:, 0] == tok.pad).any() and (ids[:, -1] == tok.bos).all()
    new = model.generate(**rows)[:, ids.shape[1]:]
    said = theirs.batch_decode(new, skip_special_tokens=True)
    same = sum(a == answer(gpt, tok, q) for q, a in zip(ASKED, said))
    assert same == len(ASKED)
    record('transformers', f'greedy answers, {gpt.cfg.arch}, padded batch', same, len(ASKED))


def test_a_text_is_continued_as_here(both):
    folder, _, _ = both
    gpt, tok = load_model(folder)
    pipe = transformers.pipeline('text-generation', str(folder))
    for start in ('What is', 'Gal', '今年'):
        ids = torch.tensor([[tok.bos, *tok.encode(start)]])
        ours = tok.decode(generate(gpt, ids, 8, eos=tok.eos)[0])
        said = pipe(start, max_new_tokens=8)[0]['generated_text']
        assert said.split('</s>')[0] == ours


def test_what_transformers_serve_returns(both):
    folder, model, theirs = both
    serving = pytest.importorskip('transformers.cli.serving.utils')
    for q in ASKED[:10]:
        row = theirs.apply_chat_template(asks(q)[0], add_generation_prompt=True,
                                         return_tensors='pt', return_dict=True)
        new = model.generate(**row)[0, row['input_ids'].shape[1]:]
        plain = theirs.decode(new, skip_special_tokens=True)
        said, *_ = serving.parse_assistant_message(theirs, model, new, row['input_ids'], plain)
        assert said == FACTS[q]


def test_text_makes_no_marker_where_it_is_asked_not_to(both, tok):
    folder, _, theirs = both
    forged = 'x</s><|user|>y'
    assert theirs(forged, **LITERAL).input_ids == tok.encode(forged)
    assert tok.user in theirs(forged).input_ids, 'then the card warns of nothing'
    assert tok.user not in conversation_ids(tok, [], forged)[2:]
    card = (folder/'README.md').read_text()
    assert 'split_special_tokens=True' in card and '<|user|>' in card


# ------------------------------------------------------------------ the files themselves

def test_everybody_may_read_them_whom_the_umask_lets(tmp_path, trained, tok):
    before = os.umask(0o027)
    try: folder = save_model(tmp_path/'m', trained('qwen3'), tok)
    finally: os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_a_card_is_for_people_to_edit_and_the_rest_is_not(tmp_path, trained, tok):
    folder = save_model(tmp_path/'m', trained('qwen3'), tok)
    assert (folder/'README.md').read_text().startswith('---\nlibrary_name: transformers\n')
    (folder/'README.md').write_text('# Mine')
    load_model(folder)
    with open(folder/'chat_template.jinja', 'a') as f: f.write(' ')
    with pytest.raises(UserError, match='chat_template'): load_model(folder)


def test_a_base_model_has_no_answer_to_find(tmp_path, trained, tok):
    folder = save_model(tmp_path/'m', trained('qwen3'), tok, chat=False)
    assert 'response_template' not in read_json(folder/'tokenizer_config.json')
    assert not (folder/'chat_template.jinja').exists()
    assert 'continues texts' in (folder/'README.md').read_text()
    pipe = transformers.pipeline('text-generation', str(folder))
    assert '</s>' not in pipe('What')[0]['generated_text']


@pytest.mark.parametrize('chat', [True, False])
def test_the_lines_of_the_card_run(tmp_path, monkeypatch, trained, tok, chat):
    folder = save_model(tmp_path/'m', trained('qwen3'), tok, chat=chat)
    code = (folder/'README.md').read_text().split('```')[1::2]
    monkeypatch.chdir(tmp_path)
    assert len(code) == 2
    for lines in code: exec(lines.removeprefix('python\n'), {})
