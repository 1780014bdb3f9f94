"""The transformer and its heads, LoRA adapters, and the formats of Hugging Face."""
