"Architectures as values: `zoo.arch(name)`, `.build()`, `.count()`; what they cost; families of your own, other people's networks, torchvision's weights."
from . import zoo
from .count import Count
from .effective import EffectiveCount, effective
from .external import register_builder
from .measure import Latency, latency, peak_memory
from .spec import Arch, Family, Selection, Site, Switches, register_family
from .torchvision import from_torchvision, to_torchvision
