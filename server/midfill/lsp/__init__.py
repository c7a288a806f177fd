"""The language server: the only room that knows pygls and the types of LSP."""
