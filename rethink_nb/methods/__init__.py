"Pruning methods: `names()`, `info(name)`, `prune(name, net, ratio)`, `callbacks(name)`."
from . import all as _all
from .base import Method, callbacks, info, names, prune, pruned_arch, register
from .pruned import Pruned, carry_out
