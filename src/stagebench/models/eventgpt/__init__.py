"""EventGPT for transformers 5. Importing this package registers the Auto classes."""

from transformers import AutoProcessor

from stagebench.models.eventgpt.configuration import EVENT_TOKEN_INDEX, EventGptConfig
from stagebench.models.eventgpt.modeling import EventGptForConditionalGeneration, EventGptModel, register
from stagebench.models.eventgpt.processing import PROMPT, EventGptProcessor

__all__ = [
    "EVENT_TOKEN_INDEX",
    "PROMPT",
    "EventGptConfig",
    "EventGptForConditionalGeneration",
    "EventGptModel",
    "EventGptProcessor",
    "register",
]

register()
AutoProcessor.register(EventGptConfig, EventGptProcessor, exist_ok=True)
