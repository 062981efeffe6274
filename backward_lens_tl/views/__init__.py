"""What a result looks like: as a page or notebook output, and in a terminal.

Views never compute: every number comes from the result, and colours are all that they derive.
"""
