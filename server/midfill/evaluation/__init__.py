"""Quality: how good the suggestions are, `midfill eval`.

`infilling` fills the holes of a benchmark and runs its tests in the `sandbox`; `repository` makes `holes`
in the user's own code and compares with what stood there. Both fill by a `Filler`: through the
pipeline in this process, through the real server, or by the model alone.
"""
