"""The type checker that jaxtyping's import hook puts on every function of the maths: ints are floats, as in PEP 484."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
