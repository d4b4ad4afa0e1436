"Tiny networks and data for examples and tests."
