"""Training of the Backbone and the Decoder over a frozen Reasoner: losses, what trains, the step, the loop around it."""
