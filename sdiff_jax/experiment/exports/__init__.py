"""Formats in which the job `export` writes trained runs, each registered by one module.

    @registry.register("experiment.exports", "stablehlo")
    def write(run: Run, folder: str) -> Written: ...

A format writes its files into the folder; the job adds the card, README.md.
"""

from sdiff_jax.experiment.exports._run import Run, Written

__all__ = ["KIND", "Run", "Written"]
KIND = "experiment.exports"
