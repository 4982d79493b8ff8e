"""The bricks in plain PyTorch, and `Transformer`, which composes them from a config.

Shape suffixes: B batch, T new tokens of this pass, K keys (positions seen), k chosen keys, E experts or
entries, H query heads, G key/value heads, D hidden width, d head width, C latent width, V vocabulary,
N = B * T tokens, P = N * K token-expert pairs, n residual streams, W any width. A name without a suffix
has the shape its docstring gives.
"""

from rorqual.nn.cache import Cache
from rorqual.nn.errors import ContextError, InputError
from rorqual.nn.layout import Layout
from rorqual.nn.step import Rows, Step, Trace
from rorqual.nn.transformer import Transformer

__all__ = ["Cache", "ContextError", "InputError", "Layout", "Rows", "Step", "Trace", "Transformer"]
