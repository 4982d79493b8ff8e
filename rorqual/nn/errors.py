"""Errors of the modules: bad input is refused with what is wrong and what to do."""

from __future__ import annotations


class InputError(ValueError):
    """Token ids, masks or shapes a model can't take."""


class ContextError(InputError):
    """A sequence longer than the model's positions or the cache's room."""
