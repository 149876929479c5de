"""From a predictor to a sample: loops, samplers, guidance, and pictures out of them. Imports nothing else of zoo."""
