"""Runs of the quantizer over a model: settings, plan, workers, parts, result."""
