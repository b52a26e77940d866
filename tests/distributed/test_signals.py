"""Signals in processes that have nothing but their handlers."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# The tests may themselves run under nohup, which ignores SIGHUP.
START = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from sdiff_jax.distributed import signals
signals.install()
"""
# Compiled code for minutes, as a compiler is: Python's own handlers would wait for it.
BUSY = (
  START
  + """
import hashlib
print('ready', flush=True)
hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
"""
)
LOOP = (
  START
  + """
with signals.stopping() as asked:
  print('ready', flush=True)
  while not asked():
    time.sleep(0.01)
  time.sleep(float(sys.argv[1]))
print('saved', flush=True)
sys.exit(signals.STOPPED)
"""
)
STUCK = (
  START
  + """
signals.LOOP_SECONDS = 0.2
with signals.stopping() as asked:
  print('ready', flush=True)
  time.sleep(100)
"""
)
SLOW = (
  START
  + """
signals.SAVE_SECONDS = 0.2
with signals.stopping() as asked:
  print('ready', flush=True)
  while not asked():
    time.sleep(0.01)
  time.sleep(100)
"""
)


def start(program: str, *args: str, **options) -> subprocess.Popen:
  process = subprocess.Popen(
    [sys.executable, "-c", program, *args],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )
  assert process.stdout.readline() == "ready\n"
  return process


@pytest.mark.parametrize("number", NUMBERS)
def test_without_a_loop_the_process_ends_at_once(number):
  process = start(BUSY)
  process.send_signal(number)
  _, said = process.communicate(timeout=10)
  assert process.returncode == 75
  assert said == f"{number.name}: stopped; repeat the command to resume\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_a_loop_saves(number):
  process = start(LOOP, "0.3")
  for _ in range(1 if number == signal.SIGINT else 3):  # schedulers repeat themselves
    process.send_signal(number)
    time.sleep(0.05)
  said, errors = process.communicate(timeout=10)
  assert (process.returncode, said, errors) == (75, "saved\n", "")


def test_ctrl_c_twice_does_not_wait_for_the_loop():
  process = start(LOOP, "100")
  for _ in range(2):
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
  said, errors = process.communicate(timeout=10)
  assert (process.returncode, said) == (75, "")
  assert errors.startswith("SIGINT: stopped")


@pytest.mark.parametrize("program", [STUCK, SLOW])
def test_a_loop_that_hangs_is_not_waited_for(program):
  process = start(program)
  process.send_signal(signal.SIGTERM)
  said, errors = process.communicate(timeout=10)
  assert (process.returncode, said) == (75, "")
  assert errors.startswith("SIGTERM: stopped")


def test_nohup_is_respected():
  process = start(LOOP.replace("SIG_DFL", "SIG_IGN"), "0")
  process.send_signal(signal.SIGHUP)
  time.sleep(0.3)
  assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  assert process.communicate(timeout=10)[0] == "saved\n"
