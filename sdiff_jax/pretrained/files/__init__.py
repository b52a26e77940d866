"""Files of weights and configs of other projects, read without running any of their code."""
