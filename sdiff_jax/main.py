"""Command line: python -m sdiff_jax.main --config=configs/X.py [--job=NAME] [--workdir=DIR].

{jobs}

Any field of the config can be set: --config.train.steps=500. --help=train.steps prints
what a field is and what it may be, --help=train all fields of a section. A component has
its own fields: --config.model.name=dit, as data.name and loss.name, switches to another
one with its default fields, and --help=model.dit prints them.

A command that a signal stops (Ctrl-C, SIGTERM, SIGHUP) ends with code 75 and is resumed by
repeating it; 0 means done, 2 a mistake in the command. --peer_timeout=300 is how many
seconds the processes of one job wait for each other at the start.

DIR is runs/X unless it is given. Without --job the config names the job, which is train
for most. Without --config, the jobs that use a trained run take the config that DIR was
trained with.

Example: a teacher, its distillation, and images from two steps.
  python -m sdiff_jax.main --config=configs/digits_diffusion.py
  python -m sdiff_jax.main --config=configs/digits_scd.py
  python -m sdiff_jax.main --config=configs/digits_scd.py --job=sample
"""

from sdiff_jax.distributed import signals

if __name__ == "__main__":
  signals.install()  # before anything else: imports take seconds

import contextlib
import gc
import os
import re
import resource
import sys
import textwrap
from typing import NamedTuple

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from sdiff_jax import config as configs
from sdiff_jax import fields as fields_lib
from sdiff_jax import registry, renamed
from sdiff_jax.distributed import handshake, processes
from sdiff_jax.experiment import explanations, variants
from sdiff_jax.io import lock, resumable, storage
from sdiff_jax.types import Json, UserError

# How long a command that is refused tries to tell the other processes of its job.
REFUSE_SECONDS = 30.0
OPEN_FILES = 65_536  # at a time, if the limits of the user allow it


MAX_MESSAGE = 480  # characters
# Of absl and ml_collections, for flags that are no fields or have values of other types.
FIELD = r"--?config(\.\w+)+(=|$)"  # the start of a flag that sets a field
PARSE_ERRORS = (flags.Error, TypeError, ValueError, IndexError, SyntaxError)


class Command(NamedTuple):
  """A parsed command line.

  Attributes:
    job: name of the job.
    config: None if no file was named.
    workdir: absolute path of the work directory.
    peer_timeout: longest time to wait for the other processes of the job, s.
  """

  job: str
  config: ml_collections.ConfigDict | None
  workdir: str
  peer_timeout: float = processes.LIMIT


def main(argv: list[str]) -> None:
  """Runs a command and prints its last line.

  Args:
    argv: the command line, the name of the program first.

  Raises:
    SystemExit: with code 2, after one line on stderr, for a mistake of the user; with
      code 75, after one line, for a job that a signal has stopped. If several processes
      are running, this process ends at once instead.
  """
  try:
    wanted = [a for a in argv if re.fullmatch(r"--?help(=.*)?", a)]
    if wanted:
      _say(usage(wanted[0].partition("=")[2]))
      return
    line = run(parse(argv))
    if jax.process_index() == 0:
      _say(line)
  except UserError as error:
    message = _one_line(str(error))
    print("error:", message, file=sys.stderr, flush=True)
    if not isinstance(error, handshake.Refused):
      processes.refuse(message, REFUSE_SECONDS)
    processes.exit_now(2)
    raise SystemExit(2) from error
  except signals.Stopped as error:
    if jax.process_index() == 0:
      _say(str(error))
    processes.leave()
    raise SystemExit(signals.STOPPED) from error
  except BrokenPipeError as error:
    _close_streams()
    processes.exit_now(signals.STOPPED)
    raise SystemExit(signals.STOPPED) from error
  except Exception:
    processes.exit_now(1)
    raise


def _one_line(text: str) -> str:
  """Returns a message on one line of bounded length, without its middle if necessary.

  Characters that a terminal would not print, which names in files may have, are escaped.
  """
  line = " ".join(text.split())
  line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
  half = MAX_MESSAGE // 2
  return line if len(line) <= MAX_MESSAGE else f"{line[:half]} ... {line[-half:]}"


def _say(text: str) -> None:
  """Prints the result of a command, to which nobody may listen any more."""
  try:
    print(text, flush=True)
  except BrokenPipeError:
    _close_streams()


def _close_streams() -> None:
  """Sends all further output nowhere, because its reader has ended (as with `| head`)."""
  with open(os.devnull, "w") as nowhere:
    for number in (1, 2):
      os.dup2(nowhere.fileno(), number)


