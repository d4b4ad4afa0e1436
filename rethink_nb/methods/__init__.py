"Pruning methods: `names()`, `info(name)`, `prune(name, net, ratio)`, `callbacks(name)`."
from . import all as _all
from .base import Method, Pruned, callbacks, info, names, prune, pruned_arch, register
