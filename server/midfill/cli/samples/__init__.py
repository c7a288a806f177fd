"""Sample files for the demo. What stands between ⟦ and ⟧ is typed; the rest is there before."""
