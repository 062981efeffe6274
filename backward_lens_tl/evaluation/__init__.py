"""Evaluate edits: CounterFact's metrics for any method, each edit on the unedited weights.

    records x methods ── plan ──▶ shards ── measuring ──▶ rows ──▶ Parquet ── summary ──▶ one table

A shard is one edit by one method, of one record or of several.
"""
