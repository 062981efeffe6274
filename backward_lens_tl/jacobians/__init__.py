"""Average Jacobians that map the output of a block to that of the last one."""
