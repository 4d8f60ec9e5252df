"""What became of a model, for people: pure functions of graphs."""
