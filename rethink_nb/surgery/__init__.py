"From a plan to networks: masked, cut, fresh; the proof that masked and cut are the same function; a network in a folder."
from .cut import cut, fresh
from .mask import masked
from .plan import Plan, WeightMask, pack
from .saved import load, save
from .verify import Verdict, verify
