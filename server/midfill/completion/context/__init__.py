"""Pieces of other files for the prompt: an index of the workspace, and what of it helps at the cursor."""
