"Pruning methods: `names()`, `info(name)`, `prune(name, net, ratio)`, `callbacks(name)`."
from .base import Ask, Choice, Method, callbacks, info, names, prune, pruned_arch, register
from .plugins import load_plugin
from .pruned import Pruned, carry_out
from . import all as _all # last: plugins may import the names above
