"""From a measured run to the causes of its trouble: evidence, knobs, and what turning them does."""
