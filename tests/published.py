"Random models as Qwen3 and GPT-2 are published: bf16, in several files, byte-level tokenizers"
import json
import random
import sys
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parent/'use'))
try: from foreign import record  # what was compared with another program, for the table of the site
except ImportError:
    def record(package, what, equal, of): pass

# the rule by which Qwen cuts text before it merges
CUT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
       r"\s*[\r\n]+|\s+(?!\S)|\s+")
CONTROL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|object_ref_start|>', '<|vision_pad|>')
WORDS = '<tool_call>', '</tool_call>', '<think>', '</think>'  # added, but no special tokens

# as Qwen3 does: an empty thought before an answer that follows the last question, if it is
# not asked for one; nothing is said unless there is a system text
QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set last = namespace(query=messages|length - 1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{%- set last.query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > last.query %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        {{- m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

SAID = ['春眠不覺曉，處處聞啼鳥。', 'What is the capital of France?', 'Paris lies on the Seine. ',
        'def f(x):\n    return x + 1\n', '1 + 1 = 2; 10,000 + 1', "it's, we'll, IT'S",
        'a\r\n\r\nb', '\t\tx',
        'naïve café e\u0301', '👩‍🚀🏽', '\ufeffBOM', '\x00\x7f', '一二三，四五。',
        'ﬁ ① ｗｉｄｅ', '  two  spaces ',
        '\u3000全角', 'a\u2028b', '▁x▁', '<|user|>', '</s>', '<0x41>', '&lt;',
        '\n', '\n\n\n', ' \n \n']


def texts(n, seed=0, marks=(*CONTROL, *WORDS)):
    "Sentences and oddities in a random order, and markers among them"
    dice = random.Random(seed)
    return [''.join(dice.choices([*SAID, *marks, ' '], k=dice.randint(1, 9))) for _ in range(n)]


def write_tokenizer(folder, kind='qwen3', size=400):
    "`tokenizer.json` and `tokenizer_config.json`, in the manner of one of the two"
    folder.mkdir(exist_ok=True, parents=True)
    bpe, qwen = tokenizers.Tokenizer(models.BPE()), kind == 'qwen3'
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not qwen)
    bpe.pre_tokenizer = level
    if qwen:
        bpe.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(CUT), 'isolated')
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(SAID*3, trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=level.alphabet()))
    control = CONTROL if qwen else CONTROL[:1]
    bpe.add_special_tokens([AddedToken(t, normalized=False) for t in control])
    if qwen: bpe.add_tokens([AddedToken(t, normalized=False, special=False) for t in WORDS])
    bpe.save(str(folder/'tokenizer.json'))
    named = dict(bos_token=None, eos_token='<|im_end|>', pad_token='<|endoftext|>',
                 tokenizer_class='Qwen2Tokenizer', chat_template=QWEN3) if qwen else {}
    config = dict(model_max_length=128 if not qwen else 40960, **named)
    (folder/'tokenizer_config.json').write_text(json.dumps(config))
    return folder


def write_model(folder, kind='qwen3', parts='60KB', vocab=512, **changes):
    "`config.json` and weights in bf16, as transformers writes them"
    torch.manual_seed(0)
    if kind == 'qwen3':
        shape = dict(
            vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            head_dim=16, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=40960, rope_theta=1e6, tie_word_embeddings=True,
            bos_token_id=400, eos_token_id=402)
        made = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape | changes))
    else:
        shape = dict(vocab_size=vocab, n_positions=128, n_embd=32, n_layer=2, n_head=2,
                     bos_token_id=400, eos_token_id=400)
        made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | changes))
    made.to(torch.bfloat16).save_pretrained(folder, max_shard_size=parts)
    return folder


def write_published(folder, kind='qwen3', **changes):
    "A whole model folder"
    return write_model(write_tokenizer(folder, kind), kind, **changes)
