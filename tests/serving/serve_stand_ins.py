"""Serves the models of `stand_ins` until a signal, as the job does: PORT is printed."""

import sys

from sdiff_jax.distributed import signals

if __name__ == "__main__":
  signals.install()
  import time

  import stand_ins

  from sdiff_jax.serving import server
  from sdiff_jax.serving.api import Service

  def slow(rows):
    time.sleep(0.02)
    return stand_ins.draw(rows)

  with signals.stopping() as stop:
    opened = server.listen("127.0.0.1", 0)
    print(opened.getsockname()[1], flush=True)
    models = [stand_ins.images(function=slow)]
    server.run(Service(models), opened, server.Connections(), stop)
  sys.exit(signals.STOPPED)
