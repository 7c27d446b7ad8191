"""Plots, pictures, tables and pages."""
