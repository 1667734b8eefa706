# Written by tools/export.py from what the modules of this part export.
from .chat import (
    stop_ids as stop_ids,
    stream_text as stream_text,
    Chat as Chat,
    answer as answer,
    example_prompts as example_prompts,
    saw_system_text as saw_system_text,
    chat_widget as chat_widget,
)
from .choice import (
    LAYOUTS as LAYOUTS,
    choice_score as choice_score,
    Question as Question,
    read_questions as read_questions,
    Outcome as Outcome,
    ask_questions as ask_questions,
    score_outcomes as score_outcomes,
    choice_table as choice_table,
    plot_choice as plot_choice,
    training_documents as training_documents,
    score_files as score_files,
)
from .decoding import (
    CachedDecoder as CachedDecoder,
    join_rows as join_rows,
)
from .evaluate import (
    surprisal as surprisal,
    heldout as heldout,
    wilson_interval as wilson_interval,
    entity_interval as entity_interval,
    Answer as Answer,
    tally as tally,
    exact_match as exact_match,
    plot_scores as plot_scores,
    cloze_match as cloze_match,
    evaluation as evaluation,
    evaluations as evaluations,
)
from .facts import (
    log_likelihoods as log_likelihoods,
    forced_choice as forced_choice,
    ask_facts as ask_facts,
    difference as difference,
    score_facts as score_facts,
    pool_facts as pool_facts,
    facts_table as facts_table,
    plot_facts as plot_facts,
)
from .sampling import (
    SampleConfig as SampleConfig,
    sample_next as sample_next,
    eval_mode as eval_mode,
    plain_decode as plain_decode,
    register_decoder as register_decoder,
    generate as generate,
    stream as stream,
    generate_batch as generate_batch,
)
