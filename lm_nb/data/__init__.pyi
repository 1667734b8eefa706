# Written by tools/export.py from what the modules of this part export.
from .cleaning import (
    CleanConfig as CleanConfig,
    normalize as normalize,
    is_unspaced as is_unspaced,
    letters as letters,
    code_points as code_points,
    units as units,
    ngram_hashes as ngram_hashes,
    clean_text as clean_text,
    RuleStats as RuleStats,
    plot_rules as plot_rules,
)
from .corpus import (
    FORMATS as FORMATS,
    BadRow as BadRow,
    read_records as read_records,
    NoRecords as NoRecords,
    poem_text as poem_text,
    format_of as format_of,
    text_batches as text_batches,
    map_ordered as map_ordered,
    with_counts as with_counts,
    read_texts as read_texts,
    source_format as source_format,
    has_instructions as has_instructions,
    as_dataset as as_dataset,
)
from .dedup import (
    minhash as minhash,
    MinHashIndex as MinHashIndex,
    clean_documents as clean_documents,
    read_documents as read_documents,
    uniform_hash as uniform_hash,
    held_out as held_out,
    train_valid_split as train_valid_split,
    LeakFilter as LeakFilter,
    find_contamination as find_contamination,
    datatrove_documents as datatrove_documents,
    datatrove_signatures as datatrove_signatures,
)
from .instructions import (
    Example as Example,
    to_example as to_example,
    read_instructions as read_instructions,
    lay_out as lay_out,
    conversation_ids as conversation_ids,
    prompt_ids as prompt_ids,
    sft_row as sft_row,
    needed_context as needed_context,
    encode_each as encode_each,
    NothingFits as NothingFits,
    encode_examples as encode_examples,
)
from .mediawiki import (
    read_mediawiki as read_mediawiki,
    wiki_text as wiki_text,
)
from .microworld import (
    GROUPS as GROUPS,
    TRAIN_RECORDS as TRAIN_RECORDS,
    World as World,
    make_world as make_world,
    deal_groups as deal_groups,
    articles as articles,
    records_by_task as records_by_task,
    instruction_records as instruction_records,
    fact_probes as fact_probes,
    write_microworld as write_microworld,
)
from .order import (
    splitmix64 as splitmix64,
    permute as permute,
    Order as Order,
    document_numbers as document_numbers,
    Batches as Batches,
    PretrainBatches as PretrainBatches,
    MixtureBatches as MixtureBatches,
    Prefetcher as Prefetcher,
    eval_batches as eval_batches,
)
from .packing import (
    packed_batch as packed_batch,
    write_packed as write_packed,
    Packed as Packed,
    SFTBatches as SFTBatches,
    plot_rows as plot_rows,
    ReplayBatches as ReplayBatches,
    sft_eval_batches as sft_eval_batches,
)
from .poems import (
    is_quatrain as is_quatrain,
    fetch_poems as fetch_poems,
)
from .preferences import (
    Preference as Preference,
    to_preference as to_preference,
    read_preferences as read_preferences,
    has_preferences as has_preferences,
    encode_preferences as encode_preferences,
    answer_batch as answer_batch,
    PairBatch as PairBatch,
    pair_batch as pair_batch,
    PairBatches as PairBatches,
    pair_eval_batches as pair_eval_batches,
)
from .prepare import (
    DataConfig as DataConfig,
    source_weights as source_weights,
    resolve_sources as resolve_sources,
    absolute_sources as absolute_sources,
    first_look as first_look,
    check_sources as check_sources,
    train_parts as train_parts,
    stored_documents as stored_documents,
    write_text as write_text,
    stored_records as stored_records,
    stored_preferences as stored_preferences,
    write_records as write_records,
    write_preferences as write_preferences,
    tokenizer_texts as tokenizer_texts,
    text_shards as text_shards,
    packed_records as packed_records,
)
from .prose import (
    passages as passages,
    looks_like_prose as looks_like_prose,
    page_text as page_text,
)
from .shards import (
    IGNORE as IGNORE,
    pretrain_pair as pretrain_pair,
    Batch as Batch,
    as_batch as as_batch,
    concat_batches as concat_batches,
    file_entry as file_entry,
    resumable_dir as resumable_dir,
    verify_files as verify_files,
    forget_verified as forget_verified,
    write_token_shards as write_token_shards,
    read_index as read_index,
    map_file as map_file,
    Shards as Shards,
)
from .sources import (
    Report as Report,
    ReadConfig as ReadConfig,
    find_files as find_files,
    split_sources as split_sources,
    join_sources as join_sources,
    open_bytes as open_bytes,
    total_bytes as total_bytes,
)
from .survey import (
    count_scripts as count_scripts,
    survey_source as survey_source,
    corpus_report as corpus_report,
    plot_corpus as plot_corpus,
)
from .tokenizer import (
    ChatFormat as ChatFormat,
    TokenizerConfig as TokenizerConfig,
    cut_text as cut_text,
    Tokenizer as Tokenizer,
    ByteLevelTokenizer as ByteLevelTokenizer,
    load_tokenizer as load_tokenizer,
    encode_stream as encode_stream,
    show_tokens as show_tokens,
    bytes_per_token as bytes_per_token,
    useful_size as useful_size,
)
from .values import (
    prefers as prefers,
    refusal as refusal,
    value_records as value_records,
    preference_pairs as preference_pairs,
    side_doors as side_doors,
    write_values as write_values,
)
