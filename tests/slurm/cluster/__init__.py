"""A real Slurm cluster of several nodes on one machine, for tests and for people who want to try things.

`bringup` starts and ends it, `commands` is its login host, `faults` does to it what happens to clusters.
"""
