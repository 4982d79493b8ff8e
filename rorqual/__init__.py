"""rorqual: the DeepSeek model family, V1 to V4, as one PyTorch code base.

import rorqual
model = rorqual.load("path/or/hub-id/or/file.gguf")
print(model.generate("The sea is", rorqual.Sampling(temperature=0.0)).text)
"""

from rorqual.engine import Completion, Engine, Grammar, Inside, Sampling
from rorqual.family import ModelConfig, config, models
from rorqual.kernels.mode import invariant
from rorqual.model import Model, load, save
from rorqual.nn import Layout, Transformer

__version__ = "0.1.0"
__all__ = [
    "Completion",
    "Engine",
    "Grammar",
    "Inside",
    "Layout",
    "Model",
    "ModelConfig",
    "Sampling",
    "Transformer",
    "config",
    "invariant",
    "load",
    "models",
    "save",
]
