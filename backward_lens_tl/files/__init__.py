"""Files that are written and read back: results, tables, shards of long runs."""
