"Architectures as values: `zoo.arch(name)`, `.build()`, `.count()`; what they cost; families of your own."
from . import zoo
from .count import Count
from .effective import EffectiveCount, effective
from .measure import Latency, latency, peak_memory
from .spec import Arch, Family, Selection, Site, Switches, register_family
