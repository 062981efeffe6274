"""Runs over a data set: settings, shards of the data, and a folder of tables."""
