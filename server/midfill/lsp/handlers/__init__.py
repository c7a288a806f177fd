"""One module per method of LSP, with a function `handle(session, params)`; `lsp/routes.py` lists them all."""
