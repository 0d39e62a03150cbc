"""The services of a set: a supervisor and its prefetchers, each a fresh interpreter.

::

    training process ── launch.py ──▶ supervisor ──▶ planner      (once: what rows there are, how they are cut)
                                          └────────▶ prefetcher × P (read chunks, decode, write into the ring)

A service is ``python …/prefetch/boot.py ROLE``: no fork of the user's process, no multiprocessing, so it needs no
``__main__`` guard and works from daemonic workers and beside CUDA. What it is to do lies in the *payload*
(payload.py), a sealed memfd that it inherits.
"""
