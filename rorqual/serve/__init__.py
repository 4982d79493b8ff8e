"""The HTTP server: OpenAI's, DeepSeek's and Anthropic's APIs over one engine."""

from rorqual.serve.app import create_app
from rorqual.serve.settings import Settings, keys_of, read_keys

__all__ = ["Settings", "create_app", "keys_of", "read_keys"]
