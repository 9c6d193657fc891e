"""Floor 8: what knows transformers models: where they come from, what they are made of, what shapes they have."""
