"""Make what a model wrote fit to be inserted: stop, clean, indent, balance. Pure: text in, text out."""
