"""Stands in for the package: the part of its option schema that the planner writes."""
