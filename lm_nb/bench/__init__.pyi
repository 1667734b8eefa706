# Written by tools/export.py from what the modules of this part export.
from .measure import (
    BENCHMARKS as BENCHMARKS,
    Measure as Measure,
    Paired as Paired,
    paired as paired,
    peak_rss as peak_rss,
    Line as Line,
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
from .shakespeare import (
    fetch_shakespeare as fetch_shakespeare,
)
