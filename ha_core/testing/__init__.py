"""For users' tests as well as ours: simulator, campaigns, scenarios, conformance suites, cable relays, checkers of histories."""
