"""How results are shown: in notebooks and on pages, in a terminal, in widgets and figures.

Views do not compute: every number comes from a result or an analysis.
"""
