"""Our reward plugins: each file holds the function of its name, and is found by that bare name."""
