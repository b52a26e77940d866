"""Data sets; each file exports build(...) -> Source."""
