"""Turns GPU, model and engine configuration into bytes and seconds; knows of no files."""
