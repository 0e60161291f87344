"""Key/value caches for trees, compiled functions, CPU threads."""
