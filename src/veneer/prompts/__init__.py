"""Trained virtual tokens in front of the text: one file each, registered by name in PROMPTS."""

from veneer.prompts.base import PROMPTS, Prompt, PromptConfig, Shape
from veneer.registry import import_siblings

import_siblings(__name__, list(__path__))

__all__ = ["PROMPTS", "Prompt", "PromptConfig", "Shape"]
