"""Strict typed configuration: schemas, recipes, overrides."""
