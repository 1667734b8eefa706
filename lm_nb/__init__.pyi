# The names that people use most. Everything else is in the parts.
from .core import Table as Table, UserError as UserError
from .data.instructions import read_instructions as read_instructions, sft_row as sft_row
from .data.order import PretrainBatches as PretrainBatches
from .data.packing import SFTBatches as SFTBatches
from .data.shards import Batch as Batch, Shards as Shards, pretrain_pair as pretrain_pair
from .data.tokenizer import Tokenizer as Tokenizer
from .model.gpt import GPT as GPT, GPTConfig as GPTConfig
from .model.hub import load_model as load_model, save_model as save_model
from .inference.chat import Chat as Chat, answer as answer
from .inference.sampling import generate as generate
from .inference.evaluate import evaluation as evaluation, heldout as heldout
from .training.loop import TrainConfig as TrainConfig, training_steps as training_steps
from .training.recipe import (
    Stage as Stage, load_recipe as load_recipe, register_stage as register_stage)
from .training.run import Run as Run
from .training.stage import run_stage as run_stage

__version__: str
