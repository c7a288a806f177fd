"""FIM families: the prompt templates of fill-in-the-middle models, and probing a model for its own."""
