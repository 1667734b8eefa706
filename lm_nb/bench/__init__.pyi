# Written by tools/export.py from what the modules of this part export.
from .expect import (
    compressor_bits as compressor_bits,
    byte_bits as byte_bits,
    frequency_loss as frequency_loss,
    goes_round as goes_round,
    answer_form as answer_form,
    expectations as expectations,
)
from .measure import (
    BENCHMARKS as BENCHMARKS,
    Measure as Measure,
    Turns as Turns,
    in_turn as in_turn,
    Paired as Paired,
    paired as paired,
    peak_rss as peak_rss,
    Line as Line,
    Result as Result,
    write_result as write_result,
    read_result as read_result,
    summary_table as summary_table,
    plot_goals as plot_goals,
    benchmark as benchmark,
    load_benchmarks as load_benchmarks,
    run_benchmarks as run_benchmarks,
)
from .plan import (
    pick_stage as pick_stage,
    random_batch as random_batch,
    synchronizer as synchronizer,
    StepTimer as StepTimer,
    format_number as format_number,
    format_seconds as format_seconds,
    describe_machine as describe_machine,
    plan_run as plan_run,
    plot_plan as plot_plan,
)
from .profiling import (
    profile_recipe as profile_recipe,
    plot_kinds as plot_kinds,
)
from .scaling import (
    Point as Point,
    read_grid as read_grid,
    law_key as law_key,
    sweep_table as sweep_table,
    sweep as sweep,
    Law as Law,
    fit_law as fit_law,
    interval as interval,
    JointLaw as JointLaw,
    fit_joint as fit_joint,
    left_out as left_out,
    rms as rms,
    predict as predict,
    KnownLaw as KnownLaw,
    known_law as known_law,
    loss_sentence as loss_sentence,
)
from .shakespeare import (
    fetch_shakespeare as fetch_shakespeare,
)
from .sizes import (
    SHAPES as SHAPES,
    Part as Part,
    look as look,
    choose_share as choose_share,
    choose_vocabulary as choose_vocabulary,
    choose_context as choose_context,
    Need as Need,
    share_out as share_out,
    measure_rate as measure_rate,
    choose_shape as choose_shape,
    Choice as Choice,
    choose_sizes as choose_sizes,
    sized_recipe as sized_recipe,
)
