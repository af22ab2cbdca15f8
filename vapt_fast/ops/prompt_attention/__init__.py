"""prompt_attention: the tokens' queries attend to the prompts and the tokens."""

from .op import prompt_attention as prompt_attention
from .op import prompt_attention_packed as prompt_attention_packed
