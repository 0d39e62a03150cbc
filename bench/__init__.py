"""Benchmarks: one question each. ``python -m bench warm`` asks how fast a warm epoch is beside other loaders,
``order`` how well the order shuffles, ``larger`` what data larger than the ring costs, ``memory`` what the services
need for a large source.

::

    __main__.py   the command line
    warm.py       the question, its variants and targets; runs the rounds
    order.py, larger.py, memory.py   the other questions
    workload.py   makes the data: JPEGs or texts in Parquet, and the same samples decoded, as .npy
    loaders.py    what each variant is: a loader over that data
    child.py      a variant in its own process: warms up, measures, checks
    session.py    the other end: starts that process and asks it
    report.py     the table and the targets
    plot.py       the picture
    host.py       what it ran on
"""
