# Written by tools/export.py from what the modules of this part export.
from .estimate import (
    parameter_counts as parameter_counts,
    flops_per_token as flops_per_token,
    step_flops as step_flops,
    format_bytes as format_bytes,
    Memory as Memory,
    n_shards as n_shards,
    memory as memory,
    step_bytes as step_bytes,
    available_memory as available_memory,
    largest_rows as largest_rows,
    comm_bytes as comm_bytes,
    quiet_stderr as quiet_stderr,
    peak_allocated as peak_allocated,
)
from .fused import (
    reference_ops as reference_ops,
    working_dtype as working_dtype,
    attention_kernel as attention_kernel,
    pick_attention as pick_attention,
    attention_weights as attention_weights,
    chunk_rows as chunk_rows,
    chunked_nll as chunked_nll,
    KVCache as KVCache,
)
from .gpt import (
    ops as ops,
    GPTConfig as GPTConfig,
    document_mask as document_mask,
    repeat_kv as repeat_kv,
    rotary_table as rotary_table,
    attn_context as attn_context,
    norm_rope as norm_rope,
    Ops as Ops,
    RMSNorm as RMSNorm,
    Attention as Attention,
    GeluMLP as GeluMLP,
    SwiGLU as SwiGLU,
    Block as Block,
    Transformer as Transformer,
    GPT as GPT,
)
from .hub import (
    to_transformers as to_transformers,
    from_transformers as from_transformers,
    save_model as save_model,
    load_model as load_model,
)
