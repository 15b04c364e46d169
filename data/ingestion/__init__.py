"""Verified data sets: folders of Parquet shards that `align ingest` writes and `align inspect` describes."""
