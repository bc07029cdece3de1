"""What a configuration would do: in closed form for many, simulated for one."""
