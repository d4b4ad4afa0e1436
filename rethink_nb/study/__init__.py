"A study as data, its store of results, what carries it out, and what came out."
from .grid import Study
from .pool import run_all
from .run import execute
from .step import Run
from .store import Store
from .trial import Trial, stored_trials
from . import figures, pages, results, shapes # noqa: F401 (what a trial says of itself, and writes)