def run(command: Command) -> str:
  """Runs the job of a command and returns its last line.

  Raises:
    UserError: a mistake of the user, in one line.
    Stopped: a signal stopped the job.
  """
  from sdiff_jax.experiment import workdir as workdir_lib  # slow to import

  name, config, workdir, limit = command
  workdir_lib.check_writable(workdir)
  job = registry.lookup("jobs", name)
  if not job.facts.get("shares_workdir"):
    workdir_lib.check_outputs(workdir)
  if config is None and job.facts.get("creates_workdir"):
    raise UserError("--config is missing: name a file of configs/")
  if config is None and job.facts.get("needs_config", True):
    config = workdir_lib.read(workdir)
  if config is not None:
    configs.validate(config)
  with workdir_lib.errors(workdir), contextlib.ExitStack() as stack:

    def describe(first: bool) -> dict[str, Json]:
      about: dict[str, Json] = {"--job": name, "--workdir": workdir}
      if config is not None:
        about |= resumable.flatten(config.to_dict(), "config.")
      if first and not job.facts.get("shares_workdir"):
        try:
          stack.enter_context(lock.locked(workdir, name))
        except UserError as error:
          about[handshake.PROBLEM] = str(error)
      return about

    start = job.facts.get("start")
    start() if start else processes.start(describe, limit)
    _cache_compilations()
    return job.build(config, workdir)


def usage(field: str = "") -> str:
  """Returns the text of --help, with all jobs.

  Args:
    field: --help=FIELD prints that field or section instead, as `explanations.explain`.

  Raises:
    UserError: there is no such field.
  """
  if field:
    return explanations.explain(field.removeprefix("config."))
  lines = ["Jobs (--job=NAME), each on the work directory DIR:"]
  for name, summary in registry.summaries("jobs").items():
    indent = {"initial_indent": f"  {name:<11}", "subsequent_indent": " " * 13}
    lines += textwrap.wrap(summary, 84, **indent)
  return __doc__.format(jobs="\n".join(lines))


def parse(argv: list[str]) -> Command:
  """Parses a command line, the name of the program first.

  Raises:
    UserError: a flag, a field, a file or a job that does not exist, or a value of the
      wrong type.
  """
  file, program, rest = None, argv[0], []
  arguments = iter(argv[1:])
  for argument in arguments:
    name, equals, value = argument.partition("=")
    if name in ("--config", "-config"):
      file = value if equals else next(arguments, "")
    elif name in ("--flagfile", "-flagfile"):  # of absl, which reads any file
      raise UserError(f"{argument}: files of arguments are not read; see --help")
    else:
      rest.append(argument)
  fields = _fields(rest)
  for argument in rest:
    if re.match(r"--?config\.", argument) and not re.match(FIELD, argument):
      raise UserError(f"{argument[:80]}: must be --config.SECTION.FIELD=VALUE")
  if fields and file is None:
    first = next(a for a in rest if a.startswith("--config."))
    raise UserError(f"{first}: name the file of the config as well, --config=FILE")
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "Directory of the run.", values)
  flags.DEFINE_string("job", None, "What to do.", values)
  text = "Longest time to wait for the other processes of the job, s."
  flags.DEFINE_float("peer_timeout", processes.LIMIT, text, 1, 1e6, flag_values=values)
  if file is not None:
    config = _load(file, fields)
    for name, message in renamed.renamed_fields(fields, config.to_dict()).items():
      raise UserError(f"--config.{name}: {message.format('--config.')}")
    options = {"flag_values": values, "sys_argv": [program, *rest]}
    try:
      config_flags.DEFINE_config_dict("config", config, **options)
    except (AttributeError, KeyError) as error:  # a field that the config lacks
      name = re.sub(r"\\n|\\?'", " ", str(error.args[0]))  # it is quoted twice
      raise UserError(f"--config has no such field: {name}") from error
    except PARSE_ERRORS as error:
      raise UserError(f"{error}; see --help") from error
  try:
    _, *unknown = values([program, *rest])
  except PARSE_ERRORS as error:
    raise UserError(f"{error}; see --help") from error
  if unknown:
    raise UserError(f"unknown argument {unknown[0]!r}; flags start with --")
  config = values.config if file is not None else None
  if config is None and values.workdir is None:
    raise UserError("--config and --workdir are missing: give one of them; see --help")
  if not values.peer_timeout >= 1:  # NaN is not
    raise UserError(f"--peer_timeout={values.peer_timeout}: must be at least 1")
  workdir = variants.workdir(file) if values.workdir is None else values.workdir
  _check_path(workdir)
  with storage.one_line(workdir):
    exists = config is None and storage.exists(workdir)
  if exists:
    from sdiff_jax.experiment import stored_config  # slow to import

    configs.load_plugins(stored_config.plugins(workdir))
  job = _job(values.job, config)
  several = registry.lookup("jobs", job).facts.get("several_workdirs")
  paths = workdir.split(",") if several and not storage.isdir(workdir) else [workdir]
  workdir = ",".join(map(storage.absolute, paths))
  return Command(job, config, workdir, values.peer_timeout)


