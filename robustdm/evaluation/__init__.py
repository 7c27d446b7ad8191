"""Measuring a model: samples, features, distances and comparisons."""
