"""The protocol on a virtual clock: the true loop, queue, ledger, journal, recovery, mixer, breaker and checkpoints, without engines.

clock     an event loop whose time jumps to the next timer
faults    what may go wrong, by name, and the dice that decide when
parts     workers, learner, queue channel, ledger and journal that can die
witness   what must hold, kept by a bookkeeper who trusts none of the parts
world     one run over all lives of its driver
study     many runs with faults:      polyrl simulate --runs 10000
engines   how long a completion takes in an engine that decodes many at once
planner   one run without faults:     polyrl simulate --plan configs/quickstart.yaml
peers     asynchronous against synchronous, for settings that others published
"""
