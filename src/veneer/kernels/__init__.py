"""CPU kernels: what they mean (reference), what they want (contract), the C library (native, cpu), the ops."""
