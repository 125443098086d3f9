"""Runs a Python program in which random.randrange() returns a certain port the first time.

The arguments are the port, the program, and the program's own arguments.
"""

import random
import runpy
import sys

_, port, *sys.argv = sys.argv
offered = [int(port)]
by_chance = random.randrange
random.randrange = lambda *limits: offered.pop() if offered else by_chance(*limits)
runpy.run_path(sys.argv[0], run_name="__main__")
