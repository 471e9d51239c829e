"""What a compiled program costs: operations, traffic, memory and time, read from its text; the chips' published figures."""
