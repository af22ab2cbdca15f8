"""Visual Adaptive Prompt Tuning for frozen timm Vision Transformers."""
__version__ = "0.1.0"
