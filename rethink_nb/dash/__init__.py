"Dashboards over a store: what is chosen, and, where there is a screen, the widgets that show it."
from .example import example_store
from .state import State

_SHOWN = ("architectures", "curves", "verdicts")


def __getattr__(name):
    "The dashboards, imported with their widgets when they are first asked for: a `State` needs none"
    if name not in _SHOWN: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import app
    return getattr(app, name)


def __dir__(): return [*globals(), *_SHOWN]
