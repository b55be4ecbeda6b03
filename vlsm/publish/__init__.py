"""A proved segment run as a table of other engines: Delta Lake, Iceberg, Lance, DuckDB, or Parquet in folders."""
