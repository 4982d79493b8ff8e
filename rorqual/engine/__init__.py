"""Generation: the plain loop, speculative decoding, and the engine for many requests at once."""

from rorqual.engine.core import EngineFull
from rorqual.engine.engine import Engine
from rorqual.engine.grammar import Grammar, GrammarError
from rorqual.engine.inside import Facts, Inside, Look, Sight
from rorqual.engine.loop import Answer, Completion, Delta, generate
from rorqual.engine.request import Handle
from rorqual.engine.sampling import Sampler, Sampling, SamplingError
from rorqual.engine.speculative import generate_speculative
from rorqual.engine.team import TeamError

__all__ = [
    "Answer",
    "Completion",
    "Delta",
    "Engine",
    "EngineFull",
    "Facts",
    "Grammar",
    "GrammarError",
    "Handle",
    "Inside",
    "Look",
    "Sampler",
    "Sampling",
    "SamplingError",
    "Sight",
    "TeamError",
    "generate",
    "generate_speculative",
]
