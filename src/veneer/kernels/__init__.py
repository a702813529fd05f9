"""CPU kernels: reference implementation, argument checks, the C library (native, cpu) and torch operators (ops)."""
