"After pruning: the weights, or only the architecture? See the notebooks in nbs/."
__version__ = "0.1.0"
