"""Inner products of gradients of log-probs: of a pair, a data set, tokens."""
