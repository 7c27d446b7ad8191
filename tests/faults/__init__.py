"""The fault campaign: what may go wrong with a run is made to go wrong, hundreds of times.

    python -m tests.faults --all             every trial, under an hour on two cores
    python -m tests.faults --tenth           a seeded tenth of every group, a few minutes
    python -m tests.faults --group F5 --trial 17     one trial again

docs/reliability.md says what is promised, and which group tries it. Every trial runs in a process
of its own, forked from one that has imported everything, so that a start costs milliseconds. What
a trial does is decided by (seed, group, number) alone.
"""
