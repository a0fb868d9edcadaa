"""The command line: asks the center, starts agents and center, plays the simulator and the demo."""
