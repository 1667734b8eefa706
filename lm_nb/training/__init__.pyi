# Written by tools/export.py from what the modules of this part export.
from .checkpoint import (
    checkpoints as checkpoints,
    newest as newest,
    Saver as Saver,
)
from .cluster import (
    RemoteShards as RemoteShards,
    when_read as when_read,
    slurm_script as slurm_script,
    kubernetes_job as kubernetes_job,
)
from .loop import (
    DTYPES as DTYPES,
    next_token_loss as next_token_loss,
    TrainConfig as TrainConfig,
    Ranks as Ranks,
    micro_batches as micro_batches,
    Runtime as Runtime,
    grad_scaler as grad_scaler,
    Step as Step,
    training_steps as training_steps,
)
from .monitor import (
    matmul_peak as matmul_peak,
    utilisation as utilisation,
    datasheet_peak as datasheet_peak,
    Meter as Meter,
    read_log as read_log,
    RunLog as RunLog,
    is_due as is_due,
    plot_run as plot_run,
    live_plot as live_plot,
    link_run as link_run,
    Interrupted as Interrupted,
    stop_flag as stop_flag,
    NonFiniteGuard as NonFiniteGuard,
    explain_oom as explain_oom,
)
from .optim import (
    Muon as Muon,
    OptimConfig as OptimConfig,
    make_optimizers as make_optimizers,
    lr_factor as lr_factor,
    set_lr as set_lr,
    resolve_defaults as resolve_defaults,
)
from .pretrain import (
    rows_per_step as rows_per_step,
    text_batches as text_batches,
    validation as validation,
    fingerprints as fingerprints,
    eval_rows as eval_rows,
    text_feed as text_feed,
    many_passes as many_passes,
    few_held_out as few_held_out,
)
from .ranks import (
    launch as launch,
    close_ranks as close_ranks,
    init_ranks as init_ranks,
    agree as agree,
    RanksLost as RanksLost,
    lost_ranks as lost_ranks,
    wrap as wrap,
    unwrap as unwrap,
)
from .recipe import (
    Feed as Feed,
    FineTuneConfig as FineTuneConfig,
    PairConfig as PairConfig,
    Stage as Stage,
    register_stage as register_stage,
    find_stage as find_stage,
    Recipe as Recipe,
    load_recipe as load_recipe,
    recorded_recipe as recorded_recipe,
    resume_recipe as resume_recipe,
)
from .run import (
    RUNTIME_KEYS as RUNTIME_KEYS,
    run_lock as run_lock,
    differing as differing,
    TextShards as TextShards,
    base_tokenizer as base_tokenizer,
    Run as Run,
    fork_run as fork_run,
)
from .sft import (
    sft_feed as sft_feed,
)
from .stage import (
    tune_malloc as tune_malloc,
    trim_malloc as trim_malloc,
    train as train,
    exclusive_run as exclusive_run,
    prepare_stages as prepare_stages,
    run_stage as run_stage,
)
