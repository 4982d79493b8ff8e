"""Released checkpoints and our parameters, in both directions."""

from rorqual.weights.errors import CheckpointError
from rorqual.weights.gguf import gguf_fields
from rorqual.weights.hub import TEXT, resolve
from rorqual.weights.load import load, read_config
from rorqual.weights.released import Released
from rorqual.weights.save import save

__all__ = ["TEXT", "CheckpointError", "Released", "gguf_fields", "load", "read_config", "resolve", "save"]
