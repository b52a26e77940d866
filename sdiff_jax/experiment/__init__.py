"""From a config to an experiment: its pieces, work directory, training and sampling.

This is the only package of the library that sees config objects. Below it functions take
values, and errors name their own arguments.
"""
