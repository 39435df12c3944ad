"""How fast the kernels and whole calls are, as a share of what the machine's memory allows: docs/performance.md."""
