"""Generation: sampling, the plain loop, and speculative decoding with MTP."""

from rorqual.engine.loop import Answer, Completion, Delta, check_prompts, fit, generate
from rorqual.engine.sampling import Sampler, Sampling, SamplingError
from rorqual.engine.speculative import generate_speculative

__all__ = [
    "Answer",
    "Completion",
    "Delta",
    "Sampler",
    "Sampling",
    "SamplingError",
    "check_prompts",
    "fit",
    "generate",
    "generate_speculative",
]
