"""Who asks for what, how often, and what they accept."""
