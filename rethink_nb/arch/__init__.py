"Architectures as values: `zoo.arch(name)`, `.build()`, `.count()`."
from . import zoo
from .spec import Arch, Site, Switches