def _check_path(workdir: str) -> None:
  """Checks that a work directory is a path of this machine or a bucket.

  Raises:
    UserError: it is neither.
  """
  text = workdir.encode("utf-8", "replace").decode("utf-8")
  if problem := storage.problem(workdir):
    raise UserError(f"--workdir={text[:80]}: must be {problem}")
  parts = [part.encode("utf-8", "replace") for part in workdir.split("/")]
  if not workdir or text != workdir or "\0" in workdir or max(map(len, parts)) > 255:
    raise UserError(
      f"--workdir={fields_lib.quote(text)}: must be a path in UTF-8 whose names have at "
      "most 255 bytes"
    )


def _fields(arguments: list[str]) -> dict[str, str]:
  """Returns the fields that arguments "--config.field=value" set."""
  matches = (re.fullmatch(r"--?config\.([\w.]+)(?:=(.*))?", a) for a in arguments)
  return {m[1]: m[2] or "" for m in matches if m}


def _load(file: str, fields: dict[str, str]) -> ml_collections.ConfigDict:
  """Returns the config of a file, with the components that the fields switch to.

  Raises:
    UserError: the file, a plugin or a component does not exist.
  """
  if plugins := re.findall(r"[\w.]+", fields.get("plugins", "")):
    configs.load_plugins(plugins)
  config = configs.load(file)
  configs.complete(config)
  for section in configs.PIECES:
    if name := fields.get(f"{section}.name"):
      configs.switch(config, section, name)
  if name := fields.get("sampler.name"):
    from sdiff_jax.experiment import sampling  # slow to import

    sampling.switch(config, name)
  return config


def _job(name: str | None, config: ml_collections.ConfigDict | None) -> str:
  """Returns the job to run: --job, or else the job of the config.

  Raises:
    UserError: there is no such job, or the config is for another one.
  """
  own = "train" if config is None else config.job
  for source, job in (("config.job", own), ("--job", name)):
    try:
      facts = registry.lookup("jobs", own if job is None else job).facts
    except UserError as error:
      raise UserError(f"{source}={job}: {error}") from None
  if name not in (None, own) and own not in facts.get("configs_of", ("train",)):
    raise UserError(f"--job={name}: this config is for --job={own}")
  return name or own


def _cache_compilations() -> None:
  """Keeps compiled programs between runs, unless JAX has a directory for them."""
  if jax.config.jax_compilation_cache_dir is None:
    folder = os.path.expanduser("~/.cache/sdiff_jax/xla")
    jax.config.update("jax_compilation_cache_dir", folder)


def _absl_flags(argv: list[str]) -> list[str]:
  """Parses the flags of absl, and returns the other arguments."""
  if any(re.fullmatch(r"--?(help|flagfile)(=.*)?", a) for a in argv):
    flags.FLAGS(argv[:1])
    return argv
  return flags.FLAGS(argv, known_only=True)


def _allow_open_files() -> None:
  """Raises the limit on open files as far as this user may, for large checkpoints."""
  current, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  limit = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
  if current != resource.RLIM_INFINITY and current < limit:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


def _program() -> None:
  """Runs the command line of this process, and ends it."""
  _allow_open_files()
  # Orbax logs the exceptions that it raises, with their tracebacks, as errors.
  logging.set_verbosity(logging.FATAL)
  try:
    app.run(main, flags_parser=_absl_flags)
  except SystemExit as error:
    if not error.code:
      gc.freeze()  # else the last collection visits all objects of JAX, which is slow
      raise
    # The interpreter would first wait for the threads of Orbax, which try for minutes to
    # write where they may not.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.code if isinstance(error.code, int) else 1)


if __name__ == "__main__":
  _program()
