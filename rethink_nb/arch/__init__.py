"Architectures as values: `zoo.arch(name)`, `.build()`, `.count()`."
from . import zoo
from .count import Count
from .spec import Arch, Site, Switches
