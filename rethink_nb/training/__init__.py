"Data, recipes, the one loop, arms and their costs."
from .arms import Arm, arms
from .data import Data, load_data
from .ledger import Cost, train_macs
from .loop import History, evaluate, train
from .recipe import Recipe, fine_tune, fine_tune_large, recipe, scratch_b, scratch_e
