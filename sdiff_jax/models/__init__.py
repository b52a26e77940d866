"""Networks; each file exports build(...) -> Network."""
