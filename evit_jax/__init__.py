"""Vision transformers that drop the tokens they do not need."""
