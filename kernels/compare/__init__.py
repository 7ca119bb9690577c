"""The scan against its peers: `python kernels/bench.py --all`.

Every program lives in a process of its own and answers to the one that asks
(`worker.py`), so that torch and JAX share no memory and nothing is lost with a
program that fails, hangs or breaks its connection with the device.

What is timed: a sample is about 20 ms of calls that are issued one after
another, with one wait at the end. All programs of a shape are sampled in turns,
forward and then with backward, and the median counts. A short kernel would hide
behind the time that Python takes to issue it. So a JAX program below
`counts.MANY_BELOW_MS` is compiled once more, for `counts.SETS` sets of
arguments, one after another, and every torch program is captured as a CUDA
graph of as many calls on as many sets. The sets differ, so that not all of them
stay in the device's cache. `called_milliseconds` beside it is the time of a
call from Python.
"""
