"""From a snapshot of a document to a suggestion: context, prompt, generation, postprocessing, answer."""
