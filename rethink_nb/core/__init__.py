"The ground floor: records with a content id, names, seeds, files, the moments of training."
from .errors import UserError
from .record import Record
from .registry import Registry
