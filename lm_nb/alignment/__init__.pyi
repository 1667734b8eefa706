# Written by tools/export.py from what the modules of this part export.
from .aligned import (
    score_values as score_values,
    values_table as values_table,
    token_logprobs as token_logprobs,
    Confidence as Confidence,
    answer_confidence as answer_confidence,
    auc as auc,
    abstain as abstain,
    plot_abstain as plot_abstain,
    kl_from as kl_from,
    measure_values as measure_values,
)
