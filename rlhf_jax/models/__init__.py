"""The transformer, its heads, and import from other formats."""
