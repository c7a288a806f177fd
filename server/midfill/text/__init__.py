"""An editor's text: documents, languages, syntax trees, secrets. No LSP, no model."""
