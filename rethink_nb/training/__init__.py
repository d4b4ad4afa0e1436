"Data, recipes, the one loop, arms and their costs."
from .arms import Arm, arms
from .augment import plain_batches
from .data import Data, load_data
from .device import best_precision
from .distributed import train_distributed
from .ledger import Cost, budget_epochs, train_macs
from .loop import Diverged, History, train
from .recipe import SCHEDULES, Recipe, fine_tune, fine_tune_large, recipe, reshaped, scratch_b, scratch_e
from .scores import agreement, evaluate, logits_of, scores
