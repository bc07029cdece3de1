"""The recommendation, its reasons and the files that deploy it."""
