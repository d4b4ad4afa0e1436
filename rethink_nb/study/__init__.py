"A study as data, its store of results, what carries it out, and what came out."
from .grid import Run, Study
from .pool import run_all
from .run import execute
from .store import Store
from .trial import Trial, stored_trials
