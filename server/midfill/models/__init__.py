"""Models on disk: the catalogue, fetching, verifying, converting, tokenizers. Nothing here runs a model."""
