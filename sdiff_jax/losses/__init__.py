"""Training objectives; each file exports build(...) -> LossFn."""
