"""Private transformers at flash-attention speed."""
