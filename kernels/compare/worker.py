"""Objects in processes of their own, asked through a pipe."""

import multiprocessing
import time

from linearizer_jax.kernels.bench import first_line


class WorkerError(Exception):
  """What was asked for did not come; says why in one line."""


class Worker:
  """`factory(*args)` in a new process, whose methods are called from here.

  Starting does not wait: several workers import and initialise side by side.
  What the factory raises is the answer to every question.

  Args:
    factory: a class or function that the new process can import.
    *args: of `factory`; pickled.
  """

  def __init__(self, factory, *args):
    context = multiprocessing.get_context('spawn')
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(
      target=serve, args=(theirs, factory, args), daemon=True
    )
    self._process.start()
    theirs.close()

  def ask(self, method, *args, timeout=600.0):
    """Result of a method; one that gives none in time ends the process.

    Raises:
      WorkerError: it raised, died, or took longer than `timeout` seconds.
    """
    self.send(method, *args)
    return self.receive(timeout)

  def send(self, method, *args):
    """Asks without waiting; `receive` has the answer."""
    try:
      self._pipe.send((method, args))
    except OSError as error:
      raise WorkerError('its process has ended') from error

  def receive(self, timeout):
    """Answer to the oldest question."""
    start = time.monotonic()
    try:
      if not self._pipe.poll(max(timeout, 0)):
        self.close()
        raise WorkerError(f'no answer in {time.monotonic() - start:.0f} s')
      good, answer = self._pipe.recv()
    except (EOFError, OSError) as error:
      self._process.join(5)
      code = self._process.exitcode
      raise WorkerError(f'its process ended with exit code {code}') from error
    if not good:
      raise WorkerError(answer)
    return answer

  def close(self):
    """Ends the process, whatever it does."""
    self._process.kill()
    self._process.join(10)  # a driver may hold one that hangs in a kernel
    self._pipe.close()


def serve(pipe, factory, args):
  """Main function of the process: answers until nobody asks any more."""
  try:
    made, failure = factory(*args), None
  except Exception as error:  # the answer to every question
    made, failure = None, first_line(error)
  while True:
    try:
      method, arguments = pipe.recv()
    except EOFError:
      return
    answer = False, failure
    if failure is None:
      try:
        answer = True, getattr(made, method)(*arguments)
      except Exception as error:  # whatever it is becomes a line of the table
        answer = False, first_line(error)
    pipe.send(answer)
