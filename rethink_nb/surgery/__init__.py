"From a plan to networks: masked, cut, fresh; and the proof that masked and cut are the same function."
from .cut import cut, fresh
from .mask import masked
from .plan import Plan
from .verify import Verdict, verify
