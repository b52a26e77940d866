"""Jobs of the command line: one module each, which registers one function.

    @registry.register("jobs", "sample", sections=..., runtime=..., ...)
    def run(config, workdir) -> str: ...

`run` does the work on a work directory and returns the line that is printed last. The
facts that a job registers are all optional:

  sections         section of the config -> dataclass of its fields, whose annotations
                   declare what they may hold (see `sdiff_jax.fields`).
  runtime          sections and fields, such as "evaluate" or "train.log_every", that may
                   differ between two runs in one work directory.
  creates_workdir  True if the job needs --config; otherwise the config in the work
                   directory is used without it.
  needs_config     False if the job does without any config.
  configs_of       jobs whose configs this one accepts, by the field config.job;
                   ("train",) by default.
  shares_workdir   True if the job may run while another one runs in the work directory;
                   otherwise the second command is refused.
  several_workdirs True if --workdir may be several directories with commas between.
  start            function that is called first; by default
                   `distributed.processes.start`.

A job of another project registers in a module that config.plugins names.
"""
