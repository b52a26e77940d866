"""Readers of pretrained weights; a module for each project whose files are read.

A reader registers under the name of the network whose parameters it returns,

  @registry.register("pretrained", "edm2")
  def from_state_dict(tensors, like, **fields_of_the_network): ...

and `--job=convert` finds it by `config.model.name`. `files/` reads the files
themselves, `diffusers/` the folders of the diffusers format.
"""
