"""The verbs: one file per command, named like it. They return values and never print."""
