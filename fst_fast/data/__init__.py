"""The data stream: the stages of a run, minibatches, lookahead and anchor set."""
