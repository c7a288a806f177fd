"""`midfill eval`: quality of the suggestions.

`infilling` fills the holes of a benchmark and runs its tests in the `sandbox`; `repository` makes `holes` in
the user's own code and compares suggestions with the original text. Both use a `Filler`: the pipeline in this
process, the real server, or the model alone.
"""
