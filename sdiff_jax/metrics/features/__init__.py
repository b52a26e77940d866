"""Networks that turn images into the features which metrics compare."""
