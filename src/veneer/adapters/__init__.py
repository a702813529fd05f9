"""Choose targets, attach deltas by hooks, save and load adapter folders."""
